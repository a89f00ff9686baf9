"""Snapshots: the power-function averages at many image counts, kept for good so that others can be made.

An average of any other width is a weighted sum of stored ones (`trainer.power_ema`), old ones included,
while retention removes old checkpoints. So these averages are stored beside the checkpoints:
RUN/snapshots/NAME/, files first, `manifest.json` last and create-only. NAME is that of the checkpoint of the
same moment, whether or not there is one; where there is one, the same numbers are written twice.
"""

import logging
from collections.abc import Mapping
from typing import ClassVar

import safetensors.torch
from torch import Tensor

from data_pipeline.documents import Document, sha256_hex
from trainer.checkpoint import SupersededError, check_newest, ema_file
from trainer.clock import is_due
from trainer.manifest import FileRecord, Manifest, checkpoint_name, is_checkpoint_name, parse_checkpoint_name
from trainer.parts import read_verified
from trainer.recipe import Recipe
from trainer.recipe_sections import EmaProfile
from trainer.run import Run

log = logging.getLogger(__name__)


class SnapshotFile(FileRecord):
    """One average: whole float32 tensors by parameter; its path is relative to the snapshot's folder."""

    profile: str
    """Name of the EMA profile."""
    std: float
    """Its relative standard deviation."""


class Snapshot(Document):
    """`manifest.json`: the snapshot exists if and only if it does."""

    SCHEMA: ClassVar[str] = "ema-snapshot/1"

    run: str
    attempt: int
    images: int
    """Training images seen."""
    recipe_sha: str
    files: list[SnapshotFile]

    @property
    def name(self) -> str:
        """Name of its folder."""
        return checkpoint_name(self.images, self.attempt)


def power_profiles(profiles: Mapping[str, EmaProfile]) -> dict[str, float]:
    """Relative standard deviations of the power-function profiles, by name; the others cannot be combined."""
    return {name: profile.std for name, profile in profiles.items() if profile.std is not None}


def snapshot_is_due(recipe: Recipe, before: int, after: int) -> bool:
    """Tell whether the update from `before` to `after` images ends where a snapshot belongs.

    Whether or not it does, one belongs at the end of an attempt.
    """
    every = recipe.checkpoint.snapshot_every_images or recipe.checkpoint.every_images
    return bool(power_profiles(recipe.ema)) and is_due(every, before, after)


def write_snapshot(
    run: Run,
    manifest: Manifest,
    averages: Mapping[str, Mapping[str, Tensor]],
    profiles: Mapping[str, EmaProfile],
) -> None:
    """Publish a snapshot; nothing is written if there is no power-function profile. Rank 0 alone.

    Written before the checkpoint of the same moment it is there whenever that is; one whose checkpoint was
    never published lies beyond what the next attempt resumes from, and is not live.

    Args:
        run: The run.
        manifest: Of the checkpoint of this moment, published or not; its files do not matter.
        averages: Whole float32 tensors by EMA profile and parameter.
        profiles: The recipe's.

    Raises:
        SupersededError: A newer attempt exists.
    """
    wanted = power_profiles(profiles)
    if not wanted:
        return
    files = []
    for profile, std in wanted.items():
        data = safetensors.torch.save(
            {name: tensor.detach().cpu().contiguous() for name, tensor in averages[profile].items()}
        )
        path = ema_file(profile)
        run.storage.write(f"snapshots/{manifest.name}/{path}", data)
        files.append(
            SnapshotFile(path=path, bytes=len(data), sha256=sha256_hex(data), profile=profile, std=std)
        )
    snapshot = Snapshot(
        run=manifest.run,
        attempt=manifest.attempt,
        images=manifest.images,
        recipe_sha=manifest.recipe_sha,
        files=files,
    )
    check_newest(run, snapshot.attempt)
    if not run.storage.create(_manifest_path(snapshot.name), snapshot.to_json()):
        raise SupersededError(f"{run.url}: snapshot {snapshot.name} was already published by somebody else")


def live_snapshots(run: Run) -> list[Snapshot]:
    """Return the snapshots of the newest attempt's lineage, by images.

    Raises:
        UserError: A manifest is damaged or of another version.
    """
    limits = run.lineage()
    found = []
    for name in filter(is_checkpoint_name, run.storage.list("snapshots")):
        images, attempt = parse_checkpoint_name(name)
        limit = limits.get(attempt, -1)  # of an attempt outside the lineage nothing is live
        if limit is not None and images > limit:
            continue
        try:
            data = run.storage.read(_manifest_path(name))
        except FileNotFoundError:
            continue  # being written, or broken off
        found.append(Snapshot.from_json(data, f"{run.url}/{_manifest_path(name)}"))
    return sorted(found, key=lambda snapshot: snapshot.images)


def read_average(run: Run, snapshot: Snapshot, file: SnapshotFile) -> dict[str, Tensor]:
    """Read one average's whole float32 tensors by parameter, verified by size and SHA-256.

    Raises:
        DamagedCheckpointError: The file is missing or differs from what was published.
    """
    return safetensors.torch.load(read_verified(run.storage.child("snapshots", snapshot.name), file))


def _manifest_path(snapshot: str) -> str:
    return f"snapshots/{snapshot}/manifest.json"
