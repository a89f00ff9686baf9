"""Weights of a checkpoint for inference; the training state is never needed for that."""

from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipeline.errors import UserError
from trainer.checkpoint import read_part
from trainer.diffusion.process import GaussianDiffusion
from trainer.manifest import FileEntry, Manifest
from trainer.recipe import Recipe
from trainer.run import Run
from trainer.unet import UNet


@dataclass(frozen=True)
class Loaded:
    """A checkpoint ready to sample from: the network is in evaluation mode, float32, on its device."""

    recipe: Recipe
    manifest: Manifest
    model: UNet
    diffusion: GaussianDiffusion


def load_for_inference(run: Run, name: str, *, ema: str, device: torch.device | str) -> Loaded:
    """Load a published checkpoint's network.

    Args:
        run: The run.
        name: The checkpoint's name.
        ema: Name of an EMA profile, or "raw" for the weights themselves.
        device: Where the network goes.

    Raises:
        UserError: The checkpoint holds no such EMA profile.
        CheckpointGoneError: The checkpoint is not published (any more).
        DamagedCheckpointError: The weights fail their hash.
    """
    recipe, manifest = run.recipe(), run.manifest(name)
    weights = read_weights(run, manifest, ema)
    model = UNet(recipe.unet_config())
    model.load_state_dict(weights, strict=True)
    return Loaded(recipe, manifest, model.to(device).eval(), recipe.build_diffusion())


def read_weights(run: Run, manifest: Manifest, ema: str) -> dict[str, Tensor]:
    """Read a checkpoint's whole float32 tensors by parameter, verified.

    Args:
        run: The run.
        manifest: The checkpoint's.
        ema: Name of an EMA profile, or "raw" for the weights themselves.

    Raises:
        UserError: The checkpoint holds no such EMA profile.
        DamagedCheckpointError: The weights fail their hash.
    """
    return read_part(run, manifest, _entry(run, manifest, ema))


def _entry(run: Run, manifest: Manifest, ema: str) -> FileEntry:
    for entry in manifest.files:
        if (ema == "raw" and entry.role == "weights") or (entry.role == "ema" and entry.ema == ema):
            return entry
    known = ["raw", *(entry.ema or "" for entry in manifest.files if entry.role == "ema")]
    raise UserError(f"{run.url}: {manifest.name} holds no weights {ema!r}; known: {', '.join(known)}")


def assemble(shapes: dict[str, torch.Size], pieces: list[tuple[str, int, int, Tensor]]) -> dict[str, Tensor]:
    """Put whole float32 tensors together from flat pieces (parameter, start, stop, numbers).

    The pieces must cover every tensor exactly once.
    """
    flat = {name: torch.empty(shape.numel(), dtype=torch.float32) for name, shape in shapes.items()}
    covered = dict.fromkeys(shapes, 0)
    for name, start, stop, numbers in pieces:
        flat[name][start:stop] = numbers
        covered[name] += stop - start
    assert all(covered[name] == shape.numel() for name, shape in shapes.items())
    return {name: flat[name].view(shapes[name]) for name in shapes}
