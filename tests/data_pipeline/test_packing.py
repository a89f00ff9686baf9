"""Which sample goes into which shard, against a plain reading of the rule."""

import itertools
from dataclasses import dataclass

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.build.packing import PackedShard, Packer
from data_pipeline.build.prepare import CONTENT, SAMPLE, Prepared

BLOCK, RECORD = 512, 10_240


@dataclass
class Sample:
    """One item: which split, how long its members are, of which how many blocks are meta data."""

    split: str
    blocks: int
    meta_blocks: int

    @property
    def length(self) -> int:
        return BLOCK * (1 + self.blocks + (1 + self.meta_blocks if self.meta_blocks else 0))


samples = st.lists(
    st.builds(Sample, st.sampled_from(["train", "train", "val"]), st.integers(1, 60), st.integers(0, 2)),
    max_size=60,
)


def tar_size(lengths: list[int]) -> int:
    return -(-(sum(lengths) + 2 * BLOCK) // RECORD) * RECORD


def by_the_rule(items: list[Sample], limit: int) -> dict[str, list[list[int]]]:
    """One item at a time: it begins a new shard if the tar would else be too large."""
    shards: dict[str, list[list[int]]] = {"train": [], "val": []}
    for number, item in enumerate(items):
        done = shards[item.split]
        if not done or tar_size([items[i].length for i in done[-1]] + [item.length]) > limit:
            done.append([])
        done[-1].append(number)
    return shards


def run(items: list[Sample], first: int, stop: int, covered: dict[str, int]) -> Prepared:
    rows: dict[str, list[tuple[int, ...]]] = {"train": [], "val": []}
    for number in range(first, stop):
        item = items[number]
        if number >= covered[item.split]:
            size, meta = item.blocks * BLOCK - 7, max(0, item.meta_blocks * BLOCK - 5)
            rows[item.split].append((number, item.length, size, number, meta, 0, number % 2))
    return Prepared(
        first=first,
        count=stop - first,
        samples={split: np.array(found, dtype=SAMPLE) for split, found in rows.items()},
        groups=b"",
        contents=np.zeros(stop - first, CONTENT),
        rejected=[],
    )


def pack(
    items: list[Sample], limit: int, length: int, finished: dict[str, list[PackedShard]], first: int = 0
) -> list[PackedShard]:
    packer = Packer(limit, {split: [shard.first for shard in done] for split, done in finished.items()})
    covered = {split: done[-1].last + 1 if done else 0 for split, done in finished.items()}
    found = []
    for start in range(first, len(items), length):
        found += packer.add(run(items, start, min(start + length, len(items)), covered))
    return found + packer.finish()


@given(samples, st.integers(1, 6), st.integers(1, 20))
@settings(max_examples=150, deadline=None)
def test_packs_as_the_rule_says_however_runs_are_cut(items: list[Sample], limit: int, length: int) -> None:
    limit *= RECORD
    found = pack(items, limit, length, {"train": [], "val": []})
    rule = by_the_rule(items, limit)
    for split, expected in rule.items():
        shards = [shard for shard in found if shard.split == split]
        assert [shard.ordinal for shard in shards] == list(range(len(expected)))
        for shard, numbers in zip(shards, expected, strict=True):
            assert (shard.first, shard.last) == (numbers[0], numbers[-1])
            assert len(shard.records) == len(numbers)
            assert shard.kept == sum(number % 2 for number in numbers)
            lengths = [items[number].length for number in numbers]
            assert shard.size == sum(lengths)
            assert shard.records["crc32c"].tolist() == numbers
            starts = list(itertools.accumulate(lengths[:-1], initial=0))
            assert shard.records["offset"].tolist() == [start + BLOCK for start in starts]
            assert shard.records["meta_offset"].tolist() == [
                start + BLOCK * (2 + items[number].blocks) if items[number].meta_blocks else 0
                for start, number in zip(starts, numbers, strict=True)
            ]
    firsts = sorted(shard.first for shard in found)
    assert {shard.number: shard.first for shard in found} == dict(enumerate(firsts))


@given(samples, st.integers(1, 6), st.integers(1, 20), st.data())
@settings(max_examples=150, deadline=None)
def test_going_on_gives_the_remaining_shards(
    items: list[Sample], limit: int, length: int, data: st.DataObject
) -> None:
    limit *= RECORD
    whole = pack(items, limit, length, {"train": [], "val": []})
    finished = {}
    for split in ("train", "val"):
        shards = [shard for shard in whole if shard.split == split]
        finished[split] = shards[: data.draw(st.integers(0, len(shards)))]
    covered = [done[-1].last + 1 if done else 0 for done in finished.values()]
    rest = pack(items, limit, length, finished, first=min(covered) // length * length)

    def facts(shards: list[PackedShard]) -> list[tuple[int, str, int, int, bytes]]:
        return sorted((s.number, s.split, s.ordinal, s.first, s.records.tobytes()) for s in shards)

    assert facts([*rest, *finished["train"], *finished["val"]]) == facts(whole)
