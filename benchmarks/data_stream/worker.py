"""The process in which one contender reads; it answers one JSON line for every JSON line on stdin.

The first line is a `Job`. Each further one is `{"do": NAME, …}`, with the methods of `Worker` for names. What
libraries print goes to stderr.
"""

import functools
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import psutil

from benchmarks.data_stream.contenders import CONTENDERS, OURS, stream
from benchmarks.data_stream.job import SIZE, Epoch, Job
from benchmarks.harness import timed, tree_seconds
from benchmarks.peers.webdataset_reader import skip_to
from data_pipeline import ImageStream
from data_pipeline.errors import StorageFault
from data_pipeline.readahead import ReadAhead

_ROW = SIZE * SIZE * 3


class Worker:
    """One contender's answers.

    Args:
        job: What it reads.
    """

    def __init__(self, job: Job) -> None:
        self._job = job

    @functools.cached_property
    def _epoch(self) -> Epoch:
        return CONTENDERS[self._job.contender].open(self._job)

    @functools.cached_property
    def _going(self) -> ImageStream:
        opened = stream(self._job)
        for _ in range(self._job.batches):  # the first epoch is not timed
            next(opened)
        return opened

    def close(self) -> None:
        """Close the stream that goes on, if there is one."""
        if "_going" in self.__dict__:
            self._going.close()

    def version(self) -> str | None:
        """Of the peer's distribution, as this process finds it."""
        peer = CONTENDERS[self._job.contender].peer
        return None if peer is None else peer.version

    def write(self, pictures: str, out: str) -> None:
        """Write a folder of pictures in the contender's format."""
        write = CONTENDERS[self._job.contender].write
        assert write is not None, "it has no format of its own"
        write(Path(pictures), Path(out))

    def epoch(self) -> dict[str, float]:
        """Read one epoch and do nothing with it; return wall and processor seconds, and pictures."""
        delivered: list[int] = []
        if self._job.contender == OURS:
            # As in training, one stream goes on from epoch to epoch; a last batch reaches into the next one.
            going = self._going
            wall, cpu = timed(
                lambda: delivered.extend(len(next(going).images) for _ in range(self._job.batches)),
                tree_seconds,
            )
            return {"wall": wall, "cpu": cpu, "pictures": sum(delivered)}
        epoch = self._epoch
        with tempfile.TemporaryDirectory() as cache:
            wall, cpu = timed(lambda: delivered.extend(map(len, epoch(Path(cache)))), tree_seconds)
        return {"wall": wall, "cpu": cpu, "pictures": sum(delivered)}

    def digests(self) -> list[str]:
        """Read one epoch; return the SHA-256 of every picture's pixels as they came."""
        found: list[str] = []
        with tempfile.TemporaryDirectory() as cache:
            for batch in self._epoch(Path(cache)):
                images = np.ascontiguousarray(batch)
                assert images.dtype == np.uint8, f"pixels of type {images.dtype}"
                assert images.shape[1:] == (SIZE, SIZE, 3), f"pictures of shape {images.shape}"
                found += [hashlib.sha256(row.data).hexdigest() for row in images.reshape(-1, _ROW)]
        return found[: self._job.pictures]

    def digests_to_the_end(self) -> dict[str, Any]:
        """Do as `digests`, and where our stream ends with an error, open another one at its cursor.

        Returns:
            The digests, and the number of errors.
        """
        found: list[str] = []
        position, stops = 0, 0
        while position < self._job.pictures:
            with stream(self._job, position) as opened:
                try:
                    for batch in opened:
                        rows = batch.images.reshape(-1, _ROW)
                        found += [hashlib.sha256(row.data).hexdigest() for row in rows]
                        if opened.position >= self._job.pictures:
                            break
                except StorageFault:
                    stops += 1
                position = opened.position
        return {"digests": found[: self._job.pictures], "stops": stops}

    def first_batch(self, position: int) -> int:
        """Start at a position and stop with the first batch; return its pictures.

        Our stream would go on reading ahead as soon as it has delivered; that is held back, so that whoever
        counts bytes sees those before the first batch and no others.
        """
        if self._job.contender != OURS:
            return skip_to(self._job, position)
        with patch.object(ReadAhead, "go_on", lambda ahead: None), stream(self._job, position) as opened:
            return len(next(opened).positions)

    def memory(self, epochs: int) -> list[int]:
        """Read several epochs; return the resident bytes of this process after each."""
        resident = []
        for _ in self._epochs(epochs):
            resident.append(psutil.Process().memory_info().rss)
        return resident

    def _epochs(self, count: int) -> Iterator[None]:
        """Read epoch after epoch: ours in one stream, a peer as it does."""
        if self._job.contender == OURS:
            with stream(self._job) as opened:
                for _ in range(count):
                    for _ in range(self._job.batches):
                        next(opened)
                    yield
            return
        for _ in range(count):
            with tempfile.TemporaryDirectory() as cache:
                for _ in self._epoch(Path(cache)):
                    pass
            yield


def main() -> None:
    """Answer until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is printed from here on
    lines = iter(sys.stdin.readline, "")
    worker = Worker(Job.model_validate_json(next(lines)))
    for line in lines:
        asked: dict[str, Any] = json.loads(line)
        answer = getattr(worker, asked.pop("do"))(**asked)
        print(json.dumps(answer), file=answers, flush=True)
    worker.close()


if __name__ == "__main__":
    main()
