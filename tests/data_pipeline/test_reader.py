import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.errors import StorageFault, UserError
from data_pipeline.index import load_index, load_records
from data_pipeline.reader import ByteBoundedCache, ShardReader, coalesce
from data_pipeline.storage import Storage


class FaultyStorage(Storage):
    """The real storage, of whose answers the first `faults` have one byte turned in their middle."""

    def __init__(self, url: str, faults: int) -> None:
        super().__init__(url)
        self.faults, self.injected, self.reads = faults, 0, 0

    def read(self, path: str) -> bytes:
        return self._maybe_flip(path, super().read(path))

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        return self._maybe_flip(path, super().read_range(path, start, stop))

    def _maybe_flip(self, path: str, data: bytes) -> bytes:
        if not path.endswith(".tar"):
            return data
        self.reads += 1
        if self.injected >= self.faults:
            return data
        self.injected += 1
        # Turn every byte: wherever the wanted member lies, it is hit.
        return bytes(byte ^ 0x10 for byte in data)


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
    ranged = ShardReader(loaded, "train", small_shard=0).fetch(shards, members)
    tiny_cache = ShardReader(loaded, "train", cache_bytes=1)
    cached = [tiny_cache.fetch(shards[i : i + 50], members[i : i + 50]) for i in range(0, len(shards), 50)]
    assert whole == ranged == [data for part in cached for data in part]
    for s, m, data in list(zip(shards.tolist(), members.tolist(), whole, strict=True))[:100]:
        record = load_records(loaded, loaded.shards("train")[s].name)[m]
        tar = (Path(digits_url) / loaded.shards("train")[s].name).read_bytes()
        assert data == tar[record["offset"] : record["offset"] + record["size"]]


@pytest.mark.parametrize("small_shard", [0, 8 << 20])
def test_passing_damage_is_read_again_and_counted(digits_url: str, small_shard: int) -> None:
    loaded = load_index(digits_url)
    storage = FaultyStorage(digits_url, faults=2)
    reader = ShardReader(replace(loaded, storage=storage), "train", small_shard=small_shard)
    one = np.array([1]), np.array([7])
    assert reader.fetch(*one) == ShardReader(loaded, "train").fetch(*one)
    assert storage.injected == 2
    assert reader.rereads == 2
    assert storage.reads == 3


def test_a_damaged_shard_is_not_kept(digits_url: str) -> None:
    loaded = load_index(digits_url)
    storage = FaultyStorage(digits_url, faults=1)
    reader = ShardReader(replace(loaded, storage=storage), "train")
    reader.fetch(np.array([0]), np.array([0]))
    assert storage.injected == 1
    reader.fetch(np.array([0, 0]), np.array([1, 2]))
    assert reader.rereads == 1, "later members come from a fresh copy"


def test_lasting_damage_names_shard_and_member(damageable_url: Path) -> None:
    loaded = load_index(str(damageable_url))
    entry = loaded.shards("train")[2]
    record = load_records(loaded, entry.name)[5]
    file = damageable_url / entry.name
    data = bytearray(file.read_bytes())
    data[int(record["offset"]) + 20] ^= 1
    file.write_bytes(data)
    for small_shard in (0, 8 << 20):
        reader = ShardReader(loaded, "train", small_shard=small_shard)
        with pytest.raises(
            StorageFault, match=rf"{entry.name} member 5: checksum wrong in 3 independent reads"
        ):
            reader.fetch(np.array([2, 2]), np.array([4, 5]))
        assert reader.rereads == 2
        assert reader.fetch(np.array([2]), np.array([4]))


def test_missing_and_shortened_shards_are_named(damageable_url: Path) -> None:
    loaded = load_index(str(damageable_url))
    first, second, third = loaded.shards("train")[:3]
    (damageable_url / first.name).unlink()
    (damageable_url / second.name).write_bytes((damageable_url / second.name).read_bytes()[:-512])
    (damageable_url / third.idx_name).write_bytes(b"\0" * third.idx_bytes)
    reader = ShardReader(loaded, "train")
    for shard, message in (
        (0, f"{first.name}: missing"),
        (1, f"{second.name}: {second.bytes - 512} bytes, the index says {second.bytes}"),
        (2, rf"{third.idx_name}: size or SHA-256 differ"),
    ):
        with pytest.raises(StorageFault, match=message):
            reader.fetch(np.array([shard]), np.array([0]))
    with pytest.raises(UserError, match="no split 'test'; it has train, val"):
        ShardReader(loaded, "test")


def test_key_is_that_of_the_tar(digits_url: str) -> None:
    reader = ShardReader(load_index(digits_url), "train")
    keys = [reader.key(0, member) for member in range(3)]
    assert keys == sorted(keys)
    assert all(len(key) == 9 and key.isdigit() for key in keys)


@given(st.lists(st.tuples(st.integers(0, 10**8), st.integers(1, 10**5)), max_size=40))
def test_coalescing_covers_every_range_once(ranges: list[tuple[int, int]]) -> None:
    starts = np.array([start for start, _ in ranges], dtype=np.int64)
    stops = np.array([start + size for start, size in ranges], dtype=np.int64)
    groups = coalesce(starts, stops)
    assert sorted(place for group in groups for place in group) == list(range(len(ranges)))
    for group in groups:
        first, last = starts[group].min(), stops[group].max()
        assert starts[group[0]] == first
        assert last - first <= 8 << 20
    spans = [(int(starts[group].min()), int(stops[group].max())) for group in groups]
    assert spans == sorted(spans)


def test_coalescing_joins_neighbours_only() -> None:
    starts = np.array([200_000, 0, 100, 5_000_000], dtype=np.int64)
    assert coalesce(starts, starts + 50) == [[1, 2], [0], [3]]


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
