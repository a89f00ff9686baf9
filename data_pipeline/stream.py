"""Order + reader + decoder -> batches for training, and the cursor of what was consumed."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from data_pipeline.block_cache import BlockCache
from data_pipeline.buffers import batch_buffers
from data_pipeline.decode import DecodeError, UInt8Array, decode_into
from data_pipeline.documents import canonical_json, sha256_hex
from data_pipeline.errors import UserError
from data_pipeline.feed import Feed, Wanted
from data_pipeline.index import LoadedIndex, load_index
from data_pipeline.mixture import Mixture, source_seed
from data_pipeline.order import Order, rank_slice
from data_pipeline.readahead import ReadAhead
from data_pipeline.reader import ShardReader, label_of
from data_pipeline.split_reader import check_shape, unfit
from data_pipeline.storage import Storage
from data_pipeline.substitutes import Substitutions

Int64Array = npt.NDArray[np.int64]
Mirror = Callable[[Int64Array], npt.NDArray[np.bool_]]
"""Stream positions int64 [b] -> bool [b], which of their pictures to flip left to right."""

NO_LABEL: Final = -1
_CHUNK: Final = 16  # pictures decoded by one task
_PIECE: Final = 4096  # positions planned at a time
_LEAST_AHEAD: Final = 8 << 20
"""Bytes that are read ahead even of a smaller data set."""
_STATE: Final = "stream/1"


class WeightedSource(NamedTuple):
    """One of several data sets that are mixed."""

    url: str | Storage
    weight: float = 1.0


@dataclass(frozen=True)
class Batch:
    """One rank's part of one global batch.

    Attributes:
        positions: int64 [b], stream positions, consecutive.
        images: uint8 [b, H, W, C], values 0 … 255; see `buffers` for its memory.
        labels: int64 [b], class numbers, `NO_LABEL` where there is none; empty if labels were not asked for.
    """

    positions: Int64Array
    images: UInt8Array
    labels: Int64Array


class StreamCounts(NamedTuple):
    """What a stream's reading took so far.

    Attributes:
        requests: Successful reads of parts of shards, from the storage.
        bytes: What they brought.
        retries: Operations on the storage that failed and were repeated.
        hedges: Reads asked for a second time because the first answer took far longer than usual.
        rereads: Members read again because their checksum was wrong.
        substitutions: Pictures delivered in place of damaged ones.
    """

    requests: int
    bytes: int
    retries: int
    hedges: int
    rereads: int
    substitutions: int


class _Source:
    """One data set of the stream, and what of it is being read ahead."""

    def __init__(self, loaded: LoadedIndex, order: Order, reader: ShardReader) -> None:
        self.loaded, self.order, self.reader = loaded, order, reader
        self.ahead: ReadAhead | None = None
        self.next_number = 0
        """Number in `ahead` of the first member that no batch has claimed."""


@dataclass(frozen=True)
class _Pending:
    """A batch that is being filled."""

    batch: Batch
    jobs: list[Future[None]]


class _Inline(Executor):
    """Runs what is submitted at once, in the caller's thread."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


class ImageStream:
    """Pictures of data sets in the order of `order.Order`, for ever, as this rank's batches.

    Global batch number i holds the positions [position + i*global_batch, position + (i+1)*global_batch);
    the rank gets its `rank_slice` of it. What comes is a function of (indexes, weights, seed, window_shards,
    position) alone: neither threads, prefetching nor the number of ranks change it. From the first `next()`
    on threads read ahead (at most `prefetch_bytes`) and decode ahead (at most `prefetch_batches`); their
    errors are raised where the batch would have come.

    Iterate it as it is; no `DataLoader` and no worker processes are needed, for decoders release the GIL.
    `state_dict` and `load_state_dict` are those of torchdata's stateful loaders, and fit any number of ranks.

    Args:
        sources: A data set's URL, or several with weights (see `mixture.Mixture`).
        split: "train" or "val".
        seed: Seed of the order, in [0, 2^64).
        global_batch: Pictures of one batch over all ranks.
        rank: This process's number.
        world: Number of processes.
        position: First stream position to deliver.
        window_shards: See `Order`.
        channels: Wanted channels, 1 or 3; must be those of the data sets. Default: theirs.
        image_size: Wanted side in pixels; must be that of the data sets. Default: theirs.
        labels: Read class labels too.
        mirror: Which positions' pictures are flipped; None: none.
        prefetch_batches: Batches to prepare ahead.
        prefetch_bytes: Most bytes of coded pictures to hold; more than twice this rank's part of a window is
            never read ahead.
        threads: Threads that decode; 0: `next()` itself does.
        requests: Reads from the storage at the same time.
        cache: Keeps blocks of shards on this machine's disk, for all its processes.
        substitutions: What stands in for damaged members; None: they end the stream.

    Raises:
        UserError: No data set, no such split, an empty split, another size or number of channels, or
            more damaged members than the substitutions' budget.
    """

    def __init__(
        self,
        sources: str | Storage | Sequence[WeightedSource],
        *,
        split: str = "train",
        seed: int,
        global_batch: int,
        rank: int = 0,
        world: int = 1,
        position: int = 0,
        window_shards: int = 16,
        channels: int | None = None,
        image_size: int | None = None,
        labels: bool = False,
        mirror: Mirror | None = None,
        prefetch_batches: int = 4,
        prefetch_bytes: int = 256 << 20,
        threads: int = 2,
        requests: int = 8,
        cache: BlockCache | None = None,
        substitutions: Substitutions | None = None,
    ) -> None:
        if global_batch < 1:
            raise UserError(f"global batch: {global_batch} is not a positive number of images")
        assert prefetch_batches >= 1
        assert threads >= 0
        assert requests >= 1
        assert position >= 0
        weighted = [WeightedSource(sources)] if isinstance(sources, str | Storage) else list(sources)
        self._mixture = Mixture([source.weight for source in weighted], seed)
        self._sources = [
            _open(source.url, split, source_seed(seed, number, len(weighted)), window_shards, cache, labels)
            for number, source in enumerate(weighted)
        ]
        self._split, self._seed, self._window_shards = split, seed, window_shards
        geometry = self._sources[0].loaded.index.geometry
        for source in self._sources:
            check_shape(source.loaded, channels or geometry.channels, image_size or geometry.size)
        self._buffers = batch_buffers()
        self._shape = (geometry.size, geometry.size, geometry.channels)
        self._labels, self._mirror, self._substitutions = labels, mirror, substitutions
        self._global_batch, self._slice = global_batch, rank_slice(global_batch, rank, world)
        self.position = position
        """First position of the next global batch to be delivered: the cursor of what was consumed."""
        self._next_to_submit = position
        self.wait_seconds = 0.0
        """Seconds the consumer has waited for batches so far."""
        self._prefetch_batches = prefetch_batches if threads else 1
        self._prefetch_bytes, self._threads, self._requests = prefetch_bytes, threads, requests
        self._pending: deque[_Pending] = deque()
        self._pools: list[Executor] = []
        self._closed = False

    @property
    def index_sha(self) -> str:
        """SHA-256 of the data set's index.json; of several, of their list with each one's share."""
        return identity([source.loaded for source in self._sources], self._mixture.shares)

    @property
    def epoch_size(self) -> int:
        """Pictures in one epoch; of several sources, in all of them together."""
        return sum(source.order.epoch_size for source in self._sources)

    @property
    def counts(self) -> StreamCounts:
        """What reading took so far."""
        reads = [source.reader.counts for source in self._sources]
        return StreamCounts(
            requests=sum(read.requests for read in reads),
            bytes=sum(read.bytes for read in reads),
            retries=sum(source.loaded.storage.retries for source in self._sources),
            hedges=sum(source.loaded.storage.hedges for source in self._sources),
            rereads=sum(read.rereads for read in reads),
            substitutions=self._substitutions.made if self._substitutions else 0,
        )

    def _useful_bytes(self, source: _Source) -> int:
        """Most bytes of a source that are worth reading ahead: twice this rank's part of its largest window.

        Without this a small data set would be read for many epochs ahead.
        """
        sizes = sorted((entry.bytes for entry in source.loaded.shards(self._split)), reverse=True)
        window = sum(sizes[: self._window_shards])
        part = len(range(self._global_batch)[self._slice]) / self._global_batch
        return max(int(2 * window * part), _LEAST_AHEAD)

    def state_dict(self) -> dict[str, Any]:
        """Return what continues this stream, on any number of ranks: a cursor, and what it is a cursor of."""
        return {
            "schema": _STATE,
            "position": self.position,
            "index_sha": self.index_sha,
            "split": self._split,
            "seed": self._seed,
            "window_shards": self._window_shards,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where a stream of the same order stood.

        Raises:
            UserError: It was another order: another data set, split, seed or window.
        """
        ours = self.state_dict()
        for key in ("schema", "index_sha", "split", "seed", "window_shards"):
            if state.get(key) != ours[key]:
                raise UserError(
                    f"stream state: {key} is {state.get(key)!r}, this stream's is {ours[key]!r}; "
                    "a position means nothing in another order, so open the stream with the same"
                )
        self._stop()
        self.position = self._next_to_submit = int(state["position"])

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self._closed:
            raise StopIteration
        if not self._pools:
            self._start()
        try:
            while len(self._pending) < self._prefetch_batches:
                self._pending.append(self._submit())
            pending = self._pending.popleft()
            began = time.perf_counter()
            for job in pending.jobs:
                job.result()
            self.wait_seconds += time.perf_counter() - began
        except (ValueError, OSError):
            self.close()
            raise
        for source in self._sources:
            if source.ahead is not None:
                source.ahead.go_on()
        self.position += self._global_batch
        return pending.batch

    def samples(self) -> Iterator[dict[str, Any]]:
        """Iterate single samples as WebDataset's pipelines pass them: a first stage for `wds.DataPipeline`.

        Yields:
            `__key__` (the stream position), `__url__`, `image` uint8 [H, W, C], and `cls` if labels are read.
        """
        for batch in self:
            numbers = self._mixture.split(batch.positions)[0].tolist()
            for place, (position, number) in enumerate(zip(batch.positions.tolist(), numbers, strict=True)):
                sample = {
                    "__key__": f"{position:012d}",
                    "__url__": self._sources[number].loaded.storage.url,
                    "image": batch.images[place],
                }
                yield sample | ({"cls": int(batch.labels[place])} if self._labels else {})

    def close(self) -> None:
        """Stop reading ahead and join the threads; iteration ends. May be called again."""
        self._closed = True
        self._stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> None:
        """Start threads and reading, from `position` on."""
        reads = ThreadPoolExecutor(self._requests, thread_name_prefix="image-stream-read")
        decodes: Executor = _Inline()
        if self._threads:
            decodes = ThreadPoolExecutor(self._threads, thread_name_prefix="image-stream")
        self._pools = [decodes, reads]
        first = self._mixture.split(self._positions(self.position))[0]
        for number, source in enumerate(self._sources):
            if self._slice.start == self._slice.stop:
                continue  # more ranks than images: nothing will ever be wanted
            limit = self._prefetch_bytes * self._mixture.shares[number] // sum(self._mixture.shares)
            limit = min(limit, self._useful_bytes(source))
            feed = Feed(
                source.loaded, self._split, source.order, source.reader, number, self._substitutions, reads
            )
            source.next_number = 0
            source.ahead = feed.read_ahead(self._wanted(number), int((first == number).sum()), limit)

    def _stop(self) -> None:
        for source in self._sources:
            if source.ahead is not None:
                source.ahead.close()
                source.ahead = None
        for pool in self._pools:
            pool.shutdown(wait=True, cancel_futures=True)
        self._pools = []
        self._pending.clear()

    def _positions(self, start: int) -> Int64Array:
        return np.arange(start + self._slice.start, start + self._slice.stop, dtype=np.int64)

    def _wanted(self, number: int) -> Iterator[Wanted]:
        """Iterate this rank's positions that one source serves, with the source's own, from `position` on."""
        start, own = self.position, self._positions(0)
        batches = np.arange(max(1, _PIECE // len(own)), dtype=np.int64) * self._global_batch
        while True:
            positions = (start + batches[:, None] + own).reshape(-1)
            sources, within = self._mixture.split(positions)
            chosen = sources == number
            yield positions[chosen], within[chosen]
            start += len(batches) * self._global_batch

    def _submit(self) -> _Pending:
        """Let the next batch be filled."""
        positions = self._positions(self._next_to_submit)
        self._next_to_submit += self._global_batch
        images = self._buffers.array((len(positions), *self._shape))
        labels = np.full(len(positions) if self._labels else 0, NO_LABEL, dtype=np.int64)
        batch = Batch(positions, images, labels)
        mirrored = np.zeros(len(positions), bool) if self._mirror is None else self._mirror(positions)
        sources, within = self._mixture.split(positions)
        jobs = []
        for number, source in enumerate(self._sources):
            places = np.flatnonzero(sources == number)
            for start in range(0, len(places), _CHUNK):
                chunk = places[start : start + _CHUNK]
                first = source.next_number + start
                job = self._pools[0].submit(
                    self._fill, source, first, chunk, within[chunk], mirrored[chunk], batch
                )
                jobs.append(job)
            source.next_number += len(places)
        return _Pending(batch, jobs)

    def _fill(
        self,
        source: _Source,
        first: int,
        places: Int64Array,
        within: Int64Array,
        mirrored: npt.NDArray[np.bool_],
        batch: Batch,
    ) -> None:
        """Decode some of a source's members, from number `first` on, to their places in the batch."""
        assert source.ahead is not None
        payloads = source.ahead.take(first, len(places))
        for i, (place, payload) in enumerate(zip(places.tolist(), payloads, strict=True)):
            try:
                decode_into(payload.picture, batch.images[place], mirrored=bool(mirrored[i]))
            except DecodeError as error:
                shards, members = source.order.locate(within[i : i + 1])
                raise unfit(source.reader, int(shards[0]), int(members[0]), error) from error
            if self._labels:
                label = label_of(payload.meta.tobytes())
                batch.labels[place] = NO_LABEL if label is None else label


def identity(loaded: Sequence[LoadedIndex], shares: Sequence[int]) -> str:
    """Return the hash that stands for what a stream reads: of one data set, that of its index.json.

    Args:
        loaded: The data sets.
        shares: Of each in the mixture.
    """
    if len(loaded) == 1:
        return loaded[0].sha256
    return sha256_hex(
        canonical_json([[one.sha256, share] for one, share in zip(loaded, shares, strict=True)])
    )


def _open(
    url: str | Storage, split: str, seed: int, window_shards: int, cache: BlockCache | None, labels: bool
) -> _Source:
    loaded = load_index(url)
    order = Order([entry.samples for entry in loaded.shards(split)], seed, window_shards)
    return _Source(loaded, order, ShardReader(loaded, split, cache=cache, with_meta=labels))
