"""Equal pictures in a source, found by their hashes on disk: memory does not grow with their number."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from data_pipeline.build.prepare import CONTENT, NO_CONTENT
from data_pipeline.documents import canonical_json
from data_pipeline.scratch import naming_full_scratch
from data_pipeline.sources import Source
from data_pipeline.storage import Storage

DUPLICATES_FILE: Final = "duplicates.jsonl"
_BLOCK: Final = 1 << 16
_IN_MEMORY: Final = 1 << 17
"""Hashes that are sorted at once, about; that takes 100 bytes for each."""


class ContentSpool:
    """The content hashes of all items, in order, in a local file.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self._path, self.count = path, 0

    def add(self, contents: bytes) -> None:
        """Append hashes, CONTENT end to end."""
        with naming_full_scratch(self._path.parent), self._path.open("ab") as file:
            file.write(contents)
        self.count += len(contents) // CONTENT.itemsize

    def duplicates(self) -> Iterator[npt.NDArray[np.int64]]:
        """Iterate groups of items with equal hashes: int64 [n], n >= 2, each increasing."""
        parts = max(1, -(-self.count // _IN_MEMORY))
        for part in range(parts):
            numbers, contents = self._part(part, parts)
            words = contents.view("<u8").reshape(-1, 2)
            order = np.lexsort((numbers, words[:, 1], words[:, 0]))
            differ = (words[order[1:]] != words[order[:-1]]).any(axis=1)
            edges = np.concatenate([[0], np.flatnonzero(differ) + 1, [len(order)]])
            for group in np.flatnonzero(np.diff(edges) > 1):
                if contents[order[edges[group]]].tobytes() == NO_CONTENT:
                    continue
                yield numbers[order[edges[group] : edges[group + 1]]]

    def _part(self, part: int, parts: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.void]]:
        """The hashes that fall to one of several parts, and whose they are."""
        numbers, contents = [np.zeros(0, np.int64)], [np.zeros(0, CONTENT)]
        if not self.count:
            return numbers[0], contents[0]
        with self._path.open("rb") as file:
            for first in itertools.count(step=_BLOCK):
                block = np.frombuffer(file.read(_BLOCK * CONTENT.itemsize), dtype=CONTENT)
                if not len(block):
                    break
                words = block.view(np.uint8).reshape(len(block), -1)[:, :2].astype(np.int64)
                chosen = np.flatnonzero((words[:, 0] * 256 + words[:, 1]) % parts == part)
                numbers.append(first + chosen)
                contents.append(block[chosen])
        return np.concatenate(numbers), np.concatenate(contents)


def report_duplicates(spool: ContentSpool, source: Source, storage: Storage) -> int:
    """Write `duplicates.jsonl` beside the shards: one line for each group of equal pictures.

    Args:
        spool: The hashes of all items.
        source: Asked for the names of those that are equal.
        storage: Where the shards lie.

    Returns:
        How many pictures are equal to an earlier one.
    """
    groups = sorted(group.tolist() for group in spool.duplicates())
    if not groups:
        storage.delete(DUPLICATES_FILE)  # an earlier, broken-off build may have left one
        return 0
    names = _names(source, {number for group in groups for number in group})
    rows = ({"schema": "duplicates/1", "paths": [names[number] for number in group]} for group in groups)
    storage.write(DUPLICATES_FILE, b"".join(canonical_json(row) + b"\n" for row in rows))
    return sum(len(group) - 1 for group in groups)


def _names(source: Source, numbers: set[int]) -> dict[int, str]:
    """What the items with these numbers are called."""
    return {
        number: item.where
        for number, place in enumerate(source.places())
        if number in numbers
        for item in source.read(number, [place])
    }
