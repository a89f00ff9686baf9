"""One data set's part of a stream: what of it this rank will want, in segments worth reading together."""

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor

import numpy as np
import numpy.typing as npt

from data_pipeline.index import LoadedIndex
from data_pipeline.order import Order
from data_pipeline.readahead import ReadAhead, Segment
from data_pipeline.reader import Payload, ShardReader
from data_pipeline.substitutes import Substitution, Substitutions

log = logging.getLogger(__name__)
Int64Array = npt.NDArray[np.int64]
Wanted = tuple[Int64Array, Int64Array]
"""Positions of the stream, and of this source's own order at each of them; both increasing."""


class Feed:
    """Plan and mend the reading of one source.

    Args:
        loaded: The data set.
        split: "train" or "val".
        order: Order of the split.
        reader: Reads the split.
        number: Of the source among those of the stream.
        substitutions: What stands in for damaged members; None: they end the stream.
        pool: Runs requests.
    """

    def __init__(
        self,
        loaded: LoadedIndex,
        split: str,
        order: Order,
        reader: ShardReader,
        number: int,
        substitutions: Substitutions | None,
        pool: Executor,
    ) -> None:
        self._loaded, self._order, self._reader = loaded, order, reader
        self._number, self._substitutions, self._pool = number, substitutions, pool
        self._samples = np.array([entry.samples for entry in loaded.shards(split)], dtype=np.int64)

    def read_ahead(self, wanted: Iterator[Wanted], first: int, limit: int) -> ReadAhead:
        """Start reading.

        Args:
            wanted: All this rank will want of this source, in pieces of any size, for ever.
            first: Members of the first batch, which is read before anything else.
            limit: Most bytes to hold.
        """
        segments = self._segments(wanted, first, limit // 2)
        name = f"image-stream-plan-{self._number}"
        return ReadAhead(
            segments, self._reader, self._mend, first=first, limit=limit, pool=self._pool, name=name
        )

    def _segments(self, wanted: Iterator[Wanted], first: int, most_bytes: int) -> Iterator[Segment]:
        """Divide what is wanted at the windows' ends, and windows into equal parts of at most `most_bytes`.

        The members of a window are spread evenly over its shards. So the larger the part of a window that is
        read at once, the closer its members lie to each other, up to reading the shards from end to end.
        """
        warned = False
        for positions, own in _by_window(wanted, self._order.window_end):
            shards, members = self._order.locate(own)
            self._obey(positions, shards, members)
            # In parallel: each is a request of its own.
            list(self._pool.map(self._reader.records, np.unique(shards).tolist()))
            sizes = self._reader.sizes(shards, members)
            cuts = _cuts(sizes, first, most_bytes)
            first -= cuts[1] if first else 0
            if sizes.sum() > most_bytes and not warned:
                warned = True
                log.warning(
                    "%s: this rank's part of a window takes %.0f MiB, of which %.0f MiB may be read at once: "
                    "%d parts make more and smaller requests; raise data.prefetch_bytes, lower "
                    "data.window_shards, or set data.cache_dir",
                    self._loaded.storage.url,
                    sizes.sum() / 2**20,
                    most_bytes / 2**20,
                    -(-int(sizes.sum()) // most_bytes),
                )
            for start, stop in itertools.pairwise(cuts):
                yield Segment(positions[start:stop], shards[start:stop], members[start:stop])

    def _obey(self, positions: Int64Array, shards: Int64Array, members: Int64Array) -> None:
        """Put in what was published for some of the positions, and decide for members known to be damaged."""
        if self._substitutions is None:
            return
        for position in self._substitutions.positions(self._number).tolist():
            place = int(np.searchsorted(positions, position))
            if place < len(positions) and positions[place] == position:
                by = self._substitutions.published(position, self._number)
                shards[place], members[place] = by.by_shard, by.by_member
        for shard, member in self._substitutions.damaged(self._number):
            for place in np.flatnonzero((shards == shard) & (members == member)).tolist():
                by = self._decide(self._substitutions, int(positions[place]), shard, member)
                shards[place], members[place] = by.by_shard, by.by_member

    def _mend(self, position: int, shard: int, member: int) -> Payload:
        """Return what comes in place of a member that is damaged in the store."""
        if self._substitutions is None:
            raise self._reader.damaged(shard, member)
        by = self._decide(self._substitutions, position, shard, member)
        payload = self._payload(by.by_shard, by.by_member)
        if payload is None:
            raise self._reader.damaged(by.by_shard, by.by_member)
        return payload

    def _decide(self, substitutions: Substitutions, position: int, shard: int, member: int) -> Substitution:
        return substitutions.decide(
            position,
            self._number,
            (shard, member),
            self._samples,
            self._loaded.sha256,
            lambda *candidate: self._payload(*candidate) is not None,
        )

    def _payload(self, shard: int, member: int) -> Payload | None:
        (request,) = self._reader.plan(np.array([shard]), np.array([member]))
        (payload,) = self._reader.read(request)
        return payload


def _by_window(wanted: Iterator[Wanted], window_end: Callable[[int], int]) -> Iterator[Wanted]:
    """Put pieces together and divide them anew, one piece for each window of the source's order."""
    positions = own = np.empty(0, dtype=np.int64)
    while True:
        while not len(own):
            positions, own = next(wanted)
        end = window_end(int(own[0]))
        pieces = [(positions, own)]
        while pieces[-1][1][-1] < end:
            piece = next(wanted)
            if len(piece[1]):
                pieces.append(piece)
        positions, own = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
        cut = int(np.searchsorted(own, end))
        yield positions[:cut], own[:cut]
        positions, own = positions[cut:], own[cut:]


def _cuts(sizes: Int64Array, first: int, most_bytes: int) -> Sequence[int]:
    """Return where to cut members into segments: first and last of them included.

    Args:
        sizes: int64 [m], bytes of each, m > 0.
        first: Members of the first segment, whatever their bytes; 0: no matter.
        most_bytes: Most bytes of a segment of more than one member.
    """
    start = min(first, len(sizes))
    cuts = [0, start] if start else [0]
    if start == len(sizes):
        return cuts
    stops = np.cumsum(sizes[start:])
    parts = -(-int(stops[-1]) // max(most_bytes, 1))
    bounds = np.searchsorted(stops, stops[-1] * np.arange(1, parts) // parts, side="right")
    inner = np.unique(bounds[(bounds > 0) & (bounds < len(stops))])
    return [*cuts, *(start + inner).tolist(), len(sizes)]
