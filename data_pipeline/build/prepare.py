"""One run of a source's pictures -> finished tar members in a local file: what a worker process does.

A run's outcome is a function of the source and the plan alone, so any process may do it, and do it again.
"""

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final

import google_crc32c
import numpy as np
import numpy.typing as npt

from data_pipeline.build.tar_members import BLOCK, header, padding
from data_pipeline.decode import DecodeError
from data_pipeline.documents import canonical_json
from data_pipeline.errors import UserError
from data_pipeline.fit import Fitted, Form, fit
from data_pipeline.geometry import GeometryError
from data_pipeline.scratch import naming_full_scratch
from data_pipeline.sources import Item, Place, Source

SPLITS: Final = ("train", "val")
HASH_GROUP: Final = 64
"""Items whose hashes are hashed together; part of the definition of `Index.source_sha256`."""
_BUFFER: Final = 1 << 20
CONTENT: Final = np.dtype("V16")
"""The first half of the SHA-256 of a picture's bytes: tells duplicates, and the split."""

NO_CONTENT: Final = bytes(CONTENT.itemsize)
"""Of a picture that was left out: it is equal to none."""

SAMPLE: Final = np.dtype(
    [
        ("item", "<i8"),  # number in the source
        ("length", "<u4"),  # bytes of its members, headers and padding included
        ("size", "<u4"),
        ("crc32c", "<u4"),
        ("meta_size", "<u4"),
        ("meta_crc32c", "<u4"),
        ("kept", "?"),  # the source's own bytes
    ]
)
"""One sample of a run, in the order in which the members follow one another."""
Samples = npt.NDArray[np.void]


@dataclass(frozen=True)
class Rejected:
    """A picture that was left out, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class Prepared:
    """What came of a run.

    Attributes:
        first: Number of its first item.
        count: How many items it has.
        samples: SAMPLE [n] of each split; their members lie end to end in `part_path`.
        groups: SHA-256 of each group of `HASH_GROUP` items, 32 bytes each.
        contents: CONTENT [count], of all items.
        rejected: Those left out.
    """

    first: int
    count: int
    samples: dict[str, Samples]
    groups: bytes
    contents: npt.NDArray[np.void]
    rejected: list[Rejected]


@dataclass(frozen=True)
class Run:
    """A run of consecutive items to prepare.

    Attributes:
        first: Number of its first item.
        places: Where they lie.
        covered: By split, the number of the item before which shards hold everything already.
    """

    first: int
    places: Sequence[Place]
    covered: Mapping[str, int]


def part_path(scratch: Path, split: str, first: int) -> Path:
    """The local file with the members of a run's samples of one split."""
    return scratch / f"{split}-{first}.part"


@dataclass
class _Part:
    """The samples of one split on their way to the file."""

    path: Path
    rows: list[tuple[int, int, int, int, int, int, bool]] = field(default_factory=list)
    file: BinaryIO | None = None

    def add(self, number: int, key: str, fitted: Fitted, meta: bytes) -> None:
        payload = fitted.payload
        members = [(f"{key}.{fitted.extension}", payload)]
        if meta:
            members.append((f"{key}.json", meta))
        if self.file is None:
            self.file = self.path.open("wb", buffering=_BUFFER)
        length = 0
        for name, data in members:
            fill = padding(len(data))
            self.file.write(b"".join((header(name, len(data)), data, fill)))
            length += BLOCK + len(data) + len(fill)
        crc, meta_crc = google_crc32c.value(payload), google_crc32c.value(meta)
        self.rows.append((number, length, len(payload), crc, len(meta), meta_crc, fitted.kept))

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


def prepare(source: Source, run: Run, form: Form, val_fraction: float | None, scratch: Path) -> Prepared:
    """Read, hash, fit and lay out the pictures of a run.

    Args:
        source: Where from.
        run: Which ones.
        form: What the shards are to hold.
        val_fraction: Share of the validation split; None: the items tell their split.
        scratch: Folder for the files of members.

    Raises:
        UserError: A picture is sound but does not fit the form, or the scratch folder is full.
    """
    parts = {split: _Part(part_path(scratch, split, run.first)) for split in SPLITS}
    rejected: list[Rejected] = []
    lines, contents = [], []
    with naming_full_scratch(scratch):
        numbered = zip(itertools.count(run.first), source.read(run.first, run.places))
        for number, item in numbered:
            digest = hashlib.sha256(item.data)
            contents.append(digest.digest()[: CONTENT.itemsize])
            meta = canonical_json(item.meta) if item.meta else b""
            lines.append(b"%s %s %s\n" % (item.key.encode(), digest.hexdigest().encode(), meta))
            split = item.split or _split_of(contents[-1], val_fraction)
            if number < run.covered[split]:
                continue
            fitted = _fit(item, form)
            if isinstance(fitted, Fitted):
                parts[split].add(number, item.key, fitted, meta)
            else:
                rejected.append(fitted)
                contents[-1] = NO_CONTENT
        for part in parts.values():
            part.close()
    assert len(lines) == len(run.places), f"{source.kind}: one item for each place"
    return Prepared(
        first=run.first,
        count=len(lines),
        samples={split: np.array(part.rows, dtype=SAMPLE) for split, part in parts.items()},
        groups=b"".join(_group_digests(lines)),
        contents=np.array(contents, dtype=CONTENT),
        rejected=rejected,
    )


def _fit(item: Item, form: Form) -> Fitted | Rejected:
    """Fit one picture, or tell why it cannot be read."""
    if item.problem:
        return Rejected(item.where, item.problem)
    try:
        return fit(item.data, form)
    except DecodeError as error:
        return Rejected(item.where, str(error))
    except GeometryError as error:
        raise UserError(
            f"{item.where}: {error}; give --size N and, in the place of none, --geometry ddpm-lsun to crop "
            "and resize all pictures"
        ) from error


def _split_of(content: bytes, val_fraction: float | None) -> str:
    """The split by content hash: equal pictures never stand in both, and more pictures move none."""
    assert val_fraction is not None, "the items tell their split"
    share = int.from_bytes(content[:8], "big") / 2**64
    return "val" if share < val_fraction else "train"


def _group_digests(lines: Sequence[bytes]) -> Iterator[bytes]:
    for start in range(0, len(lines), HASH_GROUP):
        yield hashlib.sha256(b"".join(lines[start : start + HASH_GROUP])).digest()


def source_sha256(groups: bytes) -> str:
    """Return the hash of a whole source from the digests of all its groups."""
    return hashlib.sha256(groups).hexdigest()
