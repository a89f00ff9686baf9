"""`ddpm data verify`: read every byte of a finished data set and check it against its index.

Each shard is read once, from front to back by ranges, whatever its size: hashed, walked as the tar it is, and
compared with its records, whose pictures are decoded. Beyond that memory grows by 8 bytes a picture, for
finding keys that stand twice (by hash; 32 bytes a picture for a moment at the end).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Final

import google_crc32c
import numpy as np
import numpy.typing as npt
from pydantic import Field

from data_pipeline.build import REJECTED_FILE
from data_pipeline.build.duplicates import DUPLICATES_FILE
from data_pipeline.decode import DecodeError, decode
from data_pipeline.documents import Document
from data_pipeline.errors import StorageFault
from data_pipeline.index import (
    INDEX_FILE,
    TRIES,
    Index,
    LoadedIndex,
    Records,
    ShardEntry,
    load_records,
)
from data_pipeline.progress import Progress
from data_pipeline.sources.pictures import readable
from data_pipeline.storage import Storage
from data_pipeline.tars.samples import Payload, Sample, samples
from data_pipeline.tars.walk import StreamedFile, TarDamage
from data_pipeline.team import Team

_LISTED: Final = 5


class VerifyReport(Document):
    """What `verify` found.

    Attributes:
        url: The data set.
        index_sha256: Of its `index.json`.
        shards: How many the index lists.
        samples: How many the index counts.
        problems: What is wrong, each with its shard and member; empty for a sound data set.
        bytes: Read of the shards.
        notes: What is odd but harms nothing.
    """

    SCHEMA: ClassVar[str] = "data-verify/1"

    url: str
    index_sha256: str
    shards: int
    samples: int
    problems: list[str]
    bytes: int = 0
    notes: list[str] = Field(default_factory=list)


@dataclass
class _Found:
    """What was found in one shard.

    Attributes:
        problems: What is wrong.
        keys: uint64 [members], hashes of the keys; 0 where none was found. Empty for an adopted tar.
        unlisted: Samples of an adopted tar that no record tells of.
        bytes: Read.
    """

    problems: list[str] = field(default_factory=list)
    keys: npt.NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))
    unlisted: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class _Open:
    """Makes what each process holds: the data set."""

    index: Index
    sha256: str
    url: str

    def __call__(self) -> LoadedIndex:
        return LoadedIndex(self.index, self.sha256, Storage(self.url))


@dataclass(frozen=True)
class _VerifyShard:
    entry: ShardEntry

    def __call__(self, loaded: LoadedIndex) -> _Found:
        """Check a shard; wrong bytes are read again, `TRIES` times in all: it may have been the way here."""
        for _ in range(TRIES):
            found, wrong = _verify_shard(loaded, self.entry)
            if not wrong:
                break
        return found


def verify(loaded: LoadedIndex, *, workers: int = 1) -> VerifyReport:
    """Check sizes, SHA-256, every CRC32C, every picture, the tars' structure and the keys.

    Nothing found is raised. Keys of adopted tars must differ within a tar, all others within the data set.

    Args:
        loaded: The data set.
        workers: Processes, each at a shard of its own; with more than 1 a script that calls this needs the
            guard `if __name__ == "__main__"`.
    """
    index = loaded.index
    adopted = index.build is None
    entries = [entry for shards in index.splits.values() for entry in shards]
    total = sum(entry.samples for entry in entries)
    problems: list[str] = []
    every: list[_Found] = []
    done, read = 0, 0
    make = _Open(index, loaded.sha256, loaded.storage.url)
    with Team(make, workers) as team, Progress("verify", total, "img") as progress:
        pending = [team.start(_VerifyShard(entry)) for entry in entries]
        for entry, each in zip(entries, pending, strict=True):
            found = each.result()
            every.append(found)
            problems.extend(f"{entry.name}: {problem}" for problem in found.problems)
            done, read = done + entry.samples, read + found.bytes
            progress.update(done, bytes=f"{read / 1e6:.4g} MB", problems=str(len(problems)))
    unlisted = sum(found.unlisted for found in every)
    if adopted and not problems and unlisted != index.rejected:
        problems.append(
            f"{unlisted} samples of the tars are in no record, the index counts {index.rejected} as rejected"
        )
    problems.extend(_repeated(entries, every))
    return VerifyReport(
        url=loaded.storage.url,
        index_sha256=loaded.sha256,
        shards=len(entries),
        samples=total,
        problems=problems,
        bytes=read,
        notes=list(_notes(loaded)),
    )


def _verify_shard(loaded: LoadedIndex, entry: ShardEntry) -> tuple[_Found, bool]:
    """Read a shard once; tell too whether it has the right size but the wrong bytes."""
    found = _Found()
    try:
        file = StreamedFile(loaded.storage, entry.name)
        try:
            records = load_records(loaded, entry)
        except StorageFault as fault:
            found.problems.append(str(fault))
        else:
            idx_bytes = loaded.storage.size(entry.idx_name)
            if idx_bytes != entry.idx_bytes:
                found.problems.append(
                    f"{entry.idx_name}: {idx_bytes} bytes, the index says {entry.idx_bytes}"
                )
            found.problems.extend(_Comparison(loaded.index, records, found).problems(file))
        sha256 = file.finish()
    except FileNotFoundError:
        return _Found(["missing"]), False
    except StorageFault as fault:
        return _Found([str(fault)]), False
    found.bytes = file.size
    first = []
    if file.size != entry.bytes:
        first.append(f"{file.size} bytes, the index says {entry.bytes}")
    if sha256 != entry.sha256:
        first.append("SHA-256 differs from the index")
    found.problems[:0] = first
    return found, file.size == entry.bytes and sha256 != entry.sha256


class _Comparison:
    """The samples of a tar against its records.

    Args:
        index: Of the data set.
        records: RECORD [members].
        found: Gets keys and counts.
    """

    def __init__(self, index: Index, records: Records, found: _Found) -> None:
        self._geometry, self._adopted = index.geometry, index.build is None
        self._records, self._found = records, found
        self._by_offset = {offset: member for member, offset in enumerate(records["offset"].tolist())}

    def problems(self, file: StreamedFile) -> Iterator[str]:
        """Iterate what is wrong, in the order of the tar."""
        seen = np.zeros(len(self._records), bool)
        keys = np.zeros(len(self._records), np.uint64)
        damaged_from = file.size
        try:
            for sample in samples(file):
                offset = -1 if sample.picture is None else sample.picture.offset
                member = self._by_offset.get(offset)
                if member is not None:
                    seen[member], keys[member] = True, sample.key_hash
                    problem = self._compare(sample, self._records[member])
                    if problem:
                        yield f"member {member}: {problem}"
                elif self._adopted:
                    self._found.unlisted += 1  # if it has been rejected, that is right
                else:
                    why = f" ({sample.problem})" if sample.problem else ""
                    yield f"sample {_shown(sample.key)!r} of the tar is in no record{why}"
        except TarDamage as damage:
            damaged_from = damage.offset
            yield f"the tar is damaged {damage}"
        if not self._adopted:
            self._found.keys = keys
        yield from self._unseen(file, np.flatnonzero(~seen).tolist(), damaged_from)

    def _compare(self, sample: Sample, record: np.void) -> str:
        """Return what is wrong with one member; empty if nothing is."""
        picture = sample.picture
        assert picture is not None
        found, recorded = _place(sample.meta), (int(record["meta_offset"]), int(record["meta_size"]))
        if found != recorded:
            return f"meta data (first byte, size) is {found} in the tar, {recorded} in the record"
        meta = sample.meta.data if sample.meta is not None else b""
        if google_crc32c.value(meta) != int(record["meta_crc32c"]):
            return "meta data has a wrong CRC32C"
        if len(picture.data) != int(record["size"]):
            return f"{len(picture.data)} bytes in the tar, the record says {int(record['size'])}"
        return self._look_at(picture.data, record)

    def _look_at(self, picture: bytes, record: np.void) -> str:
        if google_crc32c.value(picture) != int(record["crc32c"]):
            return "picture has a wrong CRC32C"
        size = self._geometry.size
        try:
            height, width, _ = decode(picture, self._geometry.channels).shape
        except DecodeError as error:
            return str(error)
        if (height, width) != (size, size):
            return f"{width} x {height} pixels, the index says {size} x {size}"
        return ""

    def _unseen(self, file: StreamedFile, members: Sequence[int], damaged_from: int) -> Iterator[str]:
        """Iterate what is wrong with records that no member was found for.

        Those behind the place where the tar's structure is damaged may well be sound: they are read as the
        records tell, which is how training reads them.
        """
        for member in sorted(members, key=lambda member: int(self._records[member]["offset"])):
            record = self._records[member]
            offset, size = int(record["offset"]), int(record["size"])
            if offset + size > file.size:
                problem = f"byte {offset + size} is behind the end of the tar"
            elif offset < damaged_from:
                problem = f"no picture of the tar begins at byte {offset}"
            else:
                problem = self._look_at(file.read_at(offset, size), record)
            if problem:
                yield f"member {member}: {problem}"


def _repeated(entries: Sequence[ShardEntry], every: Sequence[_Found]) -> Iterator[str]:
    """Iterate which shards hold keys that stand in the data set before."""
    starts = np.cumsum([0, *(len(found.keys) for found in every)])
    keys = np.concatenate([np.zeros(0, np.uint64), *(found.keys for found in every)])
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    equal = np.flatnonzero((keys[1:] == keys[:-1]) & (keys[1:] != 0))
    pairs: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for first, second in zip(order[equal].tolist(), order[equal + 1].tolist(), strict=True):
        other, shard = np.searchsorted(starts, (first, second), side="right").tolist()
        pairs.setdefault((shard - 1, other - 1), []).append((second, first))
    for (shard, other), found in sorted(pairs.items()):
        second, first = min(found)
        yield (
            f"{entries[shard].name}: {len(found)} of its keys stand in {entries[other].name} too, such as "
            f"that of member {second - starts[shard]}, there member {first - starts[other]}"
        )


def _notes(loaded: LoadedIndex) -> Iterator[str]:
    index, names = loaded.index, set(loaded.storage.list())
    told = {REJECTED_FILE: index.rejected, DUPLICATES_FILE: index.duplicates}
    unknown = sorted(names - index.files() - {INDEX_FILE, *(name for name, count in told.items() if count)})
    if unknown:
        more = f" and {len(unknown) - _LISTED} more" if len(unknown) > _LISTED else ""
        shown = ", ".join(readable(name.encode("utf-8", "surrogateescape")) for name in unknown[:_LISTED])
        yield f"not of the data set: {shown}{more}"
    for name, count in told.items():
        if count and name not in names:
            yield f"{name} is missing, which listed {count}"


def _place(meta: Payload | None) -> tuple[int, int]:
    """Where a record must say that the meta data is."""
    return (0, 0) if meta is None or not meta.data else (meta.offset, len(meta.data))


def _shown(key: str) -> str:
    return readable(key.encode("utf-8", "surrogateescape"))
