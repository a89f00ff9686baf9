"""Recipes: the published numbers, overrides, and mistakes named in one line."""

from pathlib import Path

import pytest
import torch
import yaml

from data_pipeline.errors import UserError
from trainer.recipe import differences, load_recipe, parse_recipe, recipe_names, recipe_text
from trainer.recipe_sections import Precision
from trainer.unet import UNet


def test_every_shipped_recipe_loads_and_round_trips() -> None:
    assert set(recipe_names()) == {
        "quickstart",
        "cifar10",
        "cifar10_small",
        "celebahq256",
        "lsun_church",
        "lsun_bedroom",
        "lsun_bedroom_large",
        "lsun_cat",
        "lsun_bedroom_code",
        "lsun_cat_code",
        "lsun_church_released",
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


@pytest.mark.parametrize(
    ("name", "twin", "difference"),
    [
        ("lsun_bedroom", "lsun_bedroom_code", "image.flip: False -> True"),
        ("lsun_cat", "lsun_cat_code", "image.flip: True -> False"),
    ],
)
def test_paper_and_code_are_twins_but_for_the_flips(name: str, twin: str, difference: str) -> None:
    assert list(differences(load_recipe(name), load_recipe(twin)).values()) == [difference]


def test_church_as_released_is_longer() -> None:
    paper, released = load_recipe("lsun_church"), load_recipe("lsun_church_released")
    assert released.train.images == 4_432_000 * 64
    assert released.sha256 == paper.sha256, "the same trajectory, only longer"


def test_published_recipes_are_complete() -> None:
    """Nothing of the paper is left to a default that could change."""
    for name in ("cifar10", "celebahq256", "lsun_church", "lsun_bedroom", "lsun_bedroom_large", "lsun_cat"):
        content = yaml.safe_load(recipe_text(name))
        for section in ("image", "model", "diffusion", "loss", "batch", "optimizer", "ema", "train"):
            assert section in content, f"{name}: {section}"
        assert {"profile", "num_heads", "norm_groups", "dropout"} <= content["model"].keys()
        assert set(content["diffusion"]) == set(type(load_recipe(name).diffusion).model_fields)
        assert set(content["optimizer"]) == set(type(load_recipe(name).optimizer).model_fields)


def test_a_recipe_may_extend_a_shipped_one(tmp_path: Path) -> None:
    text = "extends: cifar10\nimage: {flip: false}\nema: {fast: {decay: 0.99, per_images: 128}}"
    mine = parse_recipe(text, "mine.yaml")
    assert mine.image.flip is False
    assert mine.image.size == 32
    assert set(mine.ema) == {"paper", "fast"}
    for base in ("cifar", "[]", "mine.yaml"):
        with pytest.raises(UserError, match=r"mine\.yaml: extends: .* no other shipped recipe: .*cifar10"):
            parse_recipe(f"extends: {base}", "mine.yaml")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["diffusion.variance=learned"], "learned"),
        (["loss.kind=hybrid"], "hybrid"),
        (["loss.kind=vb", "loss.weighting=p2"], "p2"),
        (["diffusion.schedule=jsd"], "eps"),
        (["loss.timesteps=loss-aware"], r"loss\.refresh_every_images"),
        (["loss.refresh_every_images=64"], r"loss\.timesteps=loss-aware"),
        (["model.num_heads=1", "model.head_channels=8"], "head"),
        (["model.num_heads=3"], "3"),
        (["model.block_size=5"], "block_size"),
    ],
)
def test_what_cannot_go_together(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_recipe("cifar10", overrides)
    assert "\n" not in str(caught.value)


def test_learned_variances_double_the_output() -> None:
    recipe = load_recipe("cifar10", ["diffusion.variance=learned-range", "loss.kind=hybrid"])
    assert recipe.unet_config().out_channels == 6


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


def test_null_takes_a_profile_of_the_extended_recipe_out() -> None:
    assert set(load_recipe("cifar10").ema) == {"paper"}
    assert set(load_recipe("cifar10_small").ema) == {"main", "narrow", "wide"}


def test_a_section_that_is_not_there_can_be_given_key_by_key() -> None:
    stored = load_recipe("quickstart").to_yaml()
    assert "wandb: null" in stored
    recipe = parse_recipe(stored, "stored", ["logging.wandb.project=mine"])
    assert recipe.logging.wandb is not None
    assert recipe.logging.wandb.project == "mine"
    with pytest.raises(UserError, match=r"unknown key logging\.wandb\.projct; nearest .*\.project"):
        parse_recipe(stored, "stored", ["logging.wandb.project=mine", "logging.wandb.projct=mine"])
