"""Weights of a checkpoint for inference; the training state is never needed for that."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipeline.errors import UserError
from trainer.diffusion.process import GaussianDiffusion
from trainer.manifest import FileEntry, Manifest
from trainer.parts import read_part
from trainer.recipe import Recipe
from trainer.run import Run
from trainer.unet import UNet
from trainer.weights.posthoc import find_reconstruction, reconstruction_names


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
        ema: As in `read_weights`.
        device: Where the network goes.

    Raises:
        UserError: The checkpoint holds no such weights.
        CheckpointGoneError: The checkpoint is not published (any more).
        DamagedCheckpointError: The weights fail their hash.
    """
    manifest = run.manifest(name)
    recipe = run.recipe_of(manifest)
    weights = read_weights(run, manifest, ema)
    model = UNet(recipe.unet_config())
    model.load_state_dict(weights, strict=True)
    return Loaded(recipe, manifest, model.to(device).eval(), recipe.build_diffusion())


def read_weights(run: Run, manifest: Manifest, ema: str) -> dict[str, Tensor]:
    """Read a checkpoint's whole float32 tensors by parameter, verified.

    Args:
        run: The run.
        manifest: The checkpoint's.
        ema: Name of an EMA profile; "raw" for the weights themselves; "std0.0500" and its like for an average
            that `ddpm weights ema` has made.

    Raises:
        UserError: The checkpoint holds no such weights.
        DamagedCheckpointError: The weights fail their hash.
    """
    entry = _entry(manifest, ema)
    if entry is not None:
        return read_part(run, manifest, entry)
    made = find_reconstruction(run, manifest.name, ema)
    if made is not None:
        return made.weights()
    known = ["raw", *(entry.ema or "" for entry in manifest.files if entry.role == "ema")]
    known += reconstruction_names(run, manifest.name)
    raise UserError(f"{run.url}: {manifest.name} holds no weights {ema!r}; known: {', '.join(known)}")


def _entry(manifest: Manifest, ema: str) -> FileEntry | None:
    for entry in manifest.files:
        if (ema == "raw" and entry.role == "weights") or (entry.role == "ema" and entry.ema == ema):
            return entry
    return None


def assemble(
    shapes: Mapping[str, torch.Size], pieces: Sequence[tuple[str, int, int, Tensor]]
) -> dict[str, Tensor]:
    """Put whole float32 tensors together from flat pieces (parameter, start, stop, numbers).

    The pieces must cover every tensor exactly once; one that does so alone is not copied.
    """
    whole: dict[str, Tensor] = {}
    covered = dict.fromkeys(shapes, 0)
    for name, start, stop, numbers in pieces:
        covered[name] += stop - start
        if stop - start == shapes[name].numel():
            whole[name] = numbers
        else:
            whole.setdefault(name, torch.empty(shapes[name].numel(), dtype=numbers.dtype))[start:stop] = (
                numbers
            )
    assert all(covered[name] == shape.numel() for name, shape in shapes.items())
    return {name: whole[name].view(shape) for name, shape in shapes.items()}
