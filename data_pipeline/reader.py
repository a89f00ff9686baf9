"""Members of shards by number: ranged reads, each byte trusted only after its check.

Neighbours are read together by one request. A member whose length or CRC32C is wrong is read again, alone;
only what stays wrong through `MEMBER_TRIES` independent reads counts as damaged in the store.
"""

import json
import logging
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Generic, NamedTuple, TypeVar

import google_crc32c
import numpy as np
import numpy.typing as npt

from data_pipeline.block_cache import BlockCache
from data_pipeline.buffers import Buffers
from data_pipeline.errors import StorageFault
from data_pipeline.index import LoadedIndex, Records, load_records

log = logging.getLogger(__name__)
V = TypeVar("V")
Int64Array = npt.NDArray[np.int64]
UInt8Array = npt.NDArray[np.uint8]

LARGEST_RANGE: Final = 8 << 20
"""Most bytes of one request, unless a single member is larger."""
MEMBER_TRIES: Final = 5
"""Independent reads of a member: if every tenth is damaged on its way, one in 100,000 is so five times."""
MEMBER_OVERHEAD: Final = 1 << 10
"""Bytes that a member in memory takes besides its own, in views and lists; they outweigh a tiny picture."""
GAP: Final = 64 << 10
"""Reading over so many unwanted bytes costs less than another request."""
_DENSE: Final = 0.75  # of what a request brings, from which on it is kept as it is
_RECORD_BYTES: Final = 64 << 20  # memory for records: those of two million samples


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


class Payload(NamedTuple):
    """What one sample holds: the bytes of its picture and of its `key.json` (empty if not asked for), uint8.

    Both are views of what its request brought, which stays in memory as long as one of them.
    """

    picture: UInt8Array
    meta: UInt8Array


@dataclass(frozen=True)
class RangeRequest:
    """Neighbouring members of one shard that are read by one request.

    Attributes:
        shard: Number in the split's list.
        start: First byte.
        stop: Byte after the last.
        places: int64 [m], which of the members that were planned for these are.
        members: int64 [m], their numbers within the shard.
        records: RECORD [m].
        kept: Bytes of what it brings that are kept for its members.
    """

    shard: int
    start: int
    stop: int
    places: Int64Array
    members: Int64Array
    records: Records
    kept: int

    @property
    def held(self) -> int:
        """Bytes of memory that its members take."""
        return self.kept + MEMBER_OVERHEAD * len(self.members)

    @property
    def is_sparse(self) -> bool:
        """True if much of what is read is unwanted: members are then copied out of it."""
        return self.kept < self.stop - self.start


class ReadCounts(NamedTuple):
    """What reading took so far: requests, their bytes, and members read again for their checksum."""

    requests: int
    bytes: int
    rereads: int


class ShardReader:
    """Read members of one split's shards. Safe to use from several threads.

    Args:
        loaded: The data set.
        split: "train" or "val".
        cache: Keeps blocks of shards on this machine's disk.
        with_meta: Read the samples' `key.json` too.

    Raises:
        UserError: No such split.
    """

    def __init__(
        self, loaded: LoadedIndex, split: str, *, cache: BlockCache | None = None, with_meta: bool = False
    ) -> None:
        self._loaded, self._storage = loaded, loaded.storage
        self._shards = loaded.shards(split)
        self._cache, self._with_meta = cache, with_meta
        self._records = ByteBoundedCache[Records](_RECORD_BYTES, lambda records: int(records.nbytes))
        self._buffers = Buffers()
        self._lock = threading.Lock()
        self._counts = ReadCounts(0, 0, 0)

    @property
    def counts(self) -> ReadCounts:
        """What was read so far, without records."""
        return self._counts

    def records(self, shard: int) -> Records:
        """Return the records of the shard with that number in the split's list, RECORD [samples]."""
        return self._records.get(shard, lambda: load_records(self._loaded, self._shards[shard]))

    def extents(self, records: Records) -> tuple[Int64Array, Int64Array]:
        """Return first byte and byte after the last of what is read of each member, int64 [m] each."""
        starts = records["offset"].astype(np.int64)
        stops = starts + records["size"]
        if self._with_meta:
            there = records["meta_size"] > 0
            meta_starts = records["meta_offset"].astype(np.int64)
            starts = np.where(there, np.minimum(starts, meta_starts), starts)
            stops = np.where(there, np.maximum(stops, meta_starts + records["meta_size"]), stops)
        return starts, stops

    def sizes(self, shards: Int64Array, members: Int64Array) -> Int64Array:
        """Return how many bytes each member takes in memory, int64 [B]."""
        sizes = np.empty(len(shards), dtype=np.int64)
        for shard in np.unique(shards).tolist():
            asked = shards == shard
            starts, stops = self.extents(self.records(shard)[members[asked]])
            sizes[asked] = stops - starts
        return sizes

    def plan(
        self, shards: Int64Array, members: Int64Array, largest: int = LARGEST_RANGE, gap: int = GAP
    ) -> list[RangeRequest]:
        """Divide members into requests.

        Args:
            shards: int64 [B], numbers in the split's list.
            members: int64 [B], numbers within the shard.
            largest: Most bytes of a request.
            gap: So many unwanted bytes are read to save a request.

        Returns:
            Requests in which every member occurs once, those of the earliest members first.
        """
        requests = []
        for shard in np.unique(shards).tolist():
            asked = np.flatnonzero(shards == shard)
            records = self.records(shard)[members[asked]]
            starts, stops = self.extents(records)
            for group in coalesce(starts, stops, largest, gap):
                places = asked[group]
                start, stop = int(starts[group[0]]), int(stops[group].max())
                wanted = int((stops[group] - starts[group]).sum())
                kept = wanted if wanted < _DENSE * (stop - start) else stop - start
                requests.append(
                    RangeRequest(shard, start, stop, places, members[places], records[group], kept)
                )
        return sorted(requests, key=lambda request: int(request.places.min()))

    def read(self, request: RangeRequest) -> list[Payload | None]:
        """Read and check the members of one request.

        Returns:
            One for each member, of the recorded lengths and CRC32C; None for what is damaged in the store.

        Raises:
            StorageFault: The shard is missing or shorter than the index says, or the storage fails.
        """
        data = np.frombuffer(self._read_range(request.shard, request.start, request.stop), np.uint8)
        # Kept in memory of our own: what the storage client allocated is free for its next answer at once.
        kept = self._buffers.array((request.kept,))
        begin = 0
        if not request.is_sparse:
            kept[:] = data
        found: list[Payload | None] = []
        for member, record, start, stop in zip(
            request.members.tolist(),
            request.records.tolist(),
            *(edges.tolist() for edges in self.extents(request.records)),
            strict=True,
        ):
            first = start - request.start
            if request.is_sparse:
                kept[begin : begin + stop - start] = data[first : first + stop - start]
                first = begin
                begin += stop - start
            payload = _cut(kept[first : first + stop - start], start, record, self._with_meta)
            if payload is None:
                payload = self._read_again(request.shard, member, record)
            found.append(payload)
        return found

    def fetch(self, shards: Int64Array, members: Int64Array) -> list[bytes]:
        """Read the picture bytes of many members.

        Args:
            shards: int64 [B], numbers in the split's list.
            members: int64 [B], numbers within the shard.

        Returns:
            B picture files in the order asked for.

        Raises:
            StorageFault: A shard is missing or a member stays damaged; names both.
        """
        result = [b""] * len(shards)
        for request in self.plan(shards, members):
            for place, member, payload in zip(
                request.places.tolist(), request.members.tolist(), self.read(request), strict=True
            ):
                if payload is None:
                    raise self.damaged(request.shard, member)
                result[place] = payload.picture.tobytes()
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

    def damaged(self, shard: int, member: int) -> StorageFault:
        """Return the error that says that a member is damaged in the store."""
        return StorageFault(
            f"{self.where(shard, member)}: checksum wrong in {MEMBER_TRIES} independent reads, so it is "
            "damaged in the store; see `ddpm data verify` and build the data set anew"
        )

    def _read_range(self, shard: int, start: int, stop: int) -> bytes:
        entry = self._shards[shard]
        if self._cache is None:
            return self._get(shard, start, stop)
        return self._cache.read(
            entry.sha256, start, stop, entry.bytes, lambda first, last: self._get(shard, first, last)
        )

    def _get(self, shard: int, start: int, stop: int) -> bytes:
        """Read from the storage itself."""
        name = self._shards[shard].name
        try:
            data = self._storage.read_range(name, start, stop)
        except FileNotFoundError as error:
            raise StorageFault(
                f"{self._storage.url}/{name}: missing though the index lists it; build the data set anew"
            ) from error
        self._count(requests=1, bytes_=len(data))
        return data

    def _read_again(self, shard: int, member: int, record: tuple[int, ...]) -> Payload | None:
        """Read one member whose bytes failed their check, at most `MEMBER_TRIES` times in all."""
        (start,), (stop,) = self.extents(self.records(shard)[member : member + 1])
        if self._cache is not None:
            self._cache.drop(self._shards[shard].sha256, int(start), int(stop))
        for _ in range(MEMBER_TRIES - 1):
            self._count(rereads=1)
            log.warning("%s: checksum wrong, reading it again", self.where(shard, member))
            data = self._get(shard, int(start), int(stop))
            payload = _cut(np.frombuffer(data, np.uint8), int(start), record, self._with_meta)
            if payload is not None:
                return payload
        return None

    def _count(self, *, requests: int = 0, bytes_: int = 0, rereads: int = 0) -> None:
        with self._lock:
            had = self._counts
            self._counts = ReadCounts(had.requests + requests, had.bytes + bytes_, had.rereads + rereads)


def coalesce(
    starts: Int64Array, stops: Int64Array, largest: int = LARGEST_RANGE, gap: int = GAP
) -> list[Int64Array]:
    """Group byte ranges that are worth one request together.

    Args:
        starts: int64 [B], first byte of each range.
        stops: int64 [B], byte after the last; ranges do not overlap.
        largest: Most bytes of a group of more than one.
        gap: Ranges further apart than this are not joined.

    Returns:
        int64 arrays of places in the input, each sorted by start; every place occurs once.
    """
    order = np.argsort(starts, kind="stable")
    groups, begin = [], 0
    first, last = starts[order], stops[order]
    # Where the next range lies too far off, a group ends in any case; within these runs, by size.
    runs = [*(np.flatnonzero(first[1:] - last[:-1] > gap) + 1).tolist(), len(order)] if len(order) else []
    for end in runs:
        while begin < end:
            fitting = int(np.searchsorted(last[begin:end], first[begin] + largest, side="right"))
            stop = begin + max(fitting, 1)
            groups.append(order[begin:stop])
            begin = stop
    return groups


def label_of(meta: bytes) -> int | None:
    """Return the class number that a sample's `key.json` tells, if it tells one."""
    try:
        content = json.loads(meta or b"null")
    except ValueError:  # of an adopted tar: JSON by name only
        return None
    label = content.get("label") if isinstance(content, dict) else None
    return label if isinstance(label, int) and not isinstance(label, bool) else None


def _cut(data: UInt8Array, start: int, record: tuple[int, ...], with_meta: bool) -> Payload | None:
    """Cut one member out of bytes of the shard from `start` on; None if length or CRC32C are wrong."""
    offset, size, crc32c, meta_offset, meta_size, meta_crc32c = record
    picture = data[offset - start : offset - start + size]
    if len(picture) != size or google_crc32c.value(picture) != crc32c:
        return None
    if not with_meta or not meta_size:
        return Payload(picture, data[:0])
    meta = data[meta_offset - start : meta_offset - start + meta_size]
    if len(meta) != meta_size or google_crc32c.value(meta) != meta_crc32c:
        return None
    return Payload(picture, meta)
