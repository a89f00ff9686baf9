"""A run whose training state is made up, with everything a checkpoint has and nothing that trains."""

import functools

import torch

from tests.trainer.thread_ranks import on_ranks
from trainer.checkpoint import Slice, newest_whole
from trainer.distributed import Ranks
from trainer.manifest import DamagedCheckpointError, Manifest, Topology
from trainer.partition import ADAM_ROLES, Partition, Piece
from trainer.recipe_sections import CheckpointSection, EmaProfile
from trainer.restore import load_state, read_weights
from trainer.run import Run
from trainer.saving import CheckpointWriter
from trainer.telemetry import MetricsLog

PROFILES = {"main": EmaProfile(decay=0.9999, per_images=128)}


def draft(images: int, attempt: int = 1, world: int = 1) -> Manifest:
    return Manifest(
        run="r",
        attempt=attempt,
        images=images,
        position=images,
        updates=1,
        recipe_sha="",
        index_sha="",
        topology=Topology(world=world, zero_stage=1, device="cpu"),
    )


class State:
    """Two parameters with moments and an average, divided over ranks as ZeRO 1 does.

    Args:
        size: Numbers in both parameters together.
        rank: Whose part this is.
        world: How many ranks there are.
    """

    def __init__(self, size: int, rank: int = 0, world: int = 1) -> None:
        half, self.first, last = size // 2, size * rank // world, size * (rank + 1) // world
        self.size, self.shapes = size, {"a": torch.Size([half]), "b": torch.Size([size - half])}
        flats = [torch.zeros(last - self.first) for _ in range(4)]
        pieces = []
        for name, begin, end in (("a", 0, half), ("b", half, size)):
            start, stop = max(begin, self.first), min(end, last)
            if start < stop:
                pieces.append(Piece(name, start - begin, stop - begin, 0, start - self.first))
        moments = {role: [flat] for role, flat in zip(ADAM_ROLES, flats[1:3], strict=True)}
        self.partition = Partition([flats[0]], moments, pieces)
        self.averages = {"main": [flats[3]]}
        self._flats = flats

    def train_to(self, images: int) -> None:
        """Give every number a value that tells where it belongs and when it was."""
        for role, flat in enumerate(self._flats):
            flat.copy_(self._numbers(role, images, len(flat)))

    def equals(self, images: int) -> bool:
        """Whether the state is that of this moment."""
        wanted = (self._numbers(role, images, len(flat)) for role, flat in enumerate(self._flats))
        return all(torch.equal(flat, numbers) for flat, numbers in zip(self._flats, wanted, strict=True))

    def _numbers(self, role: int, images: int, count: int) -> torch.Tensor:
        return torch.arange(self.first, self.first + count, dtype=torch.float32) * 4 + role + images

    def writer(self, run: Run, ranks: Ranks, metrics: MetricsLog, **section: float) -> CheckpointWriter:
        return CheckpointWriter(
            run,
            ranks,
            self.partition,
            self.averages,
            self.shapes,
            CheckpointSection.model_validate({"every_images": 1, "keep": 2, **section}),
            PROFILES,
            metrics,
        )


def load_whole(run: Run, manifest: Manifest, ranks: Ranks) -> list[Slice]:
    """Load a checkpoint as training does, its masters at least; return them."""
    weights = read_weights(run, manifest, ranks)
    slices = [
        Slice(name, 0, tensor.numel(), {"master": torch.empty(tensor.numel())})
        for name, tensor in weights.items()
    ]
    load_state(run, manifest, slices, ranks)
    return slices


def newest_loadable(run: Run, world: int = 1) -> str:
    """Name of the checkpoint that an attempt of so many ranks would start from."""
    refused: list[str] = []
    while True:
        manifest = newest_whole(run, refused)
        assert manifest is not None
        try:
            on_ranks(world, functools.partial(load_whole, run, manifest))
        except DamagedCheckpointError:
            refused.append(manifest.name)
        else:
            return manifest.name


def load_into(state: State, run: Run, manifest: Manifest, ranks: Ranks) -> None:
    """Load a checkpoint into a made-up state."""
    load_state(run, manifest, state.partition.targets(state.averages), ranks)
