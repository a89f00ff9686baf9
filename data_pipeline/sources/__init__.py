"""Where pictures come from: every source gives (key, bytes, meta) in a fixed order, from any place on.

A source knows nothing of shards and does not decode; it tells where each of its pictures lies
(`Source.places`, cheap) and reads any run of them (`Source.read`). So several processes can read
different runs at once, and a build that was killed goes on where it was.
"""

import hashlib
import itertools
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Final

_KEY: Final = re.compile(r"[A-Za-z0-9_-]{1,80}")
_RUN: Final = 256

Place = Any
"""Where one picture of a source lies, in the source's own terms: small, picklable, with a stable `repr`."""


@dataclass(slots=True)
class Item:
    """One picture of a source, not yet looked into.

    Attributes:
        key: Name within the data set: unique, of `A-Z a-z 0-9 _ -`, at most 80 characters.
        where: The file or record for messages and `rejected.jsonl`; never a machine's absolute path.
        data: The picture file's bytes; empty if they could not be read.
        meta: JSON values kept beside the picture as `key.json`; a class number stands under `label`.
        problem: Why the bytes could not be read; empty if they could.
        split: "train" or "val" where the collection itself divides its pictures; else None.
    """

    key: str
    where: str
    data: bytes
    meta: dict[str, Any] = field(default_factory=dict)
    problem: str = ""
    split: str | None = None


@dataclass(frozen=True)
class Survey:
    """What a source holds, told without reading pictures.

    Attributes:
        count: Number of items.
        stamp: Changes whenever the source's files do (names, sizes, times), for this machine only.
    """

    count: int
    stamp: str


class Source(ABC):
    """A collection of pictures. Picklable; what is open in one process is opened anew in another.

    Attributes:
        name: Default name of the data set.
        native_size: Side of its pictures in pixels if all are squares of one size, else None.
        default_size: Side if the user names none; None: that of the first picture, which all must have.
        default_channels: Channels if the user names none: 1 or 3.
        default_val_fraction: Share of pictures that go to the validation split if the user names none;
            None: every item tells its own split, and the user cannot choose.
        classes: Names of the classes, by label number; empty if there are none.
        ignored: Files seen that are no pictures, once all places were asked for.
        labelled: The user asked for class numbers; they are part of what a build is.
    """

    kind: ClassVar[str]
    """What `ddpm data build KIND` calls it; recorded in the index."""

    name: str
    native_size: int | None = None
    default_size: int | None = None
    default_channels: int = 3
    default_val_fraction: float | None = 0.05
    classes: tuple[str, ...] = ()
    ignored: int = 0
    labelled: bool = False

    @abstractmethod
    def places(self) -> Iterator[Place]:
        """Iterate where the items lie, each time in the same order; memory does not grow with their number.

        Raises:
            UserError: The collection itself cannot be read (not a single picture of it).
        """

    @abstractmethod
    def read(self, first: int, places: Sequence[Place]) -> Iterator[Item]:
        """Read a run of consecutive items, in order, exactly one for each place.

        A picture that cannot be read is an item with a `problem`, never an exception.

        Args:
            first: Number of the first one, counted from 0 through all places.
            places: Their places.
        """

    def files(self) -> Iterable[Path]:
        """The files that the source consists of, if they are few; see `survey`."""
        return ()

    def survey(self) -> Survey:
        """Count the items and tell the source's state."""
        seen, count = hashlib.sha256(), 0
        for path in self.files():
            status = path.stat()
            seen.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
        for place in self.places():
            seen.update(self.describe(place).encode("utf-8", "backslashreplace") + b"\n")
            count += 1
        return Survey(count, seen.hexdigest())

    def describe(self, place: Place) -> str:
        """What of a place goes into the stamp; more than its name where `files` does not cover it."""
        return repr(place)

    def __iter__(self) -> Iterator[Item]:
        """Iterate all items, each time in the same order."""
        first = 0
        for run in runs(self.places(), _RUN):
            yield from self.read(first, run)
            first += len(run)

    def close(self) -> None:  # noqa: B027 - most sources have nothing to let go of
        """Let go of open files, and of what was unpacked for the source."""


def runs(places: Iterable[Place], length: int) -> Iterator[list[Place]]:
    """Divide places into runs of `length`, the last one shorter."""
    iterator = iter(places)
    while run := list(itertools.islice(iterator, length)):
        yield run


def number_key(number: int) -> str:
    """The key of the item with that number, where the collection has no names of its own."""
    return f"{number:09d}"


def safe_key(name: bytes) -> str:
    """A collection's own name for an item as a key, if it is one; else the start of its SHA-256."""
    text = name.decode("ascii", "replace")
    return text if _KEY.fullmatch(text) else hashlib.sha256(name).hexdigest()[:40]
