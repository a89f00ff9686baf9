"""A run whose weights walked at random, with averages tracked on the way and snapshots of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tests.support import publish_checkpoint
from tests.trainer.weights_support import small_recipe
from trainer.ema import PartitionedEma
from trainer.manifest import Manifest, Topology
from trainer.recipe import Recipe
from trainer.recipe_sections import EmaProfile
from trainer.run import Run
from trainer.snapshots import snapshot_is_due, write_snapshot
from trainer.unet import UNet

POWER = ("ema.short.std=0.05", "ema.long.std=0.1")
SHA = "0" * 64
BATCH = 64


def manifest_of(run: Run, recipe: Recipe, attempt: int, images: int) -> Manifest:
    return Manifest(
        run=run.attempts()[-1].run,
        attempt=attempt,
        images=images,
        position=images,
        updates=images // recipe.batch.total,
        recipe_sha=recipe.sha256,
        index_sha=SHA,
        topology=Topology(world=1, zero_stage=1, device="cpu"),
        files=[],
    )


@dataclass(frozen=True)
class Walk:
    """What came of it.

    Attributes:
        run: The run, with a checkpoint at the end and a snapshot at every multiple of 16 updates.
        recipe: Its recipe.
        averages: Whole tensors at the end by the recipe's profiles and, for `extra` ones, by their std.
        images: Training images at the end.
    """

    run: Run
    recipe: Recipe
    averages: dict[str, dict[str, Tensor]]
    images: int


def walked_run(
    url: Path, *, updates: int = 256, extra: Sequence[float] = (), overrides: Sequence[str] = ()
) -> Walk:
    """Walk; the masters of two ranks lie in two partitions, as in training."""
    every = f"checkpoint.every_images={16 * BATCH}"
    recipe, run = small_recipe([*POWER, every, *overrides]), Run(str(url))
    run.adopt_recipe(recipe)
    attempt = run.claim_attempt(None, "test-host", recipe, SHA).attempt
    model = UNet(recipe.unet_config(), torch.Generator().manual_seed(0))
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    numbers = sum(shape.numel() for shape in shapes.values())
    ranks = torch.split(torch.cat([p.detach().flatten() for p in model.parameters()]), numbers // 2 + 1)
    profiles = {**recipe.ema, **{f"{std}": EmaProfile(std=std) for std in extra}}
    ema = PartitionedEma(profiles, ranks)
    generator = torch.Generator().manual_seed(1)
    for images in range(0, updates * BATCH, BATCH):
        for rank in ranks:
            rank += 0.01 * torch.randn(rank.shape, generator=generator)
        ema.update(images, BATCH)
        if snapshot_is_due(recipe, images, images + BATCH):
            manifest = manifest_of(run, recipe, attempt, images + BATCH)
            write_snapshot(run, manifest, whole(ema, shapes), recipe.ema)
    flat = torch.cat(ranks)
    with torch.no_grad():
        for parameter, piece in zip(model.parameters(), _split(flat, shapes), strict=True):
            parameter.copy_(piece)
    publish_checkpoint(run, recipe, attempt, updates * BATCH, model, SHA)
    return Walk(run, recipe, whole(ema, shapes), updates * BATCH)


def whole(ema: PartitionedEma, shapes: dict[str, torch.Size]) -> dict[str, dict[str, Tensor]]:
    return {
        profile: dict(zip(shapes, _split(torch.cat(flats), shapes), strict=True))
        for profile, flats in ema.flats.items()
    }


def _split(flat: Tensor, shapes: dict[str, torch.Size]) -> list[Tensor]:
    pieces = torch.split(flat, [shape.numel() for shape in shapes.values()])
    return [piece.view(shape).clone() for piece, shape in zip(pieces, shapes.values(), strict=True)]


def distance(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Norm of the difference relative to the norm of the right one, over all tensors."""
    assert left.keys() == right.keys()
    a, b = (torch.cat([side[name].double().flatten() for name in right]) for side in (left, right))
    return float((a - b).norm() / b.norm())
