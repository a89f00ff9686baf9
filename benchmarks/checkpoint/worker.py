"""One rank: its first line on stdin is a `Job`, each further one asks for something.

What libraries print goes to stderr.
"""

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any, Final, TextIO

from benchmarks.checkpoint.reading import read, write
from benchmarks.checkpoint.saves import Saves
from benchmarks.checkpoint.stall import measure_stall
from benchmarks.checkpoint.training import Job
from benchmarks.trainer.group import process_group
from trainer.distributed import Ranks

_STAGE: Final = 1
"""Of all but `reading`: DeepSpeed owns a partitioned optimizer, even on one rank."""


class Worker:
    """Does what it is asked for.

    Args:
        job: What to train.
        ranks: The processes of the job.
        answers: Where they go.
    """

    def __init__(self, job: Job, ranks: Ranks, answers: TextIO) -> None:
        self._job, self._ranks, self._answers = job, ranks, answers
        self._saves: Saves | None = None

    def do(self, asked: dict[str, Any]) -> None:
        """Do one thing and answer."""
        match asked:
            case {"do": "stall", "folder": folder, "repeats": repeats}:
                found = measure_stall(self._job.recipe(_STAGE), self._ranks, Path(folder), repeats)
                self._answer(found.model_dump())
            case {"do": "write", "url": url, "stage": stage}:
                self._answer(write(self._job.recipe(stage), self._ranks, url).model_dump())
            case {"do": "read", "url": url, "stage": stage}:
                self._answer(read(self._job.recipe(stage), self._ranks, url).model_dump())
            case {"do": "save", "side": side, "folder": folder}:
                self._saves = Saves(self._job.recipe(_STAGE), self._ranks, side, Path(folder))
                self._answer(self._saves.usual())
            case {"do": "go on", "skip": skip}:
                assert self._saves is not None, "it was asked to save before"
                self._saves.go_on(skip, lambda: self._answer(None))
            case _:
                raise ValueError(f"unknown: {asked}")

    def _answer(self, content: object) -> None:
        print(json.dumps(content), file=self._answers, flush=True)


def main() -> None:
    """Answer until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is printed from here on
    warnings.filterwarnings("ignore", category=FutureWarning)
    lines = iter(sys.stdin.readline, "")
    job = Job.model_validate_json(next(lines))
    with process_group() as ranks:
        worker = Worker(job, ranks, answers)
        for line in lines:
            worker.do(json.loads(line))


if __name__ == "__main__":
    main()
