"""One rank that trains several recipes one after the other, for real.

`python -m tests.trainer.layout_program CASES OUT` with RANK, WORLD_SIZE and the rest in the environment. One
start of processes serves a whole matrix of recipes: starting them costs more than these trainings do.
"""

import contextlib
import json
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from data_pipeline.device import DeviceBatch
from trainer import loop, preflight
from trainer.clock import ema_decay
from trainer.distributed import Environment, FollowedError, Ranks
from trainer.engine import init_process_group
from trainer.guards import DivergedError
from trainer.recipe import Recipe, load_recipe
from trainer.run import Run
from trainer.saving import whole_tensors
from trainer.session import Session
from trainer.stop import StopReason, StopRequest


class Injected(loop.Trainer):
    """A trainer whose losses of some stream positions are replaced, which is counted, and that may be killed.

    It writes down which samples it has trained on, beside the run: `RUN.ids-RANK`; and it counts the networks
    of attempts before that it still meets in memory.
    """

    poison: dict[str, Any] | None = None
    injected = 0
    kill: dict[str, Any] | None = None
    never_waits = False
    watched = 0
    computed_in: ClassVar[set[str]] = set()
    networks: ClassVar[weakref.WeakSet[nn.Module]] = weakref.WeakSet()
    met: ClassVar[list[int]] = []

    def __init__(self, recipe: Recipe, run: Run, ranks: Ranks, session: Session, *rest: Any) -> None:
        Injected.met.append(len(self.networks))
        super().__init__(recipe, run, ranks, session, *rest)
        self.networks.add(self.engine.module)
        stem = next(each for each in self.engine.module.modules() if isinstance(each, nn.Conv2d))
        stem.register_forward_hook(lambda _module, _inputs, output: self.computed_in.add(str(output.dtype)))

    def _forward_and_backward(self, batch: DeviceBatch) -> list[tuple[Tensor, Tensor, Tensor]]:
        # In the first two steps tables are made, kernels loaded and buffers allocated.
        if not self.never_waits or self.state.updates < 2:
            return super()._forward_and_backward(batch)
        Injected.watched += 1
        with waiting_for_the_gpu_is_refused():
            return super()._forward_and_backward(batch)

    def step(self, batch: DeviceBatch, wish: StopReason = StopReason.NONE) -> StopReason:
        if self.kill is not None and (self.kill["images"], self.kill["rank"]) == (
            self.state.images,
            self.ranks.rank,
        ):
            threading.Timer(self.kill["seconds"], os.kill, (os.getpid(), signal.SIGKILL)).start()
        ids = {"images": self.state.images, "ids": batch.positions.tolist()}
        with Path(f"{self.run.url}.ids-{self.ranks.rank}").open("a") as file:
            file.write(json.dumps({"attempt": self.session.attempt.attempt, **ids}) + "\n")
        return super().step(batch, wish)

    def losses(self, pictures: Tensor, n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        losses, t, weights = super().losses(pictures, n)
        if self.poison is None:
            return losses, t, weights
        start, stop = self.poison["positions"]
        hit = (n >= start) & (n < stop)
        Injected.injected += int(hit.sum())
        return losses * torch.where(hit, self.poison["factor"], 1.0), t, weights


class Averaged(Injected):
    """A trainer beside whose averages whole ones are kept that nobody partitioned."""

    def __init__(self, recipe: Recipe, run: Run, ranks: Ranks, session: Session, *rest: Any) -> None:
        super().__init__(recipe, run, ranks, session, *rest)
        self.reference = {name: self._whole(self.engine.partition.masters) for name in recipe.ema}

    def step(self, batch: DeviceBatch, wish: StopReason = StopReason.NONE) -> StopReason:
        before = self.state.images
        reason = super().step(batch, wish)
        weights = self._whole(self.engine.partition.masters)
        for name, profile in self.recipe.ema.items():
            share = 1.0 - ema_decay(profile, before, self.recipe.batch.total)
            for key, value in weights.items():
                self.reference[name][key].lerp_(value, share)
        return reason

    def difference(self) -> float:
        """Largest difference of any number of any average from the unpartitioned reference, on rank 0."""
        found = {name: self._whole(flats) for name, flats in self.ema.flats.items()}
        if not self.ranks.is_main:
            return 0.0
        return max(
            (
                float((found[name][key] - value).abs().max())
                for name, reference in self.reference.items()
                for key, value in reference.items()
            ),
            default=0.0,
        )

    def _whole(self, flats: list[Tensor]) -> dict[str, Tensor]:
        whole = whole_tensors(self.ranks, self.engine.partition, flats, self.shapes)
        return {name: value.detach().clone() for name, value in whole.items()}

    def close(self) -> None:
        Averaged.last_difference = self.difference()
        super().close()

    last_difference = float("nan")


@contextlib.contextmanager
def waiting_for_the_gpu_is_refused() -> Iterator[None]:
    """Raise in who waits for the device, be it in the course of something else."""

    def refuse(*_: Any) -> None:
        raise RuntimeError("waits for the GPU")

    torch.cuda.set_sync_debug_mode("error")
    try:
        with patch.object(torch.cuda, "synchronize", refuse):
            yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextlib.contextmanager
def reductions() -> Iterator[set[str]]:
    """Collect the precisions of all larger tensors that are reduced over the ranks meanwhile."""
    seen: set[str] = set()

    def noting(reduce: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any, **named: Any) -> Any:
            given = [*arguments, *named.values()]
            seen.update(str(each.dtype) for each in given if isinstance(each, Tensor) and each.numel() >= 64)
            return reduce(*arguments, **named)

        return noted

    with contextlib.ExitStack() as stack:
        for name in (
            "all_reduce",
            "reduce",
            "reduce_scatter",
            "reduce_scatter_tensor",
            "reduce_scatter_single",
        ):
            if hasattr(dist, name):
                stack.enter_context(patch.object(dist, name, noting(getattr(dist, name))))
        yield seen


@contextlib.contextmanager
def asked_as_on_a_gpu() -> Iterator[None]:
    """Answer for the CPU who asks for autocast without naming a device, which means a GPU.

    DeepSpeed does, and switches off what it finds: on a CPU nobody would notice. Nobody refuses float16
    either, which torch computes with on any CPU, if slowly.
    """
    is_enabled = torch.is_autocast_enabled
    with (
        patch.object(torch, "is_autocast_enabled", lambda device="cpu": is_enabled(device)),
        patch.object(type(get_accelerator()), "is_fp16_supported", lambda _: True),
        patch.object(preflight, "_GPU_ONLY", ()),
    ):
        yield


def run_case(case: dict[str, Any], ranks: Ranks, stop: StopRequest, reduced: set[str]) -> dict[str, Any]:
    """Train one recipe to its end; return what became of it."""
    recipe = load_recipe("quickstart", case["overrides"])
    kind = Averaged if case.get("reference") else Injected
    Injected.injected, Injected.watched, Averaged.last_difference = 0, 0, float("nan")
    kind.poison, kind.kill = case.get("poison"), case.get("kill")
    kind.never_waits = case.get("never_waits", False)
    error = None
    for noted in (reduced, Injected.computed_in, Injected.networks, Injected.met):
        noted.clear()
    with patch.object(loop, "Trainer", kind):
        try:
            loop.train(recipe, Run(recipe.run), ranks, stop)
        except (DivergedError, FollowedError) as raised:
            error = f"{type(raised).__name__}: {raised}"
    return {
        "error": error,
        "injected": Injected.injected,
        "ema_difference": Averaged.last_difference,
        "reduced_in": sorted(reduced),
        "computed_in": sorted(Injected.computed_in),
        "watched": Injected.watched,
        "networks_met": list(Injected.met),
    }


def main(arguments: Sequence[str]) -> None:
    """Train all cases of a JSON file; write this rank's findings beside `OUT`."""
    environment, stop = Environment.from_launcher(), StopRequest()
    cases, out = json.loads(Path(arguments[0]).read_text()), Path(f"{arguments[1]}.{environment.rank}")
    with asked_as_on_a_gpu(), reductions() as reduced:  # before DeepSpeed takes note of the functions
        init_process_group(environment, 120.0)
        try:
            ranks = Ranks(environment)
            found = {case["name"]: run_case(case, ranks, stop, reduced) for case in cases}
            out.write_text(json.dumps(found))
        finally:
            dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
