"""A rank that saves again and again until it is killed, and writes down when."""

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from benchmarks.checkpoint.training import Publishing, Training
from benchmarks.harness import OURS
from benchmarks.peers import deepspeed_checkpoint
from benchmarks.peers.deepspeed_checkpoint import DEEPSPEED
from trainer.distributed import Ranks
from trainer.recipe import Recipe
from trainer.saving import CheckpointWriter, Job

SIDES: Final = (OURS, DEEPSPEED.name)
"""Who saves."""
_WARM_SAVES: Final = 5
_USUAL_SAVES: Final = 3
"""Of them, the last ones: the first are slower."""


class Diary:
    """Says when a rank's saves began and ended; what it says outlives the process.

    Args:
        folder: Of the trial.
        rank: Whose diary.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"diary-{rank}"

    def note(self, what: str) -> None:
        """Write down what is the case from now on."""
        line = f"{what} {time.monotonic()}\n".encode()
        file = os.open(self._path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        try:
            os.write(file, line)  # at once: a kill leaves all of it or nothing
        finally:
            os.close(file)

    def seconds(self) -> list[float]:
        """How long each save took that has ended."""
        times = [float(line.split()[1]) for line in self._lines()]
        return [end - begin for begin, end in zip(times[::2], times[1::2], strict=False)]

    def is_saving(self) -> bool:
        """Whether a save has begun that has not ended."""
        return self._lines()[-1].startswith("begin")

    def _lines(self) -> list[str]:
        return self._path.read_text().splitlines()


class NotedWriter(CheckpointWriter):
    """Notes when its thread has done all of its work, before anybody who waits for it goes on."""

    diary: Diary

    def _write(self, job: Job, deadline: float) -> None:
        super()._write(job, deadline)
        self.diary.note("end")


class Saves:
    """Trains, and saves after every step.

    Args:
        recipe: What to train.
        ranks: The processes of the job.
        side: One of `SIDES`.
        folder: Of the trial.
    """

    def __init__(self, recipe: Recipe, ranks: Ranks, side: str, folder: Path) -> None:
        self._training, self._folder = Training(recipe, ranks), folder
        self._diary, self._is_ours = Diary(folder, ranks.rank), side == OURS
        self._is_main = ranks.is_main
        self._publishing: Publishing | None = None
        self._training.step()
        if self._is_ours:
            self._publishing = Publishing(self._training, str(run_of(folder)), NotedWriter)
            assert isinstance(self._publishing.writer, NotedWriter)
            self._publishing.writer.diary = self._diary

    def usual(self) -> float:
        """Save some times undisturbed; return how many seconds a save takes on this rank."""
        for _ in range(_WARM_SAVES):
            self._save(lambda: None)
        return statistics.median(self._diary.seconds()[-_USUAL_SAVES:])

    def go_on(self, skip: int, tell: Callable[[], None]) -> None:
        """Save until the process is killed.

        Args:
            skip: Saves until `tell`.
            tell: Called on rank 0 when the next save begins.
        """
        for _ in range(skip):
            self._save(lambda: None)
        self._save(tell if self._is_main else lambda: None)
        while True:
            self._save(lambda: None)

    def _save(self, begun: Callable[[], None]) -> None:
        """Save once, and take a step."""
        training, publishing = self._training, self._publishing
        self._diary.note("begin")
        begun()
        if publishing is not None:
            publishing.writer.start(publishing.job())
            training.step()  # while it is written
            publishing.wait()
        else:
            tag = f"step-{training.updates}"
            deepspeed_checkpoint.save(training.deepspeed, theirs_of(self._folder), tag, training.ema.flats)
            self._diary.note("end")
            training.step()


def run_of(folder: Path) -> Path:
    """Where ours are, in the folder of a trial."""
    return folder / "run"


def theirs_of(folder: Path) -> Path:
    """Where DeepSpeed's are."""
    return folder / "deepspeed"
