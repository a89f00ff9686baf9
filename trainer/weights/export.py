"""A checkpoint becomes a folder that diffusers' `DDPMPipeline.from_pretrained` samples from."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final, Self

import safetensors.torch
from torch import Tensor

from data_pipeline.documents import Document, sha256_hex
from data_pipeline.errors import UserError
from trainer.manifest import FileRecord, is_checkpoint_name
from trainer.recipe import Recipe
from trainer.run import Run, worker_name
from trainer.weights.formats import diffusers
from trainer.weights.formats.diffusers import unet_json
from trainer.weights.formats.diffusers_scheduler import scheduler_json
from trainer.weights.inference import read_weights
from trainer.weights.names import Correspondence, Network, correspondences, to_theirs
from trainer.weights.posthoc import Opened

_WRITTEN_FOR: Final = "0.35.0"
"""The oldest release of diffusers that the folder was made for."""
_INDEX: Final = "model_index.json"
"""Written last: a folder without it is an unfinished export."""


class Exported(Document):
    """What an export made, and of what.

    Attributes:
        folder: Where it lies.
        format: For whom.
        checkpoint: Name of the checkpoint.
        manifest_sha256: Hash of its manifest, or of a reconstruction's posthoc.json: the identity.
        images: Training images it has seen.
        ema: Weights used.
        files: Files written, in the order written.
    """

    SCHEMA: ClassVar[str] = "weights-export/1"

    folder: str
    format: str
    checkpoint: str
    manifest_sha256: str
    images: int
    ema: str
    files: list[FileRecord]


def split_place(place: str) -> tuple[str, str | None]:
    """Split RUN/checkpoints/NAME into the run and the checkpoint's name; a run alone has no name."""
    parent, _, name = place.rstrip("/").rpartition("/")
    run, _, folder = parent.rpartition("/")
    return (run, name) if run and folder == "checkpoints" and is_checkpoint_name(name) else (place, None)


def export_diffusers(
    run: Run, folder: Path, *, checkpoint: str | None = None, ema: str | None = None
) -> Exported:
    """Write a checkpoint as a diffusers folder.

    Args:
        run: The run.
        folder: Where to; it must not exist or be empty.
        checkpoint: Name of the checkpoint; None for the newest live one.
        ema: EMA profile, or "raw"; None as `Recipe.default_ema`.

    Returns:
        What was written.

    Raises:
        UserError: No such run, checkpoint or weights; or diffusers cannot express the network or the process
            (the recipe's key is named); or the folder is not empty or cannot be written.
        CheckpointGoneError: Retention removed the checkpoint.
        DamagedCheckpointError: The weights fail their hash.
    """
    recipe = run.recipe()
    ema = ema or recipe.default_ema
    expressed = _Expressed.of(recipe)
    name = run.select(checkpoint)
    _claim(folder)
    with run.pin(name, worker_name()) as pin:
        weights = read_weights(run, pin.manifest, ema)
        origin = _Origin(name, run.manifest_sha256(name), pin.manifest.images, ema)
    return _write_folder(folder, recipe, expressed, weights, origin)


def export_reconstruction(made: Opened, folder: Path) -> Exported:
    """Write an average that was made of snapshots as a diffusers folder.

    Args:
        made: The reconstruction.
        folder: Where to; it must not exist or be empty.

    Returns:
        What was written.

    Raises:
        UserError: As `export_diffusers`.
        DamagedCheckpointError: The weights fail their hash.
    """
    expressed = _Expressed.of(made.recipe)
    _claim(folder)
    origin = _Origin(made.facts.checkpoint, made.sha256(), made.facts.images, made.facts.ema)
    return _write_folder(folder, made.recipe, expressed, made.weights(), origin)


@dataclass(frozen=True)
class _Expressed:
    """A recipe in diffusers' words."""

    unet: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    table: list[Correspondence]

    @classmethod
    def of(cls, recipe: Recipe) -> Self:
        """Raises UserError where diffusers has no word."""
        config = recipe.unet_config()
        unet, scheduler = unet_json(config), scheduler_json(recipe)
        return cls(
            unet.model_dump(mode="json"),
            scheduler.model_dump(mode="json"),
            correspondences(diffusers.NAMING, Network.of(config)),
        )


@dataclass(frozen=True)
class _Origin:
    """Whose weights are written; as in `Exported`."""

    checkpoint: str
    manifest_sha256: str
    images: int
    ema: str


def _write_folder(
    folder: Path, recipe: Recipe, expressed: _Expressed, weights: Mapping[str, Tensor], origin: _Origin
) -> Exported:
    version = {"_diffusers_version": _WRITTEN_FOR}
    contents = {
        "unet/diffusion_pytorch_model.safetensors": _safetensors(to_theirs(expressed.table, weights)),
        "unet/config.json": _json({"_class_name": "UNet2DModel", **version, **expressed.unet}),
        "scheduler/scheduler_config.json": _json(
            {"_class_name": "DDPMScheduler", **version, **expressed.scheduler}
        ),
        "README.md": _card(recipe, origin).encode(),
        _INDEX: _json(
            {
                "_class_name": "DDPMPipeline",
                **version,
                "scheduler": ["diffusers", "DDPMScheduler"],
                "unet": ["diffusers", "UNet2DModel"],
            }
        ),
    }
    return Exported(
        folder=str(folder),
        format="diffusers",
        checkpoint=origin.checkpoint,
        manifest_sha256=origin.manifest_sha256,
        images=origin.images,
        ema=origin.ema,
        files=[_write(folder, path, data) for path, data in contents.items()],
    )


def _claim(folder: Path) -> None:
    """Make the folder, or see that it is empty.

    Raises:
        UserError: It is not, or cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise UserError(
            f"{folder}: no folder can be made there ({error.strerror}); choose another"
        ) from error
    if held:
        unfinished = "" if _INDEX in held else f" (without {_INDEX}, so no finished export)"
        raise UserError(f"{folder}: holds {held[0]} already{unfinished}; choose an empty folder or a new one")


def _write(folder: Path, path: str, data: bytes) -> FileRecord:
    try:
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(data)
    except OSError as error:
        raise UserError(
            f"{folder / path}: cannot be written ({error.strerror}); choose another folder"
        ) from error
    return FileRecord(path=path, bytes=len(data), sha256=sha256_hex(data))


def _safetensors(tensors: Mapping[str, Tensor]) -> bytes:
    # The metadata names the framework that wrote the tensors; readers of these folders ask for it.
    return safetensors.torch.save(dict(tensors), metadata={"format": "pt"})


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=2, allow_nan=False).encode() + b"\n"


def _card(recipe: Recipe, origin: _Origin) -> str:
    size, steps = recipe.image.size, recipe.diffusion.num_timesteps
    return f"""---
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags:
- ddpm
---

# DDPM, {size}x{size} pixels

Trained by ddpm-foundry: checkpoint `{origin.checkpoint}` ({origin.images} training images, weights
`{origin.ema}`), manifest SHA-256 `{origin.manifest_sha256}`.

```python
from diffusers import DDPMPipeline

pipeline = DDPMPipeline.from_pretrained("path/to/this/folder")
pictures = pipeline(batch_size=16, num_inference_steps={steps}).images
```

A number of steps that divides {steps} is faster; the weights are float32.
"""
