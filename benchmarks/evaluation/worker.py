"""The process in which one contender makes features; it answers one JSON line for every JSON line on stdin.

The first line is a `FeatureJob`. Each further one is `{"do": NAME, …}`, with the methods of `Worker` for
names. What libraries print goes to stderr.
"""

import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from benchmarks.evaluation.clock import NetworkClock
from benchmarks.evaluation.contenders import Contender, contenders
from benchmarks.evaluation.job import Call, FeatureJob
from benchmarks.evaluation.pictures import PictureSet
from benchmarks.harness import timed, tree_seconds


class Worker:
    """One contender's answers.

    Args:
        ways: The contender in each of its configurations.
        clock: Of its network.
    """

    def __init__(self, ways: Sequence[Contender], clock: NetworkClock) -> None:
        self._ways, self._clock = {way.configuration.name: way for way in ways}, clock

    def configurations(self) -> list[dict[str, Any]]:
        """Return a `Configuration` for each way."""
        return [way.configuration.model_dump() for way in self._ways.values()]

    def call(self, name: str, folder: str) -> dict[str, float]:
        """Make features and moments of the pictures in a folder; return the `Call`."""
        run = partial(self._ways[name].moments, PictureSet.read(Path(folder)))
        self._clock.restart()
        wall, cpu = timed(run, tree_seconds)
        network, resize = self._clock.on_network.seconds, self._clock.on_resize.seconds
        return Call(wall=wall, cpu=cpu, network=network, resize=resize).model_dump()

    def answer(self, name: str, folders: list[str], out: str) -> float:
        """Write the features of two folders' pictures to a file, [2, N, d]; return their distance."""
        way = self._ways[name]
        first, second = (PictureSet.read(Path(folder)) for folder in folders)
        np.save(out, np.stack([way.features(pictures) for pictures in (first, second)]))
        return way.distance(first, second)


def main() -> None:
    """Answer until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is printed from here on
    lines = iter(sys.stdin.readline, "")
    job = FeatureJob.model_validate_json(next(lines))
    torch.set_num_threads(job.threads)
    with threadpool_limits(job.threads), NetworkClock(small=job.small) as clock:
        worker = Worker(contenders(clock, job.contender, few=job.small), clock)
        for line in lines:
            asked: dict[str, Any] = json.loads(line)
            answer = getattr(worker, asked.pop("do"))(**asked)
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
