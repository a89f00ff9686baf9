"""Members of shards by number: ranged reads, checked by CRC32C, each byte trusted only after its check.

Small shards are read whole, once, and kept while memory lasts; of large ones only the wanted members
are read, neighbours together. Bytes that fail their check are read again; only what stays wrong
through `TRIES` independent reads counts as damaged in the store.
"""

import logging
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Final, Generic, TypeVar

import google_crc32c
import numpy as np
import numpy.typing as npt

from data_pipeline.errors import StorageFault
from data_pipeline.index import TRIES, LoadedIndex, Records, load_records

log = logging.getLogger(__name__)
V = TypeVar("V")
Int64Array = npt.NDArray[np.int64]

SMALL_SHARD: Final = 8 << 20
"""Shards up to this many bytes are read whole."""
_GAP: Final = 64 << 10  # reading over so many unwanted bytes costs less than another request
_LARGEST_RANGE: Final = 8 << 20


class ByteBoundedCache(Generic[V]):
    """The most recently used values within a limit of bytes; each is loaded once however many threads ask.

    Args:
        limit: Largest sum of sizes; the newest value stays even if it alone is larger.
        size_of: Size of a value in bytes.
    """

    def __init__(self, limit: int, size_of: Callable[[V], int]) -> None:
        self._limit, self._size_of = limit, size_of
        self._values: OrderedDict[int, V] = OrderedDict()
        self._total = 0
        self._lock = threading.Lock()
        self._loading: dict[int, threading.Lock] = {}

    def get(self, key: int, load: Callable[[], V]) -> V:
        """Return the value of `key`, loading it if it is not kept."""
        with self._lock:
            key_lock = self._loading.setdefault(key, threading.Lock())
        with key_lock:
            with self._lock:
                if key in self._values:
                    self._values.move_to_end(key)
                    return self._values[key]
            value = load()
            with self._lock:
                self._values[key] = value
                self._total += self._size_of(value)
                while self._total > self._limit and len(self._values) > 1:
                    _, oldest = self._values.popitem(last=False)
                    self._total -= self._size_of(oldest)
            return value

    def drop(self, key: int) -> None:
        """Forget a value."""
        with self._lock:
            value = self._values.pop(key, None)
            if value is not None:
                self._total -= self._size_of(value)


class ShardReader:
    """Read members of one split's shards. Safe to use from several threads.

    Args:
        loaded: The data set.
        split: "train" or "val".
        cache_bytes: Memory for whole small shards.
        small_shard: Shards up to this size are read whole.

    Raises:
        UserError: No such split.
    """

    def __init__(
        self, loaded: LoadedIndex, split: str, *, cache_bytes: int = 256 << 20, small_shard: int = SMALL_SHARD
    ) -> None:
        self._loaded, self._storage = loaded, loaded.storage
        self._shards = loaded.shards(split)
        self._small_shard = small_shard
        self._whole = ByteBoundedCache[bytes](cache_bytes, len)
        self._records = ByteBoundedCache[Records](64 << 20, lambda records: int(records.nbytes))
        self._counter_lock = threading.Lock()
        self.rereads = 0
        """Members that were read again because their checksum was wrong."""

    def records(self, shard: int) -> Records:
        """Return the records of the shard with that number in the split's list, RECORD [samples]."""
        name = self._shards[shard].name
        return self._records.get(shard, lambda: load_records(self._loaded, name))

    def fetch(self, shards: Int64Array, members: Int64Array) -> list[bytes]:
        """Read the picture bytes of many members.

        Args:
            shards: int64 [B], numbers in the split's list.
            members: int64 [B], numbers within the shard.

        Returns:
            B picture files in the order asked for, every one of the recorded length and CRC32C.

        Raises:
            StorageFault: A shard is missing or a member stays damaged; names both.
        """
        result = [b""] * len(shards)
        for shard in np.unique(shards).tolist():
            asked = np.flatnonzero(shards == shard)
            wanted = self.records(shard)[members[asked]]
            for place, data in self._read_members(shard, wanted):
                request = int(asked[place])
                record = wanted[place]
                if not _is_sound(data, record):
                    data = self._read_again(shard, int(members[request]), record)
                result[request] = data
        return result

    def key(self, shard: int, member: int) -> str:
        """Return a member's key (its name in the tar without the extension)."""
        start = int(self.records(shard)[member]["offset"]) - tarfile.BLOCKSIZE
        header = self._read_range(shard, start, start + tarfile.BLOCKSIZE)
        try:
            name = tarfile.TarInfo.frombuf(header, "utf-8", "replace").name
        except tarfile.HeaderError as error:
            raise StorageFault(f"{self.where(shard, member)}: its tar header is damaged ({error})") from error
        folder, slash, base = name.rpartition("/")
        return folder + slash + base.partition(".")[0]

    def where(self, shard: int, member: int) -> str:
        """Name a member for a message: URL of the shard and member number."""
        return f"{self._storage.url}/{self._shards[shard].name} member {member}"

    def _read_members(self, shard: int, wanted: Records) -> Iterator[tuple[int, bytes]]:
        """Yield (place in `wanted`, unchecked bytes)."""
        starts = wanted["offset"].astype(np.int64)
        stops = starts + wanted["size"].astype(np.int64)
        if self._shards[shard].bytes <= self._small_shard:
            whole = self._whole.get(shard, lambda: self._read_whole(shard))
            for place in range(len(wanted)):
                yield place, whole[starts[place] : stops[place]]
            return
        for group in coalesce(starts, stops):
            first, last = int(starts[group[0]]), int(max(stops[place] for place in group))
            data = self._read_range(shard, first, last)
            for place in group:
                yield place, data[starts[place] - first : stops[place] - first]

    def _read_whole(self, shard: int) -> bytes:
        entry = self._shards[shard]
        for _ in range(TRIES):
            try:
                data = self._storage.read(entry.name)
            except FileNotFoundError as error:
                raise self._missing(shard) from error
            if len(data) == entry.bytes:
                return data
        raise StorageFault(
            f"{self._storage.url}/{entry.name}: {len(data)} bytes, the index says {entry.bytes}"
        )

    def _read_range(self, shard: int, start: int, stop: int) -> bytes:
        try:
            return self._storage.read_range(self._shards[shard].name, start, stop)
        except FileNotFoundError as error:
            raise self._missing(shard) from error

    def _read_again(self, shard: int, member: int, record: np.void) -> bytes:
        """Read one member whose bytes failed their check, at most `TRIES` times in all."""
        where = self.where(shard, member)
        self._whole.drop(shard)
        start = int(record["offset"])
        for _ in range(TRIES - 1):
            with self._counter_lock:
                self.rereads += 1
            log.warning("%s: checksum wrong, reading it again", where)
            data = self._read_range(shard, start, start + int(record["size"]))
            if _is_sound(data, record):
                return data
        raise StorageFault(
            f"{where}: checksum wrong in {TRIES} independent reads, so it is damaged in the store; "
            "see `ddpm data verify` and build the data set anew"
        )

    def _missing(self, shard: int) -> StorageFault:
        return StorageFault(
            f"{self._storage.url}/{self._shards[shard].name}: missing though the index lists it; "
            "build the data set anew"
        )


def coalesce(starts: Int64Array, stops: Int64Array) -> list[list[int]]:
    """Group byte ranges that are worth one request together.

    Args:
        starts: int64 [B], first byte of each range.
        stops: int64 [B], byte after the last.

    Returns:
        Lists of places in the input, each sorted by start; every place occurs once.
    """
    groups: list[list[int]] = []
    first = last = 0
    for place in np.argsort(starts, kind="stable").tolist():
        start, stop = int(starts[place]), int(stops[place])
        if groups and start - last <= _GAP and max(stop, last) - first <= _LARGEST_RANGE:
            groups[-1].append(place)
            last = max(last, stop)
        else:
            groups.append([place])
            first, last = start, stop
    return groups


def _is_sound(data: bytes, record: np.void) -> bool:
    return len(data) == int(record["size"]) and google_crc32c.value(data) == int(record["crc32c"])
