"""Helpers shared by tests: small real runs without training."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from data_pipeline.documents import canonical_json, sha256_hex
from trainer import checkpoint as checkpoints
from trainer.manifest import Manifest, Topology, checkpoint_name
from trainer.parts import write_part
from trainer.recipe import Recipe, load_recipe
from trainer.run import Run
from trainer.unet import UNet

TINY = (
    "model.base_channels=8",
    "model.num_res_blocks=1",
    "model.norm_groups=4",
    "evaluation.quick.samples=8",
    "evaluation.quick.steps=2",
    "evaluation.quick.chunk=4",
)
"""Overrides that make the quickstart recipe's network and protocol tiny."""


def tiny_recipe(overrides: Sequence[str] = ()) -> Recipe:
    return load_recipe("quickstart", [*TINY, *overrides])


def start_training(run: Run, shards: str, arguments: Sequence[str]) -> subprocess.Popen[str]:
    """The quickstart recipe under launch/train.sh, one thread per rank; its output is one text stream."""
    script = str(Path(__file__).parents[1] / "launch" / "train.sh")
    return subprocess.Popen(
        [script, "quickstart", f"run={run.url}", f"data.url={shards}", *arguments],
        env={**os.environ, "DDPM_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def reseal(manifest: dict[str, Any]) -> bytes:
    """Serialise an altered manifest as if it had been written so."""
    unsealed = {key: value for key, value in manifest.items() if key != "sha256"}
    return json.dumps({**unsealed, "sha256": sha256_hex(canonical_json(unsealed))}).encode()


def metric_rows(run: Run, attempts: Sequence[int] = (1,)) -> list[dict[str, Any]]:
    """All rows of metrics that the given attempts published, in order."""
    return [
        json.loads(line)
        for attempt in attempts
        for segment in run.storage.list(f"metrics/{attempt:06d}")
        for line in run.storage.read(f"metrics/{attempt:06d}/{segment}").decode().splitlines()
    ]


def make_run(
    url: str,
    *,
    recipe_overrides: Sequence[str] = (),
    images_list: Sequence[int] = (64, 128),
    seed: int = 0,
    index_sha: str = "0" * 64,
) -> Run:
    """A run directory with one attempt and real checkpoints of a tiny, randomly initialised network."""
    recipe = tiny_recipe(recipe_overrides)
    run = Run(url)
    run.adopt_recipe(recipe)
    attempt = run.claim_attempt(None, "test-host", recipe, index_sha)
    for images in images_list:
        torch.manual_seed(seed + images)
        publish_checkpoint(run, recipe, attempt.attempt, images, UNet(recipe.unet_config()), index_sha)
    return run


def publish_checkpoint(
    run: Run, recipe: Recipe, attempt: int, images: int, model: UNet, index_sha: str
) -> Manifest:
    name = checkpoint_name(images, attempt)
    weights = dict(model.named_parameters())
    parts = [write_part(run, name, checkpoints.WEIGHTS_FILE, weights, "weights")]
    for profile in recipe.ema:
        parts.append(write_part(run, name, checkpoints.ema_file(profile), weights, "ema", ema=profile))
    pieces = [
        checkpoints.Slice(key, 0, value.numel(), {"master": value.detach().flatten()})
        for key, value in weights.items()
    ]
    parts.append(checkpoints.write_state(run, name, 0, pieces))
    draft = Manifest(
        run=run.attempts()[-1].run,
        attempt=attempt,
        images=images,
        position=images,
        updates=images // recipe.batch.total,
        recipe_sha=recipe.sha256,
        index_sha=index_sha,
        topology=Topology(world=1, zero_stage=1, device="cpu"),
    )
    return checkpoints.publish(run, draft, parts)
