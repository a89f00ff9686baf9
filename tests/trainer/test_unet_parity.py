"""The network against diffusers' and OpenAI's: outputs and gradients, and that each convention shows."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from guided_diffusion.unet import UNetModel
from torch import Tensor, nn

from tests.trainer.unet_support import (
    PAPER_KNOBS,
    SMALL,
    diffusers_name,
    diffusers_twin,
    inputs,
    openai_twin,
    openai_weights,
    output,
    random_unet,
)
from trainer import unet_config
from trainer.layers import time_embedding
from trainer.unet import CONVENTIONS, Profile, UNet, UNetConfig

DIFFUSERS = replace(SMALL, profile=Profile.DIFFUSERS)
OPENAI = replace(SMALL, profile=Profile.OPENAI)
WIDE = replace(SMALL, base_channels=64, attention_resolutions=(4, 8, 16))
# What diffusers' constructor takes when nobody says otherwise, asked of the package itself.
DIFFUSERS_DEFAULTS = {key: UNet2DModel().config[key] for key in PAPER_KNOBS}


class OurSinusoids(nn.Module):
    """Our time embedding inside their network: theirs is float32 rounded otherwise, which 1e-10 would see."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, t: Tensor) -> Tensor:
        return time_embedding(t, self.config.base_channels, self.config.conventions)


def gradients(model: nn.Module, config: UNetConfig, *labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output, and the gradients of a random direction of it, the image's under the name "x"."""
    dtype = next(model.parameters()).dtype
    x, t = inputs(config, dtype)
    x.requires_grad_()
    found = model(x, t, *labels)
    found = getattr(found, "sample", found)
    direction = torch.randn(found.shape, generator=torch.Generator().manual_seed(2), dtype=dtype)
    (found * direction).mean().backward()
    assert float(found.detach().abs().max()) > 0.3  # not a comparison of zeros
    assert x.grad is not None
    wanted = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found.detach(), {"x": x.grad, **wanted}


def test_defaults_of_diffusers_are_the_profiles() -> None:
    ours = CONVENTIONS[Profile.DIFFUSERS]
    assert {
        "downsample_padding": ours.downsample_padding[0],
        "flip_sin_to_cos": ours.cosine_first,
        "freq_shift": ours.frequency_offset,
        "norm_eps": ours.norm_eps,
        "attention_head_dim": ours.head_channels,
    } == DIFFUSERS_DEFAULTS


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize(
    ("config", "knobs"),
    [
        (SMALL, PAPER_KNOBS),
        (DIFFUSERS, {}),
        (
            replace(DIFFUSERS, scale_shift_norm=True, out_channels=6, norm_groups=16),
            {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 16},
        ),
    ],
    ids=["ho", "diffusers", "diffusers-scale-shift"],
)
def test_parity_with_diffusers(
    config: UNetConfig, knobs: dict[str, Any], dtype: torch.dtype, atol: float
) -> None:
    ours = random_unet(config, dtype)
    theirs = diffusers_twin(ours, **knobs)
    if dtype == torch.float64:
        theirs.time_proj = OurSinusoids(config)
    mine, my_gradients = gradients(ours, config)
    other, their_gradients = gradients(theirs, config)
    torch.testing.assert_close(mine, other, atol=atol, rtol=0)
    assert len(my_gradients) == len(their_gradients)
    for name, gradient in my_gradients.items():
        wanted = their_gradients[name if name == "x" else diffusers_name(name, len(config.widths))]
        torch.testing.assert_close(gradient, wanted, atol=atol, rtol=0, msg=name)


def test_parity_with_diffusers_conditioned_on_classes() -> None:
    config = replace(DIFFUSERS, num_classes=3)
    ours = random_unet(config)
    theirs = diffusers_twin(ours, num_class_embeds=4)
    labels = torch.tensor([0, 2, 3, 1])
    difference = output(ours, config, labels) - output(theirs, config, labels)
    assert float(difference.abs().max()) < 1e-5


@pytest.mark.parametrize("scale_shift_norm", [False, True])
@pytest.mark.parametrize("heads", [1, 4])
def test_parity_with_openai(heads: int, scale_shift_norm: bool) -> None:
    config = replace(
        OPENAI, num_heads=heads, scale_shift_norm=scale_shift_norm, out_channels=6, num_classes=3
    )
    ours = random_unet(config)
    labels = torch.tensor([0, 2, 3, 1])
    mine, my_gradients = gradients(ours, config, labels)
    theirs = openai_twin(ours, num_heads=heads)
    other, their_gradients = gradients(theirs, config, labels)
    torch.testing.assert_close(mine, other, atol=2e-5, rtol=0)
    # The gradients take the same way through the table of names as the weights.
    with torch.no_grad():
        for name, p in ours.named_parameters():
            p.copy_(my_gradients[name])
    translated = openai_weights(ours)
    assert translated.keys() | {"x"} == their_gradients.keys()
    for name, gradient in (translated | {"x": my_gradients["x"]}).items():
        torch.testing.assert_close(gradient, their_gradients[name], atol=2e-5, rtol=0, msg=name)


def test_openai_profile_has_the_four_heads_of_its_scripts() -> None:
    ours = random_unet(OPENAI)
    mine = output(ours, OPENAI)
    assert float((mine - output(openai_twin(ours, num_heads=4), OPENAI)).abs().max()) < 2e-5
    assert float((mine - output(openai_twin(ours, num_heads=1), OPENAI)).abs().max()) > 1e-3


def test_openai_zeroes_the_ends_of_branches_and_draws_the_rest_as_torch_does() -> None:
    fresh = UNetModel(16, 3, 32, 3, 2, [2], channel_mult=(1, 2, 2), num_heads=4).state_dict()
    for name, weight in openai_weights(UNet(OPENAI)).items():
        assert bool(weight.any()) == bool(fresh[name].any()), name
        if weight.numel() > 500 and weight.any():
            assert float(weight.std() / fresh[name].std()) == pytest.approx(1, abs=0.15), name


# One convention as others have it; diffusers' name for it; half of what the reference measured it to do to
# the output: largest change, and root mean square change over the output's.
KNOBS = [
    ({"downsample_padding": (1, 1)}, {"downsample_padding": 1}, 0.30, 0.18),
    ({"cosine_first": True}, {"flip_sin_to_cos": True}, 0.046, 0.024),
    ({"frequency_offset": 0}, {"freq_shift": 0}, 0.05, 0.019),
    ({"num_heads": None, "head_channels": 8}, {"attention_head_dim": 8}, 0.047, 0.024),
    ({"norm_eps": 1e-5}, {"norm_eps": 1e-5}, 4.5e-5, 2.5e-5),
]


@pytest.mark.parametrize(
    ("ours", "theirs", "largest", "relative"), KNOBS, ids=[next(iter(knob[0])) for knob in KNOBS]
)
def test_each_detail_of_the_paper_shows(
    ours: dict[str, Any],
    theirs: dict[str, Any],
    largest: float,
    relative: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With one detail as others have it the output changes, in both packages alike."""
    model = random_unet(WIDE, torch.float64)
    paper = output(model, WIDE)
    changed = output(diffusers_twin(model, **(PAPER_KNOBS | theirs)), WIDE)
    difference = changed - paper
    assert float(difference.abs().max()) > largest
    assert float(difference.square().mean().sqrt() / paper.square().mean().sqrt()) > relative
    conventions = {**CONVENTIONS, Profile.HO: replace(CONVENTIONS[Profile.HO], **ours)}
    monkeypatch.setattr(unet_config, "CONVENTIONS", conventions)
    torch.testing.assert_close(output(random_unet(WIDE, torch.float64), WIDE), changed, atol=1e-5, rtol=0)
