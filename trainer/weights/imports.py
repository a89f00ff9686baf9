"""Foreign weights become a published checkpoint: to sample from, to evaluate, to go on training."""

import hashlib
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from data_pipeline.documents import Document
from data_pipeline.errors import UserError
from trainer import checkpoint as checkpoints
from trainer.manifest import (
    ANY_DATA,
    Attempt,
    AttemptEnd,
    FileRecord,
    Manifest,
    Topology,
    checkpoint_name,
)
from trainer.parts import Part, write_part
from trainer.recipe import Recipe
from trainer.run import Run
from trainer.weights.convert import read_foreign
from trainer.weights.detect import Format


class Imported(Document):
    """What an import made, and of what; kept in the run as `import.json`.

    Attributes:
        run: The run directory.
        checkpoint: Name of the checkpoint.
        manifest_sha256: Hash of its manifest.
        images: Training images it counts as having seen.
        format: Where the weights come from.
        files: Files read.
        tensors: Tensors taken.
        parameters: Numbers in them.
        heads: Heads of attention by its channels, which no weights file tells.
        averages: Whether the EMA profiles hold averages of the source; else they hold the weights.
        ema: Names of the EMA profiles.
    """

    SCHEMA: ClassVar[str] = "weights-import/1"

    run: str
    checkpoint: str
    manifest_sha256: str
    images: int
    format: Format
    files: list[FileRecord]
    tensors: int
    parameters: int
    heads: dict[int, int]
    averages: bool
    ema: list[str]


@dataclass(frozen=True)
class ImportOptions:
    """What the source does not tell.

    Attributes:
        images: Training images the checkpoint shall count as having seen.
        new_attention_order: Of OpenAI's weights: queries, keys and values of all heads lie apart.
    """

    images: int = 0
    new_attention_order: bool = False


def import_weights(place: str, recipe: Recipe, run: Run, options: ImportOptions) -> Imported:
    """Publish foreign weights as the first checkpoint of a new run.

    Args:
        place: File or folder of the weights, see `read_foreign`.
        recipe: Network and process they belong to; adopted by the run.
        run: The run directory; nothing may have been started in it.
        options: What the source does not tell.

    Returns:
        What was made.

    Raises:
        UserError: The weights cannot be opened safely, or are of another network or process than the recipe's
            (key or first wrong tensor is named), or come with averages and have seen no images, or the run
            directory is in use.
    """
    if run.has_recipe() or run.newest_attempt():
        raise UserError(f"{run.url}: holds a run already; import into another directory")
    found = read_foreign(place, recipe, options.new_attention_order)
    if found.has_averages and options.images == 0:
        raise UserError(
            f"{place}: holds averages beside the weights, and a run's first update, at 0 images, copies the "
            "weights over them; say with --images how many they have seen, e.g. --images 102400000"
        )
    config = recipe.unet_config()
    run.storage.prove_create_only()
    run.adopt_recipe(recipe)
    attempt = run.claim_attempt(None, socket.gethostname(), recipe, ANY_DATA)
    name = checkpoint_name(options.images, attempt.attempt)
    parts = _write_parts(run, name, recipe, found.weights, found.averages)
    checkpoints.publish(run, _manifest(attempt, recipe, options.images), parts)
    facts = Imported(
        run=run.url,
        checkpoint=name,
        manifest_sha256=run.manifest_sha256(name),
        images=options.images,
        format=found.format,
        files=[_describe(path) for path in found.source.files],
        tensors=len(found.weights),
        parameters=sum(tensor.numel() for tensor in found.weights.values()),
        heads={width: config.heads(width) for width in config.attention_widths},
        averages=found.has_averages,
        ema=list(recipe.ema),
    )
    run.storage.write("import.json", facts.to_json())
    end = AttemptEnd(attempt=attempt.attempt, outcome="finished", images=options.images, checkpoint=name)
    run.end_attempt(end)
    return facts


def _write_parts(
    run: Run, name: str, recipe: Recipe, weights: Mapping[str, Tensor], averages: Mapping[str, Tensor]
) -> list[Part]:
    """Write all parts of the checkpoint as training would: Adam's moments are zero."""
    parts = [write_part(run, name, checkpoints.WEIGHTS_FILE, weights, "weights")]
    for profile in recipe.ema:
        file = checkpoints.ema_file(profile)
        parts.append(write_part(run, name, file, averages, "ema", ema=profile))
    slices = []
    for parameter, tensor in weights.items():
        master = tensor.flatten()
        state = {
            "master": master,
            "exp_avg": torch.zeros_like(master),
            "exp_avg_sq": torch.zeros_like(master),
        }
        state |= {f"ema.{profile}": averages[parameter].flatten() for profile in recipe.ema}
        slices.append(checkpoints.Slice(parameter, 0, tensor.numel(), state))
    return [*parts, checkpoints.write_state(run, name, 0, slices)]


def _manifest(attempt: Attempt, recipe: Recipe, images: int) -> Manifest:
    return Manifest(
        run=attempt.run,
        attempt=attempt.attempt,
        images=images,
        position=images,
        # Adam's count of updates belongs to its moments, and those begin here: with any other count the first
        # updates, their bias not corrected, would be several times too large.
        updates=0,
        recipe_sha=attempt.recipe_sha,
        index_sha=ANY_DATA,
        topology=Topology(world=1, zero_stage=recipe.deepspeed.zero_stage, device="cpu"),
    )


def _describe(path: Path) -> FileRecord:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileRecord(path=str(path), bytes=path.stat().st_size, sha256=digest)
