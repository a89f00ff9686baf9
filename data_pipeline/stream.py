"""Order + reader + decoder -> batches for training, and the cursor of what was consumed."""

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from data_pipeline.decode import DecodeError, UInt8Array, decode
from data_pipeline.errors import UserError
from data_pipeline.index import LoadedIndex, load_index
from data_pipeline.order import Order, rank_slice
from data_pipeline.reader import ShardReader

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """One rank's part of one global batch.

    Attributes:
        positions: int64 [b], stream positions, consecutive.
        images: uint8 [b, H, W, C], values 0 … 255.
    """

    positions: Int64Array
    images: UInt8Array


class ImageStream:
    """Pictures of a data set in the order of `order.Order`, for ever, as this rank's batches.

    Global batch number i holds the positions [position + i*global_batch, position + (i+1)*global_batch);
    the rank gets its `rank_slice` of it. What comes is a function of (index, seed, window_shards, position)
    alone: neither threads, prefetching nor the number of ranks change it. Threads read and decode ahead,
    at most `prefetch_batches` batches, from the first `next()` on; their errors are raised where the
    batch would have come.

    Args:
        url: The data set.
        split: "train" or "val".
        seed: Seed of the order.
        global_batch: Pictures of one batch over all ranks.
        rank: This process's number.
        world: Number of processes.
        position: First stream position to deliver.
        window_shards: See `Order`.
        channels: Wanted channels, 1 or 3; must be those of the data set.
        image_size: Wanted side in pixels; must be that of the data set.
        prefetch_batches: Batches to prepare ahead.
        threads: Threads that prepare them.

    Raises:
        UserError: No data set, no such split, an empty split, or another size or number of channels.
    """

    def __init__(
        self,
        url: str,
        *,
        split: str = "train",
        seed: int,
        global_batch: int,
        rank: int = 0,
        world: int = 1,
        position: int = 0,
        window_shards: int = 16,
        channels: int,
        image_size: int,
        prefetch_batches: int = 4,
        threads: int = 2,
    ) -> None:
        if global_batch < 1:
            raise UserError(f"global batch: {global_batch} is not a positive number of images")
        assert prefetch_batches >= 1
        assert threads >= 1
        assert position >= 0
        self._decoder = _MemberDecoder(load_index(url), split, channels, image_size)
        loaded = self._decoder.loaded
        self.index_sha = loaded.sha256
        """SHA-256 of the data set's index.json."""
        self._order = Order([entry.samples for entry in loaded.shards(split)], seed, window_shards)
        self._global_batch, self._slice = global_batch, rank_slice(global_batch, rank, world)
        self._next_to_submit = position
        self.position = position
        """First position of the next global batch to be delivered: the cursor of what was consumed."""
        self.wait_seconds = 0.0
        """Seconds the consumer has waited for batches so far."""
        self._prefetch_batches = prefetch_batches
        self._pending: deque[Future[Batch]] = deque()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="image-stream")
        self._closed = False

    @property
    def epoch_size(self) -> int:
        """Pictures in one epoch."""
        return self._order.epoch_size

    @property
    def rereads(self) -> int:
        """Members read again because their checksum was wrong."""
        return self._decoder.reader.rereads

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self._closed:
            raise StopIteration
        while len(self._pending) < self._prefetch_batches:
            self._pending.append(self._pool.submit(self._prepare, self._next_to_submit))
            self._next_to_submit += self._global_batch
        began = time.perf_counter()
        prepared = self._pending.popleft()
        error = prepared.exception()  # waits
        self.wait_seconds += time.perf_counter() - began
        if error is not None:
            self.close()
            raise error
        self.position += self._global_batch
        return prepared.result()

    def _prepare(self, start: int) -> Batch:
        positions = np.arange(start + self._slice.start, start + self._slice.stop, dtype=np.int64)
        shards, members = self._order.locate(positions)
        return Batch(positions, self._decoder.images(shards, members))

    def close(self) -> None:
        """Stop reading ahead and join the threads; iteration ends. May be called again."""
        self._closed = True
        self._pending.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_split(
    url: str, split: str, *, channels: int, image_size: int, batch: int, limit: int | None = None
) -> Iterator[UInt8Array]:
    """Iterate a split once, in the order of the index (for reference statistics).

    Args:
        url: The data set.
        split: "train" or "val".
        channels: Wanted channels; must be those of the data set.
        image_size: Wanted side; must be that of the data set.
        batch: Pictures per array; the last may hold fewer.
        limit: Stop after so many pictures.

    Yields:
        uint8 [b, H, W, C].

    Raises:
        UserError: As `ImageStream`.
    """
    decoder = _MemberDecoder(load_index(url), split, channels, image_size)
    for shards, members in index_order(decoder.loaded, split, batch, limit):
        yield decoder.images(shards, members)


def index_order(
    loaded: LoadedIndex, split: str, batch: int, limit: int | None = None
) -> Iterator[tuple[Int64Array, Int64Array]]:
    """Iterate (shards int64 [b], members int64 [b]) over a split in the order of the index."""
    assert batch >= 1
    starts = np.cumsum([0, *(entry.samples for entry in loaded.shards(split))], dtype=np.int64)
    total = int(starts[-1]) if limit is None else min(limit, int(starts[-1]))
    for first in range(0, total, batch):
        numbers = np.arange(first, min(first + batch, total), dtype=np.int64)
        shards = np.searchsorted(starts, numbers, side="right") - 1
        yield shards, numbers - starts[shards]


class _MemberDecoder:
    """Read, check and decode members of one split into one array."""

    def __init__(self, loaded: LoadedIndex, split: str, channels: int, image_size: int) -> None:
        geometry = loaded.index.geometry
        if (geometry.size, geometry.channels) != (image_size, channels):
            raise UserError(
                f"{loaded.storage.url}: holds pictures of size {geometry.size} with {geometry.channels} "
                f"channel(s), asked for are size {image_size} with {channels}; set image.size and "
                "image.channels of the recipe to the data set's, or build it anew with --size and --channels"
            )
        self.loaded = loaded
        self.reader = ShardReader(loaded, split)
        self._channels, self._size = channels, image_size

    def images(self, shards: Int64Array, members: Int64Array) -> UInt8Array:
        """Return uint8 [b, size, size, channels] of the members asked for."""
        images = np.empty((len(shards), self._size, self._size, self._channels), dtype=np.uint8)
        for i, data in enumerate(self.reader.fetch(shards, members)):
            try:
                pixels = decode(data, self._channels)
            except DecodeError as error:
                raise self._unfit(int(shards[i]), int(members[i]), str(error)) from error
            if pixels.shape != images.shape[1:]:
                height, width, _ = pixels.shape
                reason = f"{width} x {height} pixels, the index says {self._size} x {self._size}"
                raise self._unfit(int(shards[i]), int(members[i]), reason)
            images[i] = pixels
        return images

    def _unfit(self, shard: int, member: int, reason: str) -> UserError:
        key = self.reader.key(shard, member)
        return UserError(
            f"{self.reader.where(shard, member)} (key {key!r}): {reason}; "
            "build the data set anew with `ddpm data build`"
        )
