"""Kills processes that are publishing a checkpoint, and looks at what is left.

`python -m tests.trainer.killed_writer URL operations` kills before and after every storage operation;
`… URL random COUNT SEED` at random moments. Prints one JSON object: the trials and the histogram.
"""

import itertools
import json
import os
import random
import select
import signal
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any
from unittest.mock import patch

import torch

from data_pipeline.storage import Storage
from tests.support import tiny_recipe
from tests.trainer.checkpoint_support import State, draft, load_into, newest_loadable
from tests.trainer.thread_ranks import alone
from trainer.retention import orphans
from trainer.run import Run
from trainer.saving import Job
from trainer.telemetry import MetricsLog

SIZE = 200_000
"""Numbers of the made-up network: 5 MB with averages and moments."""


@dataclass(frozen=True)
class Trial:
    """One killed process.

    Attributes:
        moment: When it was killed: an operation's number and side, or a share of the usual time.
        during: The operation that had begun last.
        is_between: After the first byte and before the manifest.
        is_published: Whether the manifest is there.
        restored: The checkpoint that a new attempt would start from.
        is_right: It is the newest published one, and every number is that of its moment.
    """

    moment: str
    during: str
    is_between: bool
    is_published: bool
    restored: str
    is_right: bool


class Writer:
    """A process that writes one checkpoint and tells of each storage operation.

    Args:
        url: The run.
        images: Of the checkpoint.
        kill: Operation's number and side ("before" or "after") at which it kills itself; None for never.
    """

    def __init__(self, url: str, images: int, kill: tuple[int, str] | None = None) -> None:
        self._told, telling = os.pipe()
        self.events: list[tuple[str, str]] = []
        self._rest = b""
        run = Run(url)
        parent = run.live_checkpoints()
        self.attempt = run.claim_attempt(parent[-1] if parent else None, "test", tiny_recipe(), "").attempt
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.close(self._told)
                _write(url, images, self.attempt, telling, kill)
                time.sleep(60)  # to be killed
            finally:
                os._exit(1)
        os.close(telling)

    def hear(self, wait: bool = True) -> bool:
        """Take in what the process told; return whether there may be more."""
        if not wait and not select.select([self._told], [], [], 0)[0]:
            return False
        data = os.read(self._told, 65536)
        *lines, self._rest = (self._rest + data).split(b"\n")
        self.events.extend((line.decode().split(" ", 1)[0], line.decode().split(" ", 1)[1]) for line in lines)
        return bool(data)

    def is_done(self) -> bool:
        return any(kind == "done" for kind, _ in self.events)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.wait()

    def wait(self) -> None:
        _, status = os.waitpid(self.pid, 0)
        assert os.WIFSIGNALED(status), "the process was to be killed"
        assert os.WTERMSIG(status) == signal.SIGKILL
        while self.hear():
            pass
        os.close(self._told)


def _write(url: str, images: int, attempt: int, telling: int, kill: tuple[int, str] | None) -> None:
    run, ranks, number = Run(url), alone(), itertools.count()
    state = State(SIZE)
    state.train_to(images)
    metrics = MetricsLog(run, attempt, images)
    metrics.log(images, {"loss": 1.0})
    writer = state.writer(run, ranks, metrics)
    operate = Storage._attempt

    def noting(storage: Storage, path: str, operation: Any) -> Any:
        mine = next(number)
        os.write(telling, f"begin {path or storage.url}\n".encode())
        if kill == (mine, "before"):
            os.kill(os.getpid(), signal.SIGKILL)
        result = operate(storage, path, operation)
        if kill == (mine, "after"):
            os.kill(os.getpid(), signal.SIGKILL)
        os.write(telling, f"end {path or storage.url}\n".encode())
        return result

    with patch.object(Storage, "_attempt", noting):
        writer.start(Job(draft(images, attempt), {}, checkpoint=True, snapshot=False))
        writer.wait()
    os.write(telling, b"done .\n")


def judge(url: str, writer: Writer, moment: str) -> Trial:
    """Look at what a killed process left, as a new attempt would."""
    run = Run(url)
    published = run.live_checkpoints()
    restored = newest_loadable(run, world=2)
    manifest = run.manifest(restored)
    state = State(SIZE)
    load_into(state, run, manifest, alone())
    is_right = restored == published[-1] and state.equals(manifest.images)
    is_published = manifest.attempt == writer.attempt
    began = [name for kind, name in writer.events if kind == "begin"]
    parts = any(name.endswith(".safetensors") for name in began)
    for orphan in orphans(run):
        run.storage.delete_folder(orphan.path)
    during = began[-1] if began else ""
    return Trial(moment, during, parts and not is_published, is_published, restored, is_right)


Step = tuple[str, float]
"""A storage operation and the seconds until the next one began."""


def undisturbed(url: str, images: int) -> list[Step]:
    """Let a checkpoint be written; return its operations."""
    writer = Writer(url, images)
    began: list[tuple[str, float]] = []
    while not writer.is_done():
        assert writer.hear(), "the writer has failed"
        names = [name for kind, name in writer.events if kind == "begin"]
        began += [(name, time.monotonic()) for name in names[len(began) :]]
    began.append(("", time.monotonic()))
    writer.kill()
    return [(name, after - at) for (name, at), (_, after) in itertools.pairwise(began)]


def around_every_operation(url: str) -> list[Trial]:
    trials, images = [], 64
    for number in itertools.count():
        for side in ("before", "after"):
            images += 64
            writer = Writer(url, images, (number, side))
            while writer.hear() and not writer.is_done():
                pass
            if writer.is_done():
                writer.kill()
                return trials
            writer.wait()
            trials.append(judge(url, writer, f"{side} operation {number}"))
    raise AssertionError


def at_random(url: str, count: int, seed: int) -> list[Trial]:
    """Kill at moments that are uniform in the time between the first byte and the manifest."""
    rng, images, trials = random.Random(seed), 64, []
    for number in range(count):
        if number % 50 == 0:
            images += 64
            steps = undisturbed(url, images)
            first = next(n for n, (name, _) in enumerate(steps) if name.endswith(".safetensors"))
            last = next(
                n for n, (name, _) in enumerate(steps) if name.endswith("manifest.json") and n > first
            )
        step = rng.choices(range(first, last + 1), [seconds for _, seconds in steps[first : last + 1]])[0]
        share, images = rng.random(), images + 64
        writer = Writer(url, images)
        while sum(kind == "begin" for kind, _ in writer.events) <= step and not writer.is_done():
            assert writer.hear(), "the writer has failed"
        time.sleep(share * steps[step][1])
        writer.kill()
        trials.append(judge(url, writer, f"{share:.2f} of operation {step}"))
    return trials


def main(url: str, mode: str, count: str = "0", seed: str = "0") -> None:
    torch.set_num_threads(1)
    run = Run(url)
    run.adopt_recipe(tiny_recipe())
    undisturbed(url, 32)
    trials = around_every_operation(url) if mode == "operations" else at_random(url, int(count), int(seed))
    during: dict[str, int] = {}
    for trial in trials:
        name = trial.during.rpartition("/")[2] if trial.is_between else "(before or after)"
        name = "metrics" if name.endswith(".jsonl") else name
        during[name] = during.get(name, 0) + 1
    print(json.dumps({"trials": [asdict(trial) for trial in trials], "during": during}))


if __name__ == "__main__":
    main(*sys.argv[1:])
