import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.errors import StorageFault, UserError
from data_pipeline.index import load_index, load_records
from data_pipeline.reader import ByteBoundedCache, ShardReader, coalesce
from data_pipeline.storage import Storage


class FaultyStorage(Storage):
    """The real storage, of whose answers about shards the first `faults` have every byte turned, or one."""

    def __init__(self, url: str, faults: int, only_byte: int | None = None) -> None:
        super().__init__(url)
        self.faults, self.only_byte, self.injected, self.reads = faults, only_byte, 0, 0

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        return self._maybe_flip(path, super().read_range(path, start, stop))

    def _maybe_flip(self, path: str, data: bytes) -> bytes:
        if not path.endswith(".tar"):
            return data
        self.reads += 1
        if self.injected >= self.faults:
            return data
        self.injected += 1
        return bytes(byte ^ 0x10 if self.only_byte in (None, i) else byte for i, byte in enumerate(data))


def everything(url: str) -> tuple[np.ndarray, np.ndarray]:
    entries = load_index(url).shards("train")
    shards = np.repeat(np.arange(len(entries)), [entry.samples for entry in entries])
    members = np.concatenate([np.arange(entry.samples) for entry in entries])
    shuffled = np.random.default_rng(0).permutation(len(shards))
    return shards[shuffled], members[shuffled]


def test_ranges_and_whole_shards_give_the_same(digits_url: str) -> None:
    shards, members = everything(digits_url)
    loaded = load_index(digits_url)
    whole = ShardReader(loaded, "train").fetch(shards, members)
    reader = ShardReader(loaded, "train")
    single = [reader.fetch(shards[i : i + 1], members[i : i + 1])[0] for i in range(len(shards))]
    assert whole == single
    assert reader.counts.requests == len(shards)
    for s, m, data in list(zip(shards.tolist(), members.tolist(), whole, strict=True))[:100]:
        record = load_records(loaded, loaded.shards("train")[s])[m]
        tar = (Path(digits_url) / loaded.shards("train")[s].name).read_bytes()
        assert data == tar[record["offset"] : record["offset"] + record["size"]]


def test_passing_damage_is_read_again_and_counted(digits_url: str) -> None:
    loaded = load_index(digits_url)
    storage = FaultyStorage(digits_url, faults=2)
    reader = ShardReader(replace(loaded, storage=storage), "train")
    one = np.array([1]), np.array([7])
    assert reader.fetch(*one) == ShardReader(loaded, "train").fetch(*one)
    assert storage.injected == 2
    assert reader.counts.rereads == 2
    assert reader.counts.requests == storage.reads == 3


def test_of_a_damaged_answer_only_the_damaged_members_are_read_again(digits_url: str) -> None:
    loaded = load_index(digits_url)
    storage = FaultyStorage(digits_url, faults=1, only_byte=40)
    reader = ShardReader(replace(loaded, storage=storage), "train")
    many = np.zeros(50, dtype=np.int64), np.arange(50)
    assert reader.fetch(*many) == ShardReader(loaded, "train").fetch(*many)
    assert storage.injected == 1
    assert reader.counts.rereads == 1
    assert reader.counts.requests == 2


def test_lasting_damage_names_shard_and_member(damageable_url: Path) -> None:
    loaded = load_index(str(damageable_url))
    entry = loaded.shards("train")[2]
    record = load_records(loaded, entry)[5]
    file = damageable_url / entry.name
    data = bytearray(file.read_bytes())
    data[int(record["offset"]) + 20] ^= 1
    file.write_bytes(data)
    reader = ShardReader(loaded, "train")
    with pytest.raises(StorageFault, match=rf"{entry.name} member 5: checksum wrong in 5 independent reads"):
        reader.fetch(np.array([2, 2]), np.array([4, 5]))
    assert reader.counts.rereads == 4
    assert reader.fetch(np.array([2]), np.array([4]))


def test_missing_and_shortened_shards_are_named(damageable_url: Path) -> None:
    loaded = load_index(str(damageable_url))
    first, second, third = loaded.shards("train")[:3]
    (damageable_url / first.name).unlink()
    (damageable_url / second.name).write_bytes((damageable_url / second.name).read_bytes()[:2000])
    (damageable_url / third.idx_name).write_bytes(b"\0" * third.idx_bytes)
    reader = ShardReader(loaded, "train")
    for shard, message in (
        (0, f"{first.name}: missing"),
        (1, f"{second.name}: 2000 bytes, too few to read up to byte"),
        (2, rf"{third.idx_name}: size or SHA-256 differ"),
    ):
        with pytest.raises(StorageFault, match=message):
            reader.fetch(np.array([shard]), np.array([9]))
    with pytest.raises(UserError, match="no split 'test'; it has train, val"):
        ShardReader(loaded, "test")


def test_key_is_that_of_the_tar(digits_url: str) -> None:
    reader = ShardReader(load_index(digits_url), "train")
    keys = [reader.key(0, member) for member in range(3)]
    assert keys == sorted(keys)
    assert all(len(key) == 9 and key.isdigit() for key in keys)


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 10**5)), max_size=40), st.randoms())
def test_coalescing_covers_every_range_once(pieces: list[tuple[int, int]], random: Random) -> None:
    ranges, place = [], 0
    for gap, size in pieces:
        ranges.append((place + gap, place + gap + size))
        place += gap + size
    random.shuffle(ranges)
    starts, stops = np.array(ranges, dtype=np.int64).reshape(-1, 2).T
    groups = coalesce(starts, stops, largest=300_000)
    assert sorted(place for group in groups for place in group.tolist()) == list(range(len(ranges)))
    spans = [(int(starts[group].min()), int(stops[group].max())) for group in groups]
    assert spans == sorted(spans)
    for group, (first, last) in zip(groups, spans, strict=True):
        assert starts[group].tolist() == sorted(starts[group].tolist())
        assert last - first <= 300_000
        assert (starts[group][1:] - stops[group][:-1] <= 64 << 10).all()


def test_coalescing_joins_neighbours_only() -> None:
    starts = np.array([200_000, 0, 100, 5_000_000], dtype=np.int64)
    assert [group.tolist() for group in coalesce(starts, starts + 50)] == [[1, 2], [0], [3]]


def test_cache_is_bounded_and_loads_once() -> None:
    cache = ByteBoundedCache[bytes](100, len)
    loads: list[int] = []

    def load(key: int, size: int) -> bytes:
        loads.append(key)
        return bytes(size)

    for key in (1, 2, 1, 3, 1):  # 3 drives out 2, the least recently used
        cache.get(key, partial(load, key, 40))
    assert loads == [1, 2, 3]
    cache.get(2, lambda: load(2, 40))
    assert loads == [1, 2, 3, 2]
    assert len(cache.get(9, lambda: load(9, 500))) == 500  # larger than the limit: still delivered
    cache.get(1, lambda: load(1, 40))
    assert loads == [1, 2, 3, 2, 9, 1]

    together = threading.Barrier(4)

    def ask() -> bytes:
        together.wait()
        return cache.get(7, lambda: load(7, 10))

    with ThreadPoolExecutor(4) as pool:
        found = [future.result() for future in [pool.submit(ask) for _ in range(4)]]
    assert loads.count(7) == 1
    assert all(value is found[0] for value in found)
