"""Which sample goes into which shard: decided in the order of the source, by sizes alone. Pure.

A shard is full when the next sample would make its tar larger than `shard_bytes`. The shards of both splits
share one numbering, given in the order of their first samples' item numbers, so that it does not depend
on who prepared what, nor on where a killed build went on.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from data_pipeline.build.prepare import SPLITS, Prepared, Samples
from data_pipeline.build.tar_members import BLOCK, capacity
from data_pipeline.index import RECORD, Records


@dataclass(frozen=True)
class Piece:
    """Members of one run that stand together in a shard.

    Attributes:
        run: Number of the run's first item.
        start: Their first byte in the run's file.
        stop: The byte after their last one.
    """

    run: int
    start: int
    stop: int


@dataclass(frozen=True)
class PackedShard:
    """A full shard, not yet written.

    Attributes:
        number: In its name.
        split: "train" or "val".
        ordinal: Among the shards of its split.
        first: Number of its first item.
        last: Number of its last item.
        pieces: What it consists of, in order.
        records: RECORD [samples].
        kept: Samples that hold the source's own bytes.
    """

    number: int
    split: str
    ordinal: int
    first: int
    last: int
    pieces: tuple[Piece, ...]
    records: Records
    kept: int

    @property
    def size(self) -> int:
        """Bytes of its members, without the end of the tar."""
        return sum(piece.stop - piece.start for piece in self.pieces)


@dataclass
class _Open:
    """A shard that is being filled."""

    number: int
    size: int = 0
    pieces: list[Piece] = field(default_factory=list)
    samples: list[Samples] = field(default_factory=list)

    def add(self, run: int, start: int, samples: Samples) -> None:
        length = int(samples["length"].sum(dtype=np.int64))
        self.pieces.append(Piece(run, start, start + length))
        self.samples.append(samples)
        self.size += length

    def packed(self, split: str, ordinal: int) -> PackedShard:
        samples = np.concatenate(self.samples)
        first, last = int(samples["item"][0]), int(samples["item"][-1])
        records, kept = _records(samples), int(samples["kept"].sum())
        return PackedShard(self.number, split, ordinal, first, last, tuple(self.pieces), records, kept)


class Packer:
    """Fills shards with prepared runs, given in order.

    Args:
        shard_bytes: Largest size of a shard's tar, unless a single sample is larger.
        finished: Of the shards that an earlier build finished: number of the first item, by split in order.
    """

    def __init__(self, shard_bytes: int, finished: Mapping[str, Sequence[int]]) -> None:
        self._capacity = capacity(shard_bytes)
        self._ordinals = {split: len(finished[split]) for split in SPLITS}
        self._earlier = sorted(item for firsts in finished.values() for item in firsts)
        self._begun = 0
        self._open: dict[str, _Open] = {}

    def add(self, run: Prepared) -> list[PackedShard]:
        """Take in the next run; return the shards that it filled.

        Its samples must be those that the finished shards do not hold.
        """
        # In the order of the items, whatever their split: that is the order of the numbers.
        beginnings = sorted(
            (int(run.samples[split]["item"][place]), split, place)
            for split in SPLITS
            for place in self._beginnings(split, run.samples[split])
        )
        numbers = {
            (split, place): int(np.searchsorted(self._earlier, item)) + self._begun + rank
            for rank, (item, split, place) in enumerate(beginnings)
        }
        self._begun += len(beginnings)
        filled = []
        for split in SPLITS:
            samples = run.samples[split]
            starts = np.concatenate([[0], np.cumsum(samples["length"], dtype=np.int64)]).tolist()
            cuts = [place for whose, place in numbers if whose == split]
            for first, stop in _stretches(cuts, len(samples)):
                if (split, first) in numbers:
                    filled += self._close(split)
                    self._open[split] = _Open(numbers[split, first])
                self._open[split].add(run.first, starts[first], samples[first:stop])
        return filled

    def finish(self) -> list[PackedShard]:
        """Return the shards that are not full, as there is nothing more to come."""
        return [shard for split in SPLITS for shard in self._close(split)]

    def _beginnings(self, split: str, samples: Samples) -> Iterator[int]:
        """Where in these samples new shards begin."""
        is_open = self._open.get(split)
        size = None if is_open is None else is_open.size
        for place, length in enumerate(samples["length"].tolist()):
            if size is None or size + length > self._capacity:
                yield place
                size = 0
            size += length

    def _close(self, split: str) -> list[PackedShard]:
        shard = self._open.pop(split, None)
        if shard is None:
            return []
        self._ordinals[split] += 1
        return [shard.packed(split, self._ordinals[split] - 1)]


def _stretches(cuts: Iterable[int], length: int) -> Iterator[tuple[int, int]]:
    """Divide {0 … length-1} before each of the cuts; nothing into nothing."""
    yield from itertools.pairwise(sorted({0, *cuts, length}))


def _records(samples: Samples) -> Records:
    """Where the members of a shard's samples lie in its tar."""
    starts = np.concatenate([[0], np.cumsum(samples["length"], dtype=np.uint64)[:-1]]).astype(np.uint64)
    records = np.zeros(len(samples), dtype=RECORD)
    records["offset"] = starts + BLOCK
    for name in ("size", "crc32c", "meta_size", "meta_crc32c"):
        records[name] = samples[name]
    # The JSON member ends the sample: its padded content comes last.
    with_meta = samples["meta_size"] > 0
    padded = -(-samples["meta_size"].astype(np.uint64) // BLOCK) * BLOCK
    records["meta_offset"] = np.where(with_meta, starts + samples["length"] - padded, 0)
    return records
