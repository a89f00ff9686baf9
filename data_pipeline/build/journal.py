"""What a build has done so far, kept at its output so that it can go on after a kill, on any machine.

    unfinished.json                     whose build this is; create-only
    unfinished-items-NNNNNNNNN.json     about a segment of items: hashes and rejections
    unfinished-shard-NNNNNN.json        a shard that lies there complete

A shard's record is written after the records of all segments that its items come from. So what is finished
is a prefix of each split, and whatever is not told here is done again, with the same outcome.
"""

import base64
import logging
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Final, Self, TypeVar

from pydantic import Base64Bytes

from data_pipeline.build.packing import PackedShard
from data_pipeline.build.prepare import CONTENT, HASH_GROUP, SPLITS, Prepared, Rejected
from data_pipeline.documents import Document, sha256_hex
from data_pipeline.errors import UserError
from data_pipeline.index import INDEX_FILE, ShardEntry
from data_pipeline.storage import Storage

log = logging.getLogger(__name__)
D = TypeVar("D", bound=Document)

UNFINISHED_FILE: Final = "unfinished.json"
_ITEMS: Final = "unfinished-items-"
_RECORD: Final = "unfinished-"
_SHARD_RECORD: Final = "unfinished-shard-"
_SHARD: Final = "shard-"
"""Start of the names of all shards."""


class Unfinished(Document):
    """`unfinished.json`: a build is under way here or was broken off.

    Attributes:
        name: Of the data set.
        kind: Of the source.
        plan: Everything that decides the shards' bytes.
        stamp: State of the source's files; see `Survey.stamp`.
    """

    SCHEMA: ClassVar[str] = "unfinished/2"

    name: str
    kind: str
    plan: dict[str, Any]
    stamp: str


class _Record(Document):
    """Something that is done.

    Attributes:
        build: SHA-256 of the `unfinished.json` it belongs to; the journal fills it in.
    """

    build: str = ""


class Segment(_Record):
    """About consecutive items of the source.

    Attributes:
        first: Number of the first one.
        count: How many.
        groups: SHA-256 of each group of `HASH_GROUP` items, end to end.
        contents: CONTENT of every item, end to end.
        rejected: Those left out.
    """

    SCHEMA: ClassVar[str] = "build-items/1"

    first: int
    count: int
    groups: Base64Bytes
    contents: Base64Bytes
    rejected: list[Rejected]

    @classmethod
    def of(cls, runs: Sequence[Prepared]) -> Self:
        """Sum up consecutive runs."""
        return cls(
            first=runs[0].first,
            count=sum(run.count for run in runs),
            groups=base64.b64encode(b"".join(run.groups for run in runs)),
            contents=base64.b64encode(b"".join(run.contents.tobytes() for run in runs)),
            rejected=[row for run in runs for row in run.rejected],
        )

    @property
    def stop(self) -> int:
        """Number of the item after the last one."""
        return self.first + self.count

    def is_sound(self) -> bool:
        """Tell whether the hashes are those of so many items."""
        groups = -(-self.count // HASH_GROUP)
        return (len(self.groups), len(self.contents)) == (32 * groups, CONTENT.itemsize * self.count)


class FinishedShard(_Record):
    """A shard that was written.

    Attributes:
        entry: As in the index.
        split: "train" or "val".
        ordinal: Among the shards of its split.
        first: Number of its first item.
        last: Number of its last item.
        kept: Samples that hold the source's own bytes.
    """

    SCHEMA: ClassVar[str] = "build-shard/1"

    entry: ShardEntry
    split: str
    ordinal: int
    first: int
    last: int
    kept: int

    @classmethod
    def of(cls, shard: PackedShard, entry: ShardEntry) -> Self:
        """Record that a shard was written."""
        return cls(
            entry=entry,
            split=shard.split,
            ordinal=shard.ordinal,
            first=shard.first,
            last=shard.last,
            kept=shard.kept,
        )


class Journal:
    """The records of one build at its output.

    Args:
        storage: The output.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._build = ""

    def claim(self, build: Unfinished, *, start_over: bool) -> None:
        """Mark the place as that of this build, or check that it is.

        Args:
            build: Whose it is to be.
            start_over: Throw away what another build left unfinished. One that wrote no shard is thrown
                away in any case.

        Raises:
            UserError: Another build is unfinished here.
        """
        if start_over:
            self.clear()
        if self._storage.create(UNFINISHED_FILE, build.to_json()):
            self._build = sha256_hex(build.to_json())
            if self._storage.exists(INDEX_FILE):  # finished by another build since we looked
                self.clear()
                raise UserError(
                    f"{self._storage.url}: another build finished here first; choose another --out"
                )
            return
        theirs = self._read(Unfinished, UNFINISHED_FILE)
        if self._names(_SHARD):  # whether their records were written yet or not
            whose = f"the data set {theirs.name!r}" if theirs else "another version"
            raise UserError(
                f"{self._storage.url}: holds an unfinished build of {whose} that differs in "
                f"{_differences(build, theirs)}; finish that one, add --start-over to throw it away, or "
                "choose another --out"
            )
        self.claim(build, start_over=True)

    def check(self, build: Unfinished) -> None:
        """Check that the place is still ours.

        Raises:
            UserError: Somebody started over, or finished the build.
        """
        try:
            sound = self._storage.read(UNFINISHED_FILE) == build.to_json()
        except FileNotFoundError:
            sound = False
        if not sound:
            raise UserError(f"{self._storage.url}: another build took over here; choose another --out")

    def segments(self) -> Iterator[Segment]:
        """Iterate what is known of items, from item 0 on without a gap."""
        told = 0
        for name in self._names(_ITEMS):  # sorted, and their numbers have leading zeros
            segment = self._read(Segment, name)
            if segment is None or segment.build != self._build or not segment.is_sound():
                continue
            if segment.first == told:
                told = segment.stop
                yield segment

    def shards(self, told: int) -> dict[str, list[FinishedShard]]:
        """Return the finished shards by split, in order without a gap.

        Args:
            told: Number of the item before which `segments` tell everything.
        """
        finished: dict[str, list[FinishedShard]] = {split: [] for split in SPLITS}
        there = set(self._storage.list())
        records = (
            self._read(FinishedShard, name) for name in sorted(there) if name.startswith(_SHARD_RECORD)
        )
        found = [shard for shard in records if shard and {shard.entry.name, shard.entry.idx_name} <= there]
        for shard in sorted(found, key=lambda shard: (shard.split, shard.ordinal)):
            ours = shard.build == self._build
            if ours and shard.ordinal == len(finished[shard.split]) and shard.last < told:
                finished[shard.split].append(shard)
        return finished

    def add_segment(self, segment: Segment) -> None:
        """Record what was found out about items."""
        self._put(f"{_ITEMS}{segment.first:09d}.json", segment)

    def add_shard(self, shard: FinishedShard) -> None:
        """Record a shard; the segments of all its items must be recorded."""
        self._put(f"{_RECORD}{shard.entry.name.removesuffix('.tar')}.json", shard)

    def clear(self) -> None:
        """Remove all records, the claim last."""
        for name in (*self._names(_RECORD), UNFINISHED_FILE):
            self._storage.delete(name)

    def _put(self, name: str, record: _Record) -> None:
        self._storage.write(name, record.model_copy(update={"build": self._build}).to_json())

    def _names(self, prefix: str) -> list[str]:
        return [name for name in self._storage.list() if name.startswith(prefix)]

    def _read(self, kind: type[D], name: str) -> D | None:
        """Read a record; None if it is damaged."""
        try:
            return kind.from_json(self._storage.read(name), f"{self._storage.url}/{name}")
        except UserError as error:
            log.warning("%s; what it tells will be done again", error)
            return None


def _differences(mine: Unfinished, theirs: Unfinished | None) -> str:
    if theirs is None:
        return "its version"
    named = {key: (mine.plan.get(key), theirs.plan.get(key)) for key in sorted({*mine.plan, *theirs.plan})}
    different = [key for key, (one, other) in named.items() if one != other]
    for key in ("name", "kind"):
        if getattr(mine, key) != getattr(theirs, key):
            different.insert(0, key)
    if mine.stamp != theirs.stamp:
        different.append("the source's files")
    return ", ".join(different)
