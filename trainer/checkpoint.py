"""Checkpoints: parts first, each with size and SHA-256, the manifest last and create-only.

Training state is stored as flat float32 slices named "{role}/{parameter}:{start}:{stop}", with no trace
of the layout that wrote them: any world size loads any checkpoint by overlap. Nothing is unpickled.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import safetensors.torch
import torch
from torch import Tensor

from data_pipeline.documents import sha256_hex
from data_pipeline.errors import StorageFault, UserError
from data_pipeline.storage import Storage
from trainer.manifest import FileEntry, FileRecord, Manifest
from trainer.run import Run

log = logging.getLogger(__name__)

_READS: Final = 2
"""Independent reads before a file counts as damaged: one transfer may go wrong."""
WEIGHTS_FILE: Final = "weights.safetensors"
TIMESTEPS_FILE: Final = "state/timesteps.safetensors"
"""The part that holds the distribution of loss-aware timesteps."""


class DamagedCheckpointError(StorageFault):
    """A published part is missing, cut short or altered."""


class SupersededError(UserError):
    """A newer attempt has taken the run over; this one may not publish any more."""


@dataclass(frozen=True)
class Slice:
    """The flat range [start, stop) of one parameter and what training keeps for it.

    Attributes:
        parameter: Name of the parameter.
        start: First flat index within the parameter.
        stop: One past the last flat index.
        tensors: By role ("master", "exp_avg", "exp_avg_sq", "ema.NAME"): 1-D float32 views of
            `stop - start` numbers, read when saving and written in place when loading.
    """

    parameter: str
    start: int
    stop: int
    tensors: Mapping[str, Tensor]


def ema_file(profile: str) -> str:
    """File name of an EMA profile's whole tensors."""
    return f"ema-{profile}.safetensors"


def write_part(
    run: Run,
    checkpoint: str,
    path: str,
    tensors: Mapping[str, Tensor],
    role: Literal["weights", "ema", "state", "timesteps"],
    ema: str | None = None,
) -> FileEntry:
    """Write one safetensors part of a checkpoint that is not yet published.

    Returns:
        The part's entry for the manifest.
    """
    data = safetensors.torch.save(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    )
    run.storage.write(f"checkpoints/{checkpoint}/{path}", data)
    return FileEntry(path=path, bytes=len(data), sha256=sha256_hex(data), role=role, ema=ema)


def write_state(run: Run, checkpoint: str, rank: int, slices: Sequence[Slice]) -> FileEntry:
    """Write the state part of one rank."""
    tensors = {
        f"{role}/{piece.parameter}:{piece.start}:{piece.stop}": view
        for piece in slices
        for role, view in piece.tensors.items()
    }
    return write_part(run, checkpoint, f"state/rank-{rank:04d}.safetensors", tensors, "state")


def publish(run: Run, manifest: Manifest) -> None:
    """Publish a checkpoint whose parts are all written.

    Raises:
        DamagedCheckpointError: A part is missing or has another size.
        SupersededError: A newer attempt exists, or published this name first.
    """
    name = manifest.name
    for entry in manifest.files:
        path = f"checkpoints/{name}/{entry.path}"
        try:
            size = run.storage.size(path)
        except FileNotFoundError as error:
            raise DamagedCheckpointError(f"{run.url}/{path}: the part is missing") from error
        if size != entry.bytes:
            raise DamagedCheckpointError(f"{run.url}/{path}: {size} bytes, {entry.bytes} were written")
    newest = run.newest_attempt()
    if newest != manifest.attempt:
        raise SupersededError(
            f"{run.url}: attempt {newest} has taken the run over from attempt {manifest.attempt}; "
            "train a run from one place at a time"
        )
    if not run.storage.create(f"checkpoints/{name}/manifest.json", manifest.to_json()):
        raise SupersededError(f"{run.url}: checkpoint {name} was already published by somebody else")


def read_part(run: Run, manifest: Manifest, entry: FileEntry) -> dict[str, Tensor]:
    """Read one part, verified by size and SHA-256.

    Raises:
        DamagedCheckpointError: The part is missing or differs from what was published.
    """
    return safetensors.torch.load(read_verified(_folder(run, manifest), entry))


def read_verified(folder: Storage, record: FileRecord) -> bytes:
    """Read a file, verified by size and SHA-256.

    Raises:
        DamagedCheckpointError: It is missing or differs from what was published.
    """
    where = f"{folder.url}/{record.path}"
    for _ in range(_READS):
        try:
            data = folder.read(record.path)
        except FileNotFoundError as error:
            raise DamagedCheckpointError(f"{where}: the file is missing") from error
        if len(data) == record.bytes and sha256_hex(data) == record.sha256:
            return data
        log.warning("%s: size or SHA-256 differs from the manifest's", where)
    raise DamagedCheckpointError(f"{where}: size or SHA-256 differs from the manifest's; the file is damaged")


def _folder(run: Run, manifest: Manifest) -> Storage:
    return run.storage.child("checkpoints", manifest.name)


def verify(run: Run, manifest: Manifest) -> None:
    """Read every part of a checkpoint and check its size and hash.

    Raises:
        DamagedCheckpointError: Naming the first part that fails.
    """
    for entry in manifest.files:
        read_verified(_folder(run, manifest), entry)


def newest_verified(run: Run) -> Manifest | None:
    """Return the newest live checkpoint whose parts all verify; damaged ones are named in the log.

    Returns:
        None if nothing has been published yet.

    Raises:
        DamagedCheckpointError: There are checkpoints and none verifies: starting from random weights
            would silently abandon the run.
    """
    live = run.live_checkpoints()
    for name in reversed(live):
        manifest = run.manifest(name)
        try:
            verify(run, manifest)
        except DamagedCheckpointError as error:
            log.warning("checkpoint %s is passed over: %s", name, error)
            continue
        return manifest
    if live:
        raise DamagedCheckpointError(
            f"{run.url}: none of the {len(live)} live checkpoints verifies; restore their files, or start "
            "another run"
        )
    return None


def load_state(run: Run, manifest: Manifest, slices: Sequence[Slice]) -> None:
    """Fill the slices' tensors in place from a checkpoint written by any layout.

    Raises:
        DamagedCheckpointError: A part is damaged, or the parts together do not cover the slices.
    """
    missing = {(role, piece.parameter): 0 for piece in slices for role in piece.tensors}
    for piece in slices:
        for role in piece.tensors:
            missing[role, piece.parameter] += piece.stop - piece.start
    wanted: dict[str, list[Slice]] = {}
    for piece in slices:
        wanted.setdefault(piece.parameter, []).append(piece)
    for entry in manifest.files:
        if entry.role != "state":
            continue
        for key, stored in read_part(run, manifest, entry).items():
            role, parameter, start, stop = _parse_key(key)
            for piece in wanted.get(parameter, []):
                if role in piece.tensors:
                    missing[role, parameter] -= _copy_overlap(piece, role, stored, start, stop)
    for (role, parameter), count in missing.items():
        if count != 0:
            raise DamagedCheckpointError(
                f"{run.url}: checkpoint {manifest.name} lacks {count} numbers of {role}/{parameter}"
            )


def _parse_key(key: str) -> tuple[str, str, int, int]:
    role, _, rest = key.partition("/")
    parameter, start, stop = rest.rsplit(":", 2)
    return role, parameter, int(start), int(stop)


def _copy_overlap(piece: Slice, role: str, stored: Tensor, start: int, stop: int) -> int:
    """Copy what `stored` (the range [start, stop)) and the slice share; return how many numbers."""
    first, last = max(piece.start, start), min(piece.stop, stop)
    if first >= last:
        return 0
    with torch.no_grad():
        target = piece.tensors[role][first - piece.start : last - piece.start]
        target.copy_(stored[first - start : last - start])
    return last - first
