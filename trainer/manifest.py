"""The documents of a run directory: checkpoint manifests and the records of attempts."""

import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, ClassVar, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from data_pipeline.documents import Document, Migration, canonical_json, sha256_hex
from data_pipeline.errors import StorageFault, UserError

ANY_DATA: Final = ""
"""`index_sha` of a checkpoint that was not trained here: any shards may continue it."""
_UNSEALED: Final = ("manifest/1",)
"""Versions whose manifests carry no hash of themselves."""
_CHECKPOINT: Final = re.compile(r"(\d{10})-(\d{6})")


class DamagedCheckpointError(StorageFault):
    """A published file is missing, cut short or altered."""


def checkpoint_name(images: int, attempt: int) -> str:
    """Name of a checkpoint's folder; the attempt in it keeps parts of two attempts apart."""
    return f"{images:010d}-{attempt:06d}"


def parse_checkpoint_name(name: str) -> tuple[int, int]:
    """Return (images, attempt) of a checkpoint's name.

    Raises:
        UserError: `name` is no checkpoint name.
    """
    match = _CHECKPOINT.fullmatch(name)
    if match is None:
        raise UserError(f"{name!r} is no checkpoint name; they look like 0000051200-000003")
    return int(match[1]), int(match[2])


def is_checkpoint_name(name: str) -> bool:
    """Tell whether a folder's name is that of a checkpoint."""
    return _CHECKPOINT.fullmatch(name) is not None


class FileRecord(BaseModel):
    """A file and what identifies its content."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    path: str
    bytes: int
    sha256: str


class FileEntry(FileRecord):
    """One part of a checkpoint; its path is relative to the checkpoint's folder."""

    role: Literal["weights", "ema", "state", "timesteps"]
    ema: str | None = None
    """Profile name of a part whose role is "ema"."""


class Checksums(FileRecord):
    """The file with a checksum of every block of every part; its path is relative to the checkpoint's folder.

    Little-endian uint32 CRC32C of each block, part after part in the order of the manifest's `files`.
    """

    block_bytes: int
    """Length of a block; a part's last one is as long as it happens to be."""


class Topology(BaseModel):
    """The layout that wrote a checkpoint; for people, nothing depends on it when loading."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    world: int
    zero_stage: int
    device: str


class GuardState(BaseModel):
    """What the guard remembers of the updates so far (`trainer.guards`)."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    log_loss: float = 0.0
    """Running average of the logarithm of the loss of applied updates."""
    log_norm: float = 0.0
    """The same of the gradient norm."""
    updates: int = 0
    """How many updates were averaged."""
    dropped: tuple[int, ...] = ()
    """First stream positions of the updates that count against the budget of dropped ones."""


def _without_checksums(content: dict[str, Any]) -> dict[str, Any]:
    """Manifest 1 to 2: blocks had no checksums, so each part can be verified as a whole only."""
    return {**content, "schema": "manifest/2", "checksums": None}


class Manifest(Document):
    """`manifest.json`: written last and once; the checkpoint exists if and only if it does."""

    SCHEMA: ClassVar[str] = "manifest/2"
    MIGRATIONS: ClassVar[Mapping[str, Migration]] = {"manifest/1": _without_checksums}

    run: str
    attempt: int
    images: int
    """Training images applied by the optimizer so far."""
    position: int
    """Stream positions consumed so far; `images` plus the skipped ones."""
    updates: int
    """Optimizer updates applied so far (Adam's step count)."""
    skips: list[tuple[int, int]] = Field(default_factory=list)
    """Half-open ranges of stream positions whose update was dropped."""
    guard: GuardState = GuardState()
    loss_scale: dict[str, float] | None = None
    """State of DeepSpeed's loss scaling (precision fp16)."""
    recipe_sha: str
    index_sha: str
    topology: Topology
    files: list[FileEntry] = Field(default_factory=list)
    """Its parts; none before they are written."""
    checksums: Checksums | None = None
    """None if it was written before there were any."""

    @property
    def name(self) -> str:
        """Name of the checkpoint's folder."""
        return checkpoint_name(self.images, self.attempt)

    @property
    def records(self) -> list[FileRecord]:
        """All its files but the manifest itself."""
        return [*self.files, *([self.checksums] if self.checksums else [])]

    def to_json(self) -> bytes:
        """Serialise as any document, sealed: `sha256` is that of the canonical JSON of all the rest."""
        content = json.loads(super().to_json())
        sealed = {**content, "sha256": sha256_hex(canonical_json(content))}
        return json.dumps(sealed, indent=2, ensure_ascii=False).encode() + b"\n"

    @classmethod
    def from_json(cls, data: bytes, where: str) -> Self:
        """Parse and validate a manifest.

        Raises:
            DamagedCheckpointError: It is cut short or altered.
            UserError: It is of a version that this release does not know.
        """
        try:
            content = json.loads(data)
            seal = content.pop("sha256", None)
            is_intact = (
                sha256_hex(canonical_json(content)) == seal if seal else content["schema"] in _UNSEALED
            )
        except (ValueError, AttributeError, TypeError, KeyError):  # what the first lines make of damage
            is_intact = False
        if not is_intact:
            raise DamagedCheckpointError(f"{where}: the manifest is damaged; its seal does not fit")
        return super().from_json(data, where)


class Attempt(Document):
    """`attempts/NNNNNN.json`: the claim of one start of the trainer."""

    SCHEMA: ClassVar[str] = "attempt/1"

    run: str
    """Identity of the run, drawn by its first attempt."""
    attempt: int
    parent: str | None
    """Checkpoint this attempt started from; None for a start from random weights."""
    position: int | None = None
    """Stream position at which it goes on, where a rollback passed over what followed its parent."""
    rollbacks: int = 0
    """How often the run was rolled back until then."""
    host: str
    time: datetime = Field(default_factory=lambda: datetime.now(UTC))
    nonce: str
    """Makes two claims of the same number differ."""
    recipe_sha: str
    index_sha: str
    recipe: dict[str, Any]
    """The full, resolved recipe of this attempt; length, storage and topology may change between attempts."""


class AttemptEnd(Document):
    """`attempts/NNNNNN.end.json`: how an attempt ended, as far as it could still say so."""

    SCHEMA: ClassVar[str] = "attempt-end/1"

    attempt: int
    outcome: Literal["finished", "requeue", "failed"]
    images: int
    checkpoint: str | None
