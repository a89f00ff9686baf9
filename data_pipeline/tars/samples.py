"""The samples of a WebDataset tar: which members belong together, and which one is the picture.

The rule is WebDataset's: members that follow one another and have the same name up to the first dot of the
base name (folders included) are one sample; what comes after that dot, in lower case, tells them apart. Left
out, as there, are folders, members without a dot and those called `__…__`; also hidden files, which macOS
strews into archives.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from data_pipeline.sources.pictures import PICTURE_SUFFIXES, size_problem
from data_pipeline.tars.walk import StreamedFile, TarDamage, TarMember, members

NUMPY: Final = "npy"
META: Final = "json"
PICTURES: Final = frozenset({suffix.removeprefix(".") for suffix in PICTURE_SUFFIXES} | {NUMPY})
"""Extensions of picture members."""
_LEFT_OUT: Final = re.compile(r"__[^/]*__(/|$)")
_NAMED: Final = 5


@dataclass(frozen=True)
class Payload:
    """A member that was read.

    Attributes:
        extension: What follows its key and a dot, in lower case.
        offset: First byte of its content in the tar.
        data: Its content.
    """

    extension: str
    offset: int
    data: bytes


@dataclass(frozen=True)
class Sample:
    """One sample of a tar.

    Attributes:
        key: What its members are called before the dot, with folders.
        key_hash: 8 bytes of the key's hash, for finding keys that stand twice.
        picture: None if there is a problem.
        meta: Its JSON member, if any.
        problem: Why it is not to be used; else empty.
        more_pictures: Picture members beside the one that counts.
    """

    key: str
    key_hash: int
    picture: Payload | None
    meta: Payload | None
    problem: str
    more_pictures: int


@dataclass
class _Group:
    """The members of one sample, as far as they have come."""

    key: str
    key_hash: int
    problem: str = ""
    picture: Payload | None = None
    meta: Payload | None = None
    more_pictures: int = 0
    extensions: set[str] = field(default_factory=set)

    def add(self, member: TarMember, extension: str, file: StreamedFile) -> None:
        problem = ""
        if extension in self.extensions:
            problem = f"two of its members end in .{extension}"
        elif not member.plain:
            problem = f"its .{extension} is a link or stored sparsely"
        elif extension in PICTURES or extension == META:
            problem = size_problem(member.size)
        self.problem = self.problem or problem
        self.extensions.add(extension)
        if problem or (extension not in PICTURES and extension != META):
            return
        if extension == META:
            self.meta = Payload(extension, member.offset, file.read_at(member.offset, member.size))
        elif self.picture is None or (self.picture.extension == NUMPY and extension != NUMPY):
            self.picture = Payload(extension, member.offset, file.read_at(member.offset, member.size))
        elif extension != NUMPY:
            self.more_pictures += 1

    def sample(self) -> Sample:
        problem = self.problem
        if not problem and self.picture is None:
            found = ", ".join(f".{extension}" for extension in sorted(self.extensions)[:_NAMED])
            problem = f"no picture among its members ({found})"
        picture = None if problem else self.picture
        return Sample(self.key, self.key_hash, picture, self.meta, problem, self.more_pictures)


def samples(file: StreamedFile) -> Iterator[Sample]:
    """Iterate the samples of a tar in its order, rejected ones included.

    Of several pictures in a sample the first one counts; a NumPy file counts only if there is no other. A
    sample has a problem if it has no picture, if two members of it have the same name, if its picture or JSON
    is a link, sparse or too large, or if its key stood in the tar before, not next to it.

    One sample is in memory at a time, and about 100 bytes for every key of the tar.

    Raises:
        TarDamage: As `members`, after all samples before the damage.
    """
    seen: set[int] = set()
    group: _Group | None = None
    try:
        for member in members(file):
            named = None if member.folder else split_name(member.name)
            if named is None or not (member.plain or named[1] in PICTURES):
                continue
            key, extension = named
            if group is None or group.key != key:
                if group is not None:
                    yield group.sample()
                group = _Group(key, hash_of(key))
                if group.key_hash in seen:
                    group.problem = (
                        "its key stands in the tar before; members of a sample must stand together"
                    )
                seen.add(group.key_hash)
            group.add(member, extension, file)
    except TarDamage:
        if group is not None:
            yield group.sample()
        raise
    if group is not None:
        yield group.sample()


def split_name(name: str) -> tuple[str, str] | None:
    """Divide a member's name into key and extension; None if it belongs to no sample."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not stem or not dot or _LEFT_OUT.match(name):
        return None
    return folder + slash + stem, extension.lower()


def hash_of(key: str) -> int:
    """Return 8 bytes of a key's hash: of a billion keys, two equal by chance in one of 37 data sets."""
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest())
