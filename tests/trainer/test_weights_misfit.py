"""Import of weights that do not fit: what the recipe would have to say is told in one line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler

from data_pipeline.errors import UserError
from tests.trainer.weights_support import (
    OPENAI,
    PAPER,
    bring,
    diffusers_unet,
    openai_unet,
    other,
    paper_recipe,
    paper_variables,
    save,
)
from trainer.weights.convert import take
from trainer.weights.formats import openai, pesser
from trainer.weights.formats.diffusers import compare_unet
from trainer.weights.formats.diffusers_scheduler import compare_scheduler
from trainer.weights.formats.tensorflow import sort_variables
from trainer.weights.names import Naming, Network

OURS = Network.of(PAPER)


def nothing_was_made(run: Path) -> bool:
    return not run.exists() or not list(run.iterdir())


CONFIG_FAULTS: list[tuple[dict[str, Any], tuple[str, ...], str]] = [
    ({}, ("model.profile=diffusers",), r"freq_shift is 1, .*set model\.profile=ho"),
    ({"norm_eps": 1e-5}, (), r"norm_eps is 1e-05, .*no model\.profile combines freq_shift=1"),
    ({"attention_head_dim": 8}, (), r"attention_head_dim is 8, .*set model\.head_channels=8"),
    (
        {},
        ("model.num_heads=2",),
        r"attention_head_dim is None, .* 2 at 32 and 2 at 64 channels; set model\.num_heads=1",
    ),
    ({}, ("image.size=32",), r"sample_size is 16, .*set image\.size=16"),
    ({}, ("model.num_res_blocks=3",), r"layers_per_block is 1, .* 3; set model\.num_res_blocks=1"),
    (
        {},
        ("model.channel_multipliers=[1,2,2]",),
        r"block_out_channels is \[32, 32, 64\], .*set model\.base_channels=32 .*=\[1,1,2\]",
    ),
    ({}, ("model.attention_resolutions=[16]",), r"down_block_types is .*set model\.attention_resolutions"),
    (
        {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 32},
        (),
        r"resnet_time_scale_shift is scale_shift, .*set model\.scale_shift_norm=true",
    ),
    (
        {"resnet_time_scale_shift": "scale_shift"},
        ("model.scale_shift_norm=true",),
        "attn_norm_num_groups is None",
    ),
    ({"downsample_type": "resnet"}, (), "downsample_type is resnet, .*our network has no such option"),
    ({"add_attention": False}, (), "add_attention is False, .*our network has no such option"),
    ({}, ("model.norm_groups=16",), r"norm_num_groups is 32, .*set model\.norm_groups=32"),
    (
        {},
        (
            "diffusion.variance=learned-range",
            "loss.kind=hybrid",
        ),
        r"out_channels is 3, .* 6; set diffusion\.variance",
    ),
]


@pytest.mark.parametrize(("options", "overrides", "message"), CONFIG_FAULTS)
def test_conventions_of_a_folder(options: dict[str, Any], overrides: tuple[str, ...], message: str) -> None:
    theirs = json.loads(diffusers_unet(PAPER, **options).to_json_string())
    with pytest.raises(UserError, match="config: " + message):
        compare_unet(theirs, paper_recipe(overrides).unet_config(), "config")


SCHEDULER_FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"prediction_type": "v_prediction"}, r"prediction_type is v_prediction, .*set diffusion\.prediction=v"),
    ({"num_train_timesteps": 500}, r"there are 500 timesteps, .*set diffusion\.num_timesteps=500"),
    ({"beta_end": 0.03}, r"runs from 0\.0001 to 0\.03, .*diffusion\.beta_end"),
    ({"beta_schedule": "squaredcos_cap_v2"}, r"set diffusion\.schedule=cosine"),
    ({"beta_schedule": "sigmoid"}, "beta_schedule is sigmoid; a recipe can have linear"),
    ({"trained_betas": [0.1] * 1000}, "beta_schedule trained_betas runs from 0.1 to 0.1"),
    ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr is set"),
]


@pytest.mark.parametrize(("options", "message"), SCHEDULER_FAULTS)
def test_the_process_of_a_folder(options: dict[str, Any], message: str) -> None:
    theirs = json.loads(DDPMScheduler(**options).to_json_string())
    with pytest.raises(UserError, match="config: .*" + message):
        compare_scheduler(theirs, paper_recipe(), "config")


def test_both_are_compared(tmp_path: Path) -> None:
    DDPMPipeline(diffusers_unet(PAPER), DDPMScheduler(beta_end=0.03)).save_pretrained(tmp_path / "theirs")
    with pytest.raises(UserError, match=r"unet/config\.json: sample_size"):
        bring(tmp_path / "theirs", tmp_path / "run", ("image.size=32",))
    with pytest.raises(UserError, match=r"scheduler/scheduler_config\.json: beta_schedule linear"):
        bring(tmp_path / "theirs", tmp_path / "run")
    assert nothing_was_made(tmp_path / "run")


@pytest.mark.parametrize(
    ("options", "overrides"),
    [
        ({}, ()),
        ({"beta_schedule": "scaled_linear"}, ("diffusion.schedule=quadratic",)),
        ({"beta_schedule": "squaredcos_cap_v2"}, ("diffusion.schedule=cosine",)),
        (
            {"num_train_timesteps": 2, "trained_betas": [0.5, 1.0], "prediction_type": "sample"},
            ("diffusion.schedule=jsd", "diffusion.num_timesteps=2", "diffusion.prediction=x0"),
        ),
    ],
)
def test_other_schedules_of_a_folder(options: dict[str, Any], overrides: tuple[str, ...]) -> None:
    theirs, recipe = DDPMScheduler(**options), paper_recipe(("evaluation.quick.steps=2", *overrides))
    compare_scheduler(json.loads(theirs.to_json_string()), recipe, "config")
    assert recipe.build_diffusion().schedule.betas == pytest.approx(theirs.betas.numpy(), rel=1e-5)


def test_another_variance_is_said(caplog: pytest.LogCaptureFixture) -> None:
    compare_scheduler({"variance_type": "fixed_small"}, paper_recipe(), "config")
    assert "config: variance_type is fixed_small; `ddpm sample` goes by" in caplog.text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model.profile=openai",), r"weights of pesser follow other conventions .*set model\.profile=ho"),
        (("model.norm_groups=16",), r"set model\.norm_groups=32"),
        (("model.num_heads=4",), r"attend with one head; set model\.num_heads=1"),
        (("model.block_size=2", "model.attention_resolutions=[4]"), r"set model\.block_size=1"),
    ],
)
def test_conventions_the_paper_takes_for_granted(
    tmp_path: Path, overrides: tuple[str, ...], message: str
) -> None:
    save(paper_variables(PAPER, "pesser")[0], tmp_path / "model.ckpt")
    with pytest.raises(UserError, match=message):
        bring(tmp_path / "model.ckpt", tmp_path / "run", overrides)
    assert nothing_was_made(tmp_path / "run")


def test_conventions_openai_takes_for_granted(tmp_path: Path) -> None:
    torch.save(openai_unet(PAPER, num_heads=4).state_dict(), tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"set model\.profile=openai"):
        bring(tmp_path / "model.pt", tmp_path / "run")


@pytest.mark.parametrize(
    ("options", "name"),
    [({"resblock_updown": True}, "resblock_updown=True"), ({"conv_resample": False}, "conv_resample=False")],
)
def test_resampling_of_openai_that_we_do_not_have(tmp_path: Path, options: dict[str, Any], name: str) -> None:
    torch.save(openai_unet(PAPER, num_heads=4, **options).state_dict(), tmp_path / "model.pt")
    with pytest.raises(UserError, match=f"a network of OpenAI's with {name}"):
        bring(tmp_path / "model.pt", tmp_path / "run", OPENAI)


def test_rescaled_timesteps_of_openai_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save(openai_unet(PAPER, num_heads=4).state_dict(), tmp_path / "model.pt")
    bring(tmp_path / "model.pt", tmp_path / "run", (*OPENAI, "diffusion.num_timesteps=4000"))
    assert "rescale_timesteps" in caplog.text


@pytest.mark.parametrize("style", ["pesser", "tensorflow", "openai"])
@pytest.mark.parametrize(
    ("change", "looks_like"),
    [
        ({"num_res_blocks": 3}, r"the file looks like model\.num_res_blocks=3$"),
        ({"channel_multipliers": (1, 2, 2)}, r"the file looks like model\.channel_multipliers=\[1,2,2\]$"),
        (
            {"channel_multipliers": (1, 1, 2, 2)},
            r"the file looks like model\.channel_multipliers=\[1,1,2,2\]$",
        ),
        ({"channel_multipliers": (1, 1)}, r"the file looks like model\.channel_multipliers=\[1,1\]$"),
        ({"attention_resolutions": (16, 8)}, r"the file looks like model\.attention_resolutions=\[16,8\]$"),
        ({"attention_resolutions": ()}, r"the file looks like model\.attention_resolutions=\[\]$"),
        ({"base_channels": 64}, r"the file looks like model\.base_channels=64$"),
        (
            {"in_channels": 1, "out_channels": 1},
            r"the file looks like image\.channels=1; it puts out 1 channels",
        ),
        (
            {"out_channels": 6},
            r"it puts out 6 channels, which diffusion\.variance and image\.channels decide$",
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_another_network_is_recognised(style: Any, change: dict[str, Any], looks_like: str) -> None:
    theirs = other(PAPER, **change)
    naming: Naming
    match style:
        case "openai":
            tensors, naming = openai_unet(theirs, num_heads=4).state_dict(), openai.NAMING
        case "pesser":
            tensors, naming = paper_variables(theirs, style)[0], pesser.NAMING
        case _:
            found = {f"model/{name}": tensor for name, tensor in paper_variables(theirs, style)[0].items()}
            variables = sort_variables(found)
            assert variables is not None
            tensors, naming = variables.weights, variables.naming
    with pytest.raises(UserError, match=f"^model: .*{looks_like}") as raised:
        take(tensors, naming, OURS, "model")
    assert "\n" not in str(raised.value)


def test_scale_shift_is_recognised(tmp_path: Path) -> None:
    torch.save(openai_unet(PAPER, num_heads=4, use_scale_shift_norm=True).state_dict(), tmp_path / "model.pt")
    with pytest.raises(
        UserError, match=r"emb_layers\.1\.weight is .*looks like model\.scale_shift_norm=true$"
    ):
        bring(tmp_path / "model.pt", tmp_path / "run", OPENAI)


def test_labels_are_recognised(tmp_path: Path) -> None:
    torch.save(openai_unet(PAPER, num_heads=4, num_classes=10).state_dict(), tmp_path / "model.pt")
    with pytest.raises(
        UserError, match=r"label_emb\.weight \[10, 128\] is unexpected, .*model\.num_classes=10"
    ):
        bring(tmp_path / "model.pt", tmp_path / "run", OPENAI)
