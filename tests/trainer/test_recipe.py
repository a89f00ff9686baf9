"""Recipes: the published numbers, overrides, and mistakes named in one line."""

from pathlib import Path

import pytest
import torch

from data_pipeline.errors import UserError
from trainer.recipe import Precision, differences, load_recipe, parse_recipe, recipe_names
from trainer.unet import UNet


def test_every_shipped_recipe_loads_and_round_trips() -> None:
    assert set(recipe_names()) == {
        "quickstart",
        "cifar10",
        "celebahq256",
        "lsun_church",
        "lsun_bedroom",
        "lsun_bedroom_large",
        "lsun_cat",
    }
    for name in recipe_names():
        recipe = load_recipe(name)
        assert parse_recipe(recipe.to_yaml(), name) == recipe


@pytest.mark.parametrize(
    ("name", "parameters", "images", "batch"),
    [
        ("cifar10", 35_746_307, 800_000 * 128, 128),
        ("celebahq256", 113_673_219, 500_000 * 64, 64),
        ("lsun_church", 113_673_219, 1_200_000 * 64, 64),
        ("lsun_bedroom", 113_673_219, 2_400_000 * 64, 64),
        ("lsun_bedroom_large", 255_677_955, 1_150_000 * 64, 64),
        ("lsun_cat", 113_673_219, 1_800_000 * 64, 64),
    ],
)
def test_published_sizes_and_lengths(name: str, parameters: int, images: int, batch: int) -> None:
    recipe = load_recipe(name)
    with torch.device("meta"):
        model = UNet(recipe.unet_config())
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert recipe.train.images == images
    assert recipe.batch.total == batch
    assert recipe.optimizer.warmup_images == 5000 * batch


def test_overrides_are_typed() -> None:
    recipe = load_recipe("cifar10", ["batch.total=64", "precision=fp32", "run=s3://bucket/run", "data.url=x"])
    assert recipe.batch.total == 64
    assert recipe.precision is Precision.FP32
    assert recipe.run == "s3://bucket/run"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch.totl=64", r"unknown key batch\.totl; nearest known: batch\.total"),
        ("modle.dropout=0", r"unknown key modle; nearest known: model"),
        ("ema.main.decy=0.9", r"unknown key ema\.main\.decy; nearest known: ema\.main\.decay"),
        ("batch.total", r"write section\.key=value"),
        ("seed.x=1", r"'seed' is a value"),
        ("batch.total=many", r"batch\.total: "),
        ("batch.micro=100", r"batch\.micro=100 exceeds batch\.total=64"),
        ("precision=fp8", r"precision: "),
        ("model.norm_groups=7", r"norm_groups"),
        ("evaluation.quick.ema=other", r"known: raw, main"),
        ("ema.main.decay=0.9", r"per_images"),
        ("run={", r"not valid YAML"),
        ("optimizer.betas=[2,3]", r"optimizer\.betas"),
        ("optimizer.learning_rate=.inf", r"optimizer\.learning_rate"),
        ("diffusion.beta_start=0.5", r"beta_start exceeds"),
        ("ema.raw={decay: 0.9, per_images: 1}", r"ema\.raw"),
    ],
)
def test_mistakes_are_named_in_one_line(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_recipe("quickstart", [override])
    assert "\n" not in str(caught.value)


def test_unknown_recipes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nearest: quickstart"):
        load_recipe("quikstart")
    with pytest.raises(UserError, match="no such recipe file"):
        load_recipe(str(tmp_path / "mine.yaml"))
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(UserError, match="mapping"):
        load_recipe(str(tmp_path / "list.yaml"))


def test_hash_is_of_the_trajectory_alone() -> None:
    base = load_recipe("quickstart")
    for override in (
        "run=elsewhere",
        "data.url=x",
        "batch.micro=8",
        "train.images=1",
        "logging.every_images=1",
    ):
        assert load_recipe("quickstart", [override]).sha256 == base.sha256, override
    for override in ("seed=1", "batch.total=32", "optimizer.learning_rate=1e-4", "data.window_shards=1"):
        changed = load_recipe("quickstart", [override])
        assert changed.sha256 != base.sha256, override
        assert len(differences(base, changed)) == 1
