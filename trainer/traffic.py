"""What a job's reading will ask of the store: planned by the code that plans it in training, and not read.

Only the records (`.idx`) of the first two windows are really read. They say where every picture lies, so the
requests for them are known; the reads of records are part of the traffic as well.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from data_pipeline.block_cache import BLOCK_BYTES
from data_pipeline.index import LoadedIndex
from data_pipeline.mixture import Mixture, source_seed
from data_pipeline.order import Order, rank_slice
from data_pipeline.reader import GAP, LARGEST_RANGE, RangeRequest, ShardReader
from trainer.data import open_indexes
from trainer.recipe import Recipe

Int64Array = npt.NDArray[np.int64]

_WINDOWS: Final = 2
_RANKS: Final = 4
"""So many ranks, evenly chosen, stand for all."""
_SMALLEST_RANGE: Final = 64 << 10
_PIECE: Final = 1 << 16  # stream positions looked at together


class SourcePlan(BaseModel):
    """One data set of the recipe.

    Attributes:
        url: Where it is.
        pictures: In one epoch of it.
        share: Of the stream's pictures.
        shards: Of the split.
        window_pictures: In the first window of its order.
        picture_bytes: Mean size of a coded picture.
        parts: In how many parts a rank reads its pictures of a window, on average: 1 is best.
    """

    model_config = ConfigDict(frozen=True)

    url: str
    pictures: int
    share: float
    shards: int
    window_pictures: int
    picture_bytes: float
    parts: float


class DataPlan(BaseModel):
    """What reading takes for each picture that is trained on; means over the first two windows.

    Attributes:
        sources: The data sets.
        pictures: In one epoch of all of them.
        epochs: How often the whole training passes over each picture, on average.
        picture_bytes: Of a coded picture.
        requests: Reads of parts of shards, for one picture.
        bytes: What they bring, for one picture, with what lies between the pictures.
        record_requests: Reads of records in the first epoch, for one picture. Later ones need none while all
            records fit in a rank's memory for them.
        record_bytes: What those bring.
        cached: Whether a node's disk cache stands between; its ranks then read each block once.
        in_flight: Reads of one rank at the same time.
        reads: Reads of the store that planning took: records, beside each data set's index.
    """

    model_config = ConfigDict(frozen=True)

    sources: list[SourcePlan]
    pictures: int
    epochs: float
    picture_bytes: float
    requests: float
    bytes: float
    record_requests: float
    record_bytes: float
    cached: bool
    in_flight: int
    reads: int


@dataclass(frozen=True)
class _Reading:
    """What some ranks read of a source."""

    pictures: int
    wanted: int
    requests: int
    bytes: int
    records: int
    record_bytes: int
    parts: float


def plan_data(recipe: Recipe, ranks: int, ranks_per_node: int) -> DataPlan:
    """Plan the reading of the recipe's data sets.

    Args:
        recipe: What is trained, with data.
        ranks: Processes of the job.
        ranks_per_node: Of one node; they share its disk cache if there is one.

    Raises:
        UserError: A data set cannot be opened.
        StorageFault: Records cannot be read.
    """
    loaded, _ = open_indexes(recipe)
    weights = [recipe.data.weight, *(other.weight for other in recipe.data.also)]
    mixture = Mixture(weights, recipe.seed)
    planners = [_Planner(recipe, each, mixture, number) for number, each in enumerate(loaded)]
    cached = bool(recipe.data.cache_dir)
    some = list(range(ranks_per_node)) if cached else _some(ranks)
    plans, readings = [], []
    for planner in planners:
        reading = planner.read(some, ranks, cached=cached)
        readings.append(reading)
        plans.append(planner.describe(reading))
    shares = [plan.share for plan in plans]

    def mean(per_picture: Sequence[float]) -> float:
        return sum(share * value for share, value in zip(shares, per_picture, strict=True))

    pictures = sum(plan.pictures for plan in plans)
    return DataPlan(
        sources=plans,
        pictures=pictures,
        epochs=recipe.train.images / pictures,
        picture_bytes=mean([plan.picture_bytes for plan in plans]),
        requests=mean([each.requests / each.pictures for each in readings]),
        bytes=mean([each.bytes / each.pictures for each in readings]),
        record_requests=mean([each.records / each.pictures for each in readings]),
        record_bytes=mean([each.record_bytes / each.pictures for each in readings]),
        cached=cached,
        in_flight=recipe.data.requests,
        reads=sum(planner.reads for planner in planners),
    )


class _Planner:
    """Plans the reading of one source.

    Args:
        recipe: What is trained.
        loaded: The data set.
        mixture: Of all sources.
        number: Of this one.
    """

    def __init__(self, recipe: Recipe, loaded: LoadedIndex, mixture: Mixture, number: int) -> None:
        data, self._loaded, self._mixture, self._number = recipe.data, loaded, mixture, number
        self._batch = recipe.batch.total
        self._shards = loaded.shards(data.split)
        seed = source_seed(recipe.seed, number, len(mixture.shares))
        self._order = Order([entry.samples for entry in self._shards], seed, data.window_shards)
        self._reader = ShardReader(loaded, data.split)
        self._share = mixture.shares[number] / sum(mixture.shares)
        # The rest is as `data_pipeline.stream`, `feed` and `readahead` have it; a test compares.
        limit = (data.prefetch_mib << 20) * mixture.shares[number] // sum(mixture.shares)
        self._most_bytes = max(limit // 2, 1)
        self._largest = max(min(LARGEST_RANGE, limit // 4), _SMALLEST_RANGE)
        self._read: set[int] = set()

    @property
    def reads(self) -> int:
        """How many records were read."""
        return len(self._read)

    def describe(self, reading: _Reading) -> SourcePlan:
        """Describe the source."""
        return SourcePlan(
            url=self._loaded.storage.url,
            pictures=self._order.epoch_size,
            share=self._share,
            shards=len(self._shards),
            window_pictures=self._order.window_end(0),
            picture_bytes=reading.wanted / reading.pictures,
            parts=reading.parts,
        )

    def read(self, some: Sequence[int], ranks: int, *, cached: bool) -> _Reading:
        """Plan what some of the job's ranks read; with a cache they are one node's."""
        pictures = wanted = records = record_bytes = parts = windows = 0
        requests: list[RangeRequest] = []
        for rank in some:
            touched: set[int] = set()
            for own in self._windows(rank, ranks):
                shards, members = self._order.locate(own)
                touched.update(np.unique(shards).tolist())
                sizes = self._reader.sizes(shards, members)
                pictures, wanted = pictures + len(own), wanted + int(sizes.sum())
                cuts = _cuts(sizes, self._most_bytes)
                windows, parts = windows + 1, parts + len(cuts)
                for part in cuts:
                    requests += self._reader.plan(shards[part], members[part], self._largest, GAP)
            self._read |= touched
            records += len(touched)
            record_bytes += sum(self._shards[shard].idx_bytes for shard in touched)
        count, size = self._blocks(requests) if cached else _ranges(requests)
        return _Reading(pictures, wanted, count, size, records, record_bytes, parts / windows)

    def _windows(self, rank: int, ranks: int) -> Iterator[Int64Array]:
        """A rank's positions in the source's own order, int64 [m], of the first windows that it meets."""
        share = rank_slice(self._batch, rank, ranks)
        own = np.arange(share.start, share.stop, dtype=np.int64)
        batches = np.arange(max(1, _PIECE // len(own)), dtype=np.int64) * self._batch
        found, start = np.empty(0, dtype=np.int64), 0
        end = windows = 0
        while windows < _WINDOWS:
            end = self._order.window_end(end)
            while not len(found) or found[-1] < end:
                sources, within = self._mixture.split((start + batches[:, None] + own).reshape(-1))
                found = np.concatenate([found, within[sources == self._number]])
                start += len(batches) * self._batch
            cut = int(np.searchsorted(found, end))
            if cut:
                windows += 1
                yield found[:cut]
            found = found[cut:]

    def _blocks(self, requests: Sequence[RangeRequest]) -> tuple[int, int]:
        """Number and bytes of the cache's blocks that these lie in, each once."""
        blocks = {
            (request.shard, block)
            for request in requests
            for block in range(request.start // BLOCK_BYTES, -(-request.stop // BLOCK_BYTES))
        }
        ends = (self._shards[shard].bytes - block * BLOCK_BYTES for shard, block in blocks)
        size = sum(min(BLOCK_BYTES, end) for end in ends)
        return len(blocks), size


def _ranges(requests: Sequence[RangeRequest]) -> tuple[int, int]:
    return len(requests), sum(request.stop - request.start for request in requests)


def _some(ranks: int) -> list[int]:
    """A few ranks, evenly chosen."""
    return sorted(set(np.linspace(0, ranks - 1, min(ranks, _RANKS)).astype(int).tolist()))


def _cuts(sizes: Int64Array, most_bytes: int) -> list[slice]:
    """Divide members of these bytes into parts of equal bytes, at most so many each."""
    stops = np.cumsum(sizes)
    parts = -(-int(stops[-1]) // most_bytes)
    bounds = np.searchsorted(stops, stops[-1] * np.arange(1, parts) // parts, side="right")
    edges = [0, *np.unique(bounds[(bounds > 0) & (bounds < len(stops))]).tolist(), len(sizes)]
    return [slice(start, stop) for start, stop in itertools.pairwise(edges)]
