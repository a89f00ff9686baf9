"""Averages chosen after training: any power-function average of a run, made of its snapshots.

A reconstruction is a folder: `weights.safetensors` and `recipe.yaml` first, `posthoc.json` last and
create-only. RUN/ema/CHECKPOINT-std0.0500/ is one more EMA profile, `std0.0500`, of that checkpoint to
whatever reads weights.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

import safetensors.torch
import torch
from torch import Tensor

from data_pipeline.documents import Document, sha256_hex
from data_pipeline.errors import UserError
from data_pipeline.progress import Progress
from data_pipeline.storage import Storage
from trainer.checkpoint import WEIGHTS_FILE
from trainer.manifest import FileRecord
from trainer.parts import read_verified
from trainer.power_ema import WIDEST_STD, Fit, PowerAverage, fit
from trainer.recipe import Recipe, parse_recipe
from trainer.run import Run
from trainer.snapshots import Snapshot, SnapshotFile, live_snapshots, read_average

log = logging.getLogger(__name__)

FACTS_FILE: Final = "posthoc.json"
RECIPE_FILE: Final = "recipe.yaml"
LARGE_RESIDUAL: Final = 0.05
"""A worse fit is warned of."""


class Source(FileRecord):
    """A stored average that is part of a reconstruction; its path is relative to the snapshot's folder."""

    snapshot: str
    """Name of the snapshot."""
    profile: str
    std: float
    coefficient: float


class Reconstruction(Document):
    """`posthoc.json`: what was made, and of what.

    Attributes:
        run: Identity of the run.
        checkpoint: Name of the checkpoint of the same moment.
        images: Training images seen.
        std: Relative standard deviation wanted.
        residual: How far the averaging profile is from the wanted one, see `trainer.power_ema.Fit`.
        offered: Stored averages the fit could choose from.
        sources: Those it used.
        recipe_sha: Hash of the recipe beside it.
        weights: The file of weights, float32.
    """

    SCHEMA: ClassVar[str] = "posthoc-ema/1"

    run: str
    checkpoint: str
    images: int
    std: float
    residual: float
    offered: int
    sources: list[Source]
    recipe_sha: str
    weights: FileRecord

    @property
    def ema(self) -> str:
        """Name of these weights among the EMA profiles of the checkpoint."""
        return ema_name(self.std)


@dataclass(frozen=True)
class PosthocOptions:
    """What to make.

    Attributes:
        std: Relative standard deviation.
        images: Which moment's average; None for that of the newest snapshot.
        snapshots: Use the last so many snapshots up to that moment; None for all.
        out: Folder or URL to write to; None for a folder in the run.
    """

    std: float
    images: int | None = None
    snapshots: int | None = None
    out: str | None = None


@dataclass(frozen=True)
class Opened:
    """A reconstruction's folder, its facts and its recipe."""

    storage: Storage
    facts: Reconstruction
    recipe: Recipe

    def weights(self) -> dict[str, Tensor]:
        """Read the whole float32 tensors by parameter, verified.

        Raises:
            DamagedCheckpointError: They fail their hash.
        """
        return safetensors.torch.load(read_verified(self.storage, self.facts.weights))

    def sha256(self) -> str:
        """SHA-256 of posthoc.json: the reconstruction's identity."""
        return sha256_hex(self.storage.read(FACTS_FILE))


def ema_name(std: float) -> str:
    """Name of a reconstruction among the EMA profiles of its checkpoint."""
    short = f"{std:.4f}"
    return f"std{short if float(short) == std else std}"


def reconstruct(run: Run, options: PosthocOptions) -> tuple[str, Reconstruction]:
    """Make the average of any relative standard deviation from a run's snapshots and store it.

    Memory: about 20 bytes per parameter of the network (float64 sums, one stored file, its tensors, and what
    reading leaves behind), however many snapshots there are.

    Returns:
        The folder or URL, and what was made.

    Raises:
        UserError: No such run, no snapshots, none at `images`, an impossible `std`, no stored average of the
            whole training, or the folder holds a reconstruction already.
        DamagedCheckpointError: A stored average fails its hash.
    """
    run.recipe()  # or this is no run
    if not 0 < options.std < WIDEST_STD:
        raise UserError(f"--std {options.std:g}: must be more than 0 and less than {WIDEST_STD:.4f}")
    snapshots = _choose(run, options)
    newest = snapshots[-1]
    place = Storage(options.out) if options.out else _folder(run, newest.name, ema_name(options.std))
    if place.exists(FACTS_FILE):
        raise UserError(f"{place.url}: holds a reconstruction already; use it, or choose another with --out")
    offered = _offered(run, snapshots)
    found = fit(
        [PowerAverage(snapshot.images, file.std) for snapshot, file in offered],
        PowerAverage(newest.images, options.std),
    )
    _warn(found, options, newest)
    coefficients = found.coefficients.tolist()
    used = [(*pair, weight) for pair, weight in zip(offered, coefficients, strict=True) if weight != 0]
    recipe = Recipe.model_validate(run.attempt(newest.attempt).recipe)
    data = safetensors.torch.save(_weighted_sum(run, used))
    place.write(WEIGHTS_FILE, data)
    place.write(RECIPE_FILE, recipe.to_yaml().encode())
    facts = Reconstruction(
        run=newest.run,
        checkpoint=newest.name,
        images=newest.images,
        std=options.std,
        residual=found.residual,
        offered=len(offered),
        sources=[
            Source(snapshot=snapshot.name, coefficient=weight, **file.model_dump())
            for snapshot, file, weight in used
        ],
        recipe_sha=newest.recipe_sha,
        weights=FileRecord(path=WEIGHTS_FILE, bytes=len(data), sha256=sha256_hex(data)),
    )
    if not place.create(FACTS_FILE, facts.to_json()):
        raise UserError(f"{place.url}: somebody else wrote a reconstruction meanwhile; choose --out")
    return place.url, facts


def open_reconstruction(storage: Storage) -> Opened | None:
    """Open a folder that may hold a reconstruction.

    Returns:
        None if it holds none.

    Raises:
        UserError: Its files do not belong together.
    """
    try:
        data = storage.read(FACTS_FILE)
    except FileNotFoundError:
        return None
    facts = Reconstruction.from_json(data, f"{storage.url}/{FACTS_FILE}")
    where = f"{storage.url}/{RECIPE_FILE}"
    try:
        recipe = parse_recipe(storage.read(RECIPE_FILE).decode(), where)
    except FileNotFoundError as error:
        raise UserError(f"{where}: is missing; copy it from the run's directory") from error
    if recipe.sha256 != facts.recipe_sha:
        raise UserError(f"{where}: is not what {FACTS_FILE} names; copy it from the run's directory")
    return Opened(storage, facts, recipe)


def find_reconstruction(run: Run, checkpoint: str, ema: str) -> Opened | None:
    """Return the reconstruction that has this name among a checkpoint's EMA profiles, if there is one."""
    return open_reconstruction(_folder(run, checkpoint, ema))


def reconstruction_names(run: Run, checkpoint: str) -> list[str]:
    """Names of the reconstructions of a checkpoint among its EMA profiles."""
    folders = [name for name in run.storage.list("ema") if name.startswith(f"{checkpoint}-")]
    return [
        folder.removeprefix(f"{checkpoint}-")
        for folder in folders
        if run.storage.exists(f"ema/{folder}/{FACTS_FILE}")
    ]


def _folder(run: Run, checkpoint: str, ema: str) -> Storage:
    return run.storage.child("ema", f"{checkpoint}-{ema}")


def _choose(run: Run, options: PosthocOptions) -> list[Snapshot]:
    """The snapshots to use, the last one being of the wanted moment."""
    live = live_snapshots(run)
    if not live:
        raise UserError(
            f"{run.url}: holds no snapshots; a run keeps them if its recipe has power-function averages, "
            "e.g. ema.short.std=0.05 ema.long.std=0.1"
        )
    images = live[-1].images if options.images is None else options.images
    chosen = [snapshot for snapshot in live if snapshot.images <= images]
    if not chosen or chosen[-1].images != images:
        nearest = min(live, key=lambda snapshot: abs(snapshot.images - images)).images
        raise UserError(f"--at {images}: {run.url} has no snapshot there; the nearest is at {nearest}")
    return chosen if options.snapshots is None else chosen[-options.snapshots :]


def _offered(run: Run, snapshots: Sequence[Snapshot]) -> list[tuple[Snapshot, SnapshotFile]]:
    """The stored averages whose profile had its std in every attempt from the run's start.

    One that was added or changed later (`--allow`) has another averaging profile than its std tells.
    """
    stds = {attempt.attempt: attempt.recipe["ema"] for attempt in run.attempts()}
    lineage = run.lineage()

    def since_the_start(snapshot: Snapshot, file: SnapshotFile) -> bool:
        past = (stds[number] for number in lineage if number <= snapshot.attempt)
        return all(profiles.get(file.profile, {}).get("std") == file.std for profiles in past)

    offered, left_out = [], set()
    for snapshot in snapshots:
        for file in snapshot.files:
            if since_the_start(snapshot, file):
                offered.append((snapshot, file))
            else:
                left_out.add(file.profile)
    names = ", ".join(sorted(left_out))
    if left_out:
        log.warning("%s: added or changed during training, so left out: %s", run.url, names)
    if not offered or offered[-1][0] != snapshots[-1]:
        raise UserError(
            f"{run.url}: snapshot {snapshots[-1].name} holds no average that was tracked from the start "
            f"({names}: added or changed later); choose an earlier one with --at"
        )
    return offered


def _warn(found: Fit, options: PosthocOptions, newest: Snapshot) -> None:
    if found.residual > LARGE_RESIDUAL:
        log.warning(
            "std %g at %d images is not what these snapshots can express: the profile is off by %.1f%%; take "
            "a std nearer to the stored ones (%s), or keep snapshots more often",
            options.std,
            newest.images,
            100 * found.residual,
            ", ".join(sorted({f"{file.std:g}" for file in newest.files})),
        )


def _weighted_sum(run: Run, used: Sequence[tuple[Snapshot, SnapshotFile, float]]) -> dict[str, Tensor]:
    """Add up stored averages in float64, one file in memory at a time; float32 tensors by parameter."""
    sums: dict[str, Tensor] = {}
    with Progress("reconstruct", len(used), "file") as progress:
        for number, (snapshot, file, weight) in enumerate(used, start=1):
            for name, tensor in read_average(run, snapshot, file).items():
                if name not in sums:
                    sums[name] = torch.zeros_like(tensor, dtype=torch.float64)
                sums[name].add_(tensor, alpha=weight)
            progress.update(number)
    return {name: sums.pop(name).float() for name in list(sums)}
