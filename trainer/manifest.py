"""The documents of a run directory: checkpoint manifests and the records of attempts."""

import re
from datetime import UTC, datetime
from typing import Any, ClassVar, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from data_pipeline.documents import Document
from data_pipeline.errors import UserError

ANY_DATA: Final = ""
"""`index_sha` of a checkpoint that was not trained here: any shards may continue it."""
_CHECKPOINT: Final = re.compile(r"(\d{10})-(\d{6})")


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


class Manifest(Document):
    """`manifest.json`: written last and once; the checkpoint exists if and only if it does."""

    SCHEMA: ClassVar[str] = "manifest/1"

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
    files: list[FileEntry]

    @property
    def name(self) -> str:
        """Name of the checkpoint's folder."""
        return checkpoint_name(self.images, self.attempt)


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
