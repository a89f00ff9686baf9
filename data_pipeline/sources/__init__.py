"""Where pictures come from: every source iterates (key, bytes, meta) in a fixed order.

A source knows nothing of shards; a new one is a class with the attributes of `Source`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Item:
    """One picture of a source, not yet looked into.

    Attributes:
        key: Name within the data set: unique, of `A-Z a-z 0-9 _ -`, at most 80 characters.
        where: The file or record for messages and `rejected.jsonl`; never a machine's absolute path.
        data: The picture file's bytes; empty if they could not be read.
        meta: JSON values kept beside the picture as `key.json`.
        problem: Why the bytes could not be read; empty if they could.
    """

    key: str
    where: str
    data: bytes
    meta: dict[str, Any] = field(default_factory=dict)
    problem: str = ""


class Source(Protocol):
    """A collection of pictures."""

    kind: str
    """What `ddpm data build KIND` calls it; recorded in the index."""
    name: str
    """Default name of the data set."""
    native_size: int | None
    """Side of its pictures in pixels if all are squares of one size, else None."""
    default_channels: int
    """Channels if the user names none: 1 or 3."""
    default_val_fraction: float
    """Share of pictures that go to the validation split if the user names none."""

    def count(self) -> int:
        """Return how many items iteration will give."""

    def __iter__(self) -> Iterator[Item]:
        """Iterate all items, each time in the same order; memory does not grow with their number."""
