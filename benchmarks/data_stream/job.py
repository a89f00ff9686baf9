"""What one contender is told, and what it has to offer."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import Record
from data_pipeline.storage_backend import StorageBackend

SIZE = 256
"""Side of the pictures."""
BATCH = 64
"""Pictures of a batch."""
SEED = 1
"""Of every shuffle that takes one."""
PREFETCH_BYTES = 256 << 20
"""`ImageStream`'s own default."""

Epoch = Callable[[Path], Iterator[Any]]
"""An empty folder for what is kept on disk -> the batches of one epoch, uint8 [b, 256, 256, 3], shuffled."""


class Job(Record):
    """What a process is to read.

    Attributes:
        contender: Who reads; a key of `contenders.CONTENDERS`.
        url: Where its data lie: for ours and decode-only the shards', for the others those in their format.
        pictures: Pictures of one epoch.
        workers: Processes of a loader that has some.
        http: The shards' URLs for a reader that knows only HTTP.
        backend: Of our `Storage`.
        request_timeout: Of our `Storage`.
        prefetch_bytes: Of our stream.
        window_shards: Of our stream.
        batch: Pictures of a batch, where it is not every contender's `BATCH`.
    """

    contender: str
    url: str
    pictures: int
    workers: int = 0
    http: tuple[str, ...] = ()
    backend: StorageBackend = StorageBackend.OBSTORE
    request_timeout: float = 30.0
    prefetch_bytes: int = PREFETCH_BYTES
    window_shards: int = 16
    batch: int = BATCH

    @property
    def batches(self) -> int:
        """Batches of one epoch; our last one reaches into the next epoch."""
        return math.ceil(self.pictures / BATCH)
