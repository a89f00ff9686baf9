"""`index.json` and the `.idx` records: what the shards of a data set hold.

`index.json` alone determines the order of training; the records say where in a shard each picture's
bytes lie and what their checksum is. `docs/format.md` describes both.
"""

import hashlib
import logging
import re
from dataclasses import dataclass
from typing import ClassVar, Final, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

from data_pipeline.documents import Document, sha256_hex
from data_pipeline.errors import StorageFault, UserError
from data_pipeline.storage import Storage

log = logging.getLogger(__name__)

INDEX_FILE: Final = "index.json"
TRIES: Final = 3
"""Independent reads of bytes whose checksum is wrong before they count as damaged in the store."""

TAR_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=@,-]{0,195}\.tar")
"""What a shard may be called: names that mean the same in every file system, URL and shell."""

RECORD: Final = np.dtype(
    [
        ("offset", "<u8"),
        ("size", "<u4"),
        ("crc32c", "<u4"),
        ("meta_offset", "<u8"),
        ("meta_size", "<u4"),
        ("meta_crc32c", "<u4"),
    ]
)
"""One member of a shard, 32 bytes: place and CRC32C (Castagnoli, as in RFC 3720) of the picture's bytes
in the tar, and of its `key.json`, zeros if it has none."""

Records = npt.NDArray[np.void]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class ShardEntry(_Part):
    """One shard: `name` ("shard-000000.tar", or what an adopted tar is called), its record file beside it."""

    name: str = Field(pattern=f"^{TAR_NAME.pattern}$")
    bytes: int = Field(ge=0)
    sha256: str
    samples: int = Field(ge=0)
    idx_bytes: int = Field(ge=0)
    idx_sha256: str

    @model_validator(mode="after")
    def _one_record_per_sample(self) -> Self:
        if self.idx_bytes != self.samples * RECORD.itemsize:
            raise ValueError(f"idx_bytes is {self.idx_bytes}, not {RECORD.itemsize} per sample")
        return self

    @property
    def idx_name(self) -> str:
        """Name of the record file: "shard-000000.idx"."""
        return self.name.removesuffix(".tar") + ".idx"


class GeometryRecord(_Part):
    """How the pictures got their shape, and the library versions that decided their pixels."""

    name: str
    size: int = Field(gt=0)
    channels: int
    versions: dict[str, str]


class BuildRecord(_Part):
    """The remaining choices of a build, kept so that the same build is recognised."""

    val_fraction: float | None
    """None: the source's own division."""
    shard_bytes: int


class Index(Document):
    """The content of `index.json`.

    Attributes:
        name: Name of the data set, for people.
        kind: Kind of source it was built from, e.g. "digits".
        source_sha256: SHA-256 over the keys, contents and meta data of all source items, in order.
        geometry: Shape of every picture.
        encoding: See `encoding.Encoding`.
        build: Further choices of the build; None if the shards were not built here.
        splits: Shards of "train" and of "val", in order; one numbering over both.
        rejected: Unreadable pictures left out, listed in `rejected.jsonl`.
        duplicates: Pictures equal to an earlier one, listed in `duplicates.jsonl`; they are not left out.
        kept: Samples that hold the source's own bytes.
        classes: Names of the classes, by label number; empty if there are none.
    """

    SCHEMA: ClassVar[str] = "index/1"

    name: str
    kind: str
    source_sha256: str
    geometry: GeometryRecord
    encoding: str
    build: BuildRecord | None = None
    splits: dict[str, list[ShardEntry]]
    rejected: int = Field(ge=0)
    duplicates: int = Field(default=0, ge=0)
    kept: int = Field(default=0, ge=0)
    classes: list[str] = Field(default_factory=list)

    def samples(self, split: str) -> int:
        """Return how many pictures a split holds."""
        return sum(entry.samples for entry in self.splits[split])

    def files(self) -> set[str]:
        """Return the names of all files that belong to the data set, beside `index.json`."""
        entries = [entry for shards in self.splits.values() for entry in shards]
        return {name for entry in entries for name in (entry.name, entry.idx_name)}


@dataclass(frozen=True)
class LoadedIndex:
    """An index together with where it lies; `sha256` is that of `index.json`'s bytes."""

    index: Index
    sha256: str
    storage: Storage

    def shards(self, split: str) -> list[ShardEntry]:
        """Return the shards of a split.

        Raises:
            UserError: No such split.
        """
        try:
            return self.index.splits[split]
        except KeyError:
            known = ", ".join(self.index.splits)
            raise UserError(f"{self.storage.url}: no split {split!r}; it has {known}") from None

    def samples(self, split: str) -> int:
        """Return how many pictures a split holds.

        Raises:
            UserError: No such split.
        """
        return sum(entry.samples for entry in self.shards(split))


def load_index(url: str | Storage) -> LoadedIndex:
    """Read the index of a data set.

    Args:
        url: Where it lies, or the opened storage.

    Raises:
        UserError: Nothing there, or not an index this version reads.
    """
    storage = url if isinstance(url, Storage) else Storage(url)
    try:
        data = storage.read(INDEX_FILE)
    except FileNotFoundError as error:
        raise UserError(
            f"{storage.url}/{INDEX_FILE}: no such file, so there is no finished data set here; "
            "check the URL or build one with `ddpm data build`"
        ) from error
    index = Index.from_json(data, f"{storage.url}/{INDEX_FILE}")
    return LoadedIndex(index, sha256_hex(data), storage)


def load_records(loaded: LoadedIndex, entry: ShardEntry) -> Records:
    """Read and check the records of one shard.

    Args:
        loaded: The data set.
        entry: One of its shards.

    Returns:
        RECORD [samples].

    Raises:
        StorageFault: Missing, or size or SHA-256 stay wrong through `TRIES` reads.
    """
    where = f"{loaded.storage.url}/{entry.idx_name}"
    for _ in range(TRIES):
        try:
            data = loaded.storage.read_range(entry.idx_name, 0, entry.idx_bytes)
        except FileNotFoundError as error:
            raise StorageFault(
                f"{where}: missing though the index lists it; build the data set anew"
            ) from error
        if hashlib.sha256(data).hexdigest() == entry.idx_sha256:
            return np.frombuffer(data, dtype=RECORD)
        log.warning("%s: SHA-256 differs from the index, reading it again", where)
    raise StorageFault(f"{where}: size or SHA-256 differ from the index; build the data set anew")
