"""Checkpoints: parts first, each with size and SHA-256, the manifest last and create-only.

Training state is stored as flat slices named "{role}/{parameter}:{start}:{stop}", with no trace of the
layout that wrote them: `trainer.restore` loads any checkpoint into any layout. Nothing is unpickled.
"""

import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from data_pipeline.documents import sha256_hex
from data_pipeline.errors import UserError
from data_pipeline.storage import Storage
from trainer.manifest import Checksums, DamagedCheckpointError, Manifest
from trainer.parts import BLOCK_BYTES, Part, read_verified, write_part
from trainer.run import CheckpointGoneError, Run

log = logging.getLogger(__name__)

WEIGHTS_FILE: Final = "weights.safetensors"
TIMESTEPS_FILE: Final = "state/timesteps.safetensors"
"""The part that holds the distribution of loss-aware timesteps."""
CHECKSUMS_FILE: Final = "checksums.crc32c"


class SupersededError(UserError):
    """A newer attempt has taken the run over; this one may not publish any more."""


@dataclass(frozen=True)
class Slice:
    """The flat range [start, stop) of one parameter and what training keeps for it.

    Attributes:
        parameter: Name of the parameter.
        start: First flat index within the parameter.
        stop: One past the last flat index.
        tensors: By role ("master", "exp_avg", "exp_avg_sq", "ema.NAME"): 1-D views of `stop - start`
            numbers, read when saving and written in place when loading.
    """

    parameter: str
    start: int
    stop: int
    tensors: Mapping[str, Tensor]


def ema_file(profile: str) -> str:
    """File name of an EMA profile's whole tensors."""
    return f"ema-{profile}.safetensors"


def write_state(
    run: Run, checkpoint: str, rank: int, slices: Sequence[Slice], *, deadline: float = math.inf
) -> Part:
    """Write the state part of one rank, role after role: what another layout needs then lies together."""
    roles = dict.fromkeys(role for piece in slices for role in piece.tensors)
    tensors = {
        f"{role}/{piece.parameter}:{piece.start}:{piece.stop}": piece.tensors[role]
        for role in roles
        for piece in slices
        if role in piece.tensors
    }
    path = f"state/rank-{rank:04d}.safetensors"
    return write_part(run, checkpoint, path, tensors, "state", deadline=deadline)


def publish(run: Run, draft: Manifest, parts: Sequence[Part]) -> Manifest:
    """Publish a checkpoint whose parts are all written.

    Args:
        run: The run.
        draft: The manifest but for its files.
        parts: All of them.

    Returns:
        The manifest as published.

    Raises:
        DamagedCheckpointError: A part is missing or has another size.
        SupersededError: A newer attempt exists, or published this name first.
    """
    name = draft.name
    check_newest(run, draft.attempt)  # first: the newest attempt removes what others leave
    table = b"".join(part.crcs for part in parts)
    run.storage.write(f"checkpoints/{name}/{CHECKSUMS_FILE}", table)
    checksums = Checksums(
        path=CHECKSUMS_FILE, bytes=len(table), sha256=sha256_hex(table), block_bytes=BLOCK_BYTES
    )
    manifest = draft.model_copy(update={"files": [part.entry for part in parts], "checksums": checksums})
    check_sizes(run, manifest)
    check_newest(run, draft.attempt)
    if not run.storage.create(f"checkpoints/{name}/manifest.json", manifest.to_json()):
        raise SupersededError(f"{run.url}: checkpoint {name} was already published by somebody else")
    return manifest


def check_newest(run: Run, attempt: int) -> None:
    """Check that an attempt may publish.

    Raises:
        SupersededError: A newer one exists.
    """
    newest = run.newest_attempt()
    if newest != attempt:
        raise SupersededError(
            f"{run.url}: attempt {newest} has taken the run over from attempt {attempt}; "
            "train a run from one place at a time"
        )


def folder_of(run: Run, manifest: Manifest) -> Storage:
    """Return where the parts of a checkpoint are."""
    return run.storage.child("checkpoints", manifest.name)


def check_sizes(run: Run, manifest: Manifest) -> None:
    """Check that all files of a checkpoint are there with the size that was written.

    Raises:
        DamagedCheckpointError: Naming the first that is not.
    """
    folder = folder_of(run, manifest)
    for record in manifest.records:
        where = f"{folder.url}/{record.path}"
        try:
            size = folder.size(record.path)
        except FileNotFoundError as error:
            raise DamagedCheckpointError(f"{where}: the file is missing") from error
        if size != record.bytes:
            raise DamagedCheckpointError(f"{where}: {size} bytes, {record.bytes} were written")


def verify(run: Run, manifest: Manifest, beat: Callable[[], None] = lambda: None) -> None:
    """Read every file of a checkpoint and check its size and hash.

    Args:
        run: The run.
        manifest: The checkpoint's.
        beat: Called before each file, e.g. to keep a pin alive.

    Raises:
        DamagedCheckpointError: Naming the first that fails.
    """
    for record in manifest.records:
        beat()
        read_verified(folder_of(run, manifest), record)


def newest_whole(run: Run, refused: Collection[str] = ()) -> Manifest | None:
    """Return the newest live checkpoint whose files are all there; others are named in the log.

    What they hold is checked when they are loaded (`trainer.restore`).

    Args:
        run: The run.
        refused: Checkpoints that turned out to be damaged.

    Returns:
        None if nothing has been published yet.

    Raises:
        DamagedCheckpointError: There are checkpoints and none is whole: starting from random weights
            would silently abandon the run.
    """
    live = run.live_checkpoints()
    for name in reversed(live):
        if name in refused:
            continue
        try:
            manifest = run.manifest(name)
            check_sizes(run, manifest)
        except (DamagedCheckpointError, CheckpointGoneError) as error:
            log.warning("checkpoint %s is passed over: %s", name, error)
            continue
        return manifest
    if live or refused or _parent_of_newest(run) is not None:
        raise DamagedCheckpointError(
            f"{run.url}: none of the {len(live)} live checkpoints verifies; restore their files, or start "
            "another run"
        )
    return None


def _parent_of_newest(run: Run) -> str | None:
    newest = run.newest_attempt()
    return run.attempt(newest).parent if newest else None
