"""The tables between our parameters and others': bijections, with the names and shapes those have."""

from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.trainer.weights_support import PAPER, diffusers_unet, openai_unet, other, paper_variables
from trainer.unet_config import Profile, UNetConfig
from trainer.weights.formats import diffusers, openai, pesser, tensorflow
from trainer.weights.names import Naming, Network, correspondences, to_ours, to_theirs

NAMINGS = {
    "diffusers": diffusers.NAMING,
    "diffusers-old": diffusers.OLD_ATTENTION,
    "pesser": pesser.NAMING,
    "openai": openai.NAMING,
    "openai-new-order": openai.NEW_ATTENTION_ORDER,
    "tensorflow": tensorflow.NAMING,
}


@st.composite
def configs(draw: st.DrawFn) -> UNetConfig:
    levels = draw(st.integers(1, 4))
    resolutions = [16 >> level for level in range(levels)]
    return UNetConfig(
        image_size=16,
        in_channels=draw(st.sampled_from([1, 3])),
        base_channels=8,
        channel_multipliers=tuple(draw(st.lists(st.integers(1, 3), min_size=levels, max_size=levels))),
        num_res_blocks=draw(st.integers(1, 3)),
        attention_resolutions=tuple(draw(st.sets(st.sampled_from(resolutions)))),
        norm_groups=4,
        profile=draw(st.sampled_from(list(Profile))),
        num_heads=draw(st.sampled_from([1, 2, 4])),
        scale_shift_norm=draw(st.booleans()),
    )


def random_parameters(network: Network) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in network.shapes.items()}


@settings(max_examples=12, deadline=None)
@given(config=configs())
def test_a_table_is_a_bijection_and_round_trips_are_bit_equal(config: UNetConfig) -> None:
    network = Network.of(config)
    ours = random_parameters(network)
    for naming in NAMINGS.values():
        table = correspondences(naming, network)
        assert sorted(name for entry in table for name in entry.ours) == sorted(ours)
        assert len({entry.theirs for entry in table}) == len(table)
        theirs = to_theirs(table, ours)
        assert sum(tensor.numel() for tensor in theirs.values()) == sum(p.numel() for p in ours.values())
        back = to_ours(table, theirs)
        assert back.keys() == ours.keys()
        for name, tensor in ours.items():
            assert torch.equal(back[name], tensor), name
            assert back[name].is_contiguous(), name
        again = to_theirs(table, back)
        assert all(torch.equal(again[name], tensor) for name, tensor in theirs.items())


def shapes_of(naming: Naming, config: UNetConfig) -> dict[str, list[int]]:
    network = Network.of(config)
    theirs = to_theirs(correspondences(naming, network), random_parameters(network))
    return {name: list(tensor.shape) for name, tensor in theirs.items()}


def shapes(tensors: dict[str, Any]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


SHAPES: list[dict[str, Any]] = [
    {},
    {"num_res_blocks": 2, "attention_resolutions": (16, 4)},
    {"num_res_blocks": 3, "channel_multipliers": (1, 2), "attention_resolutions": ()},
    {"channel_multipliers": (1, 2, 2, 4), "out_channels": 6},
]


@pytest.mark.parametrize("change", SHAPES)
@pytest.mark.parametrize("scale_shift", [False, True])
def test_names_and_shapes_of_openai(change: dict[str, Any], scale_shift: bool) -> None:
    config = other(PAPER, profile=Profile.OPENAI, scale_shift_norm=scale_shift, **change)
    theirs = openai_unet(config, use_scale_shift_norm=scale_shift, num_heads=4)
    assert shapes_of(openai.NAMING, config) == shapes(theirs.state_dict())


@pytest.mark.parametrize("change", SHAPES)
@pytest.mark.parametrize("scale_shift", [False, True])
def test_names_and_shapes_of_diffusers(change: dict[str, Any], scale_shift: bool) -> None:
    config = other(PAPER, scale_shift_norm=scale_shift, **change)
    theirs = diffusers_unet(
        config,
        resnet_time_scale_shift="scale_shift" if scale_shift else "default",
        attn_norm_num_groups=32 if scale_shift else None,
    )
    assert shapes_of(diffusers.NAMING, config) == shapes(theirs.state_dict())


@pytest.mark.parametrize("change", SHAPES)
@pytest.mark.parametrize("style", ["pesser", "tensorflow"])
def test_names_and_shapes_of_the_paper(
    change: dict[str, Any], style: Literal["pesser", "tensorflow"]
) -> None:
    config = other(PAPER, **change)
    variables, _ = paper_variables(config, style)
    assert shapes_of(NAMINGS[style], config) == shapes(variables)


def test_labels() -> None:
    """Others have no null label: ours gets a row of zeros, which goes again on the way back."""
    config = other(PAPER, profile=Profile.OPENAI, num_classes=10)
    theirs = openai_unet(config, num_classes=10, num_heads=4).state_dict()
    table = correspondences(openai.NAMING, Network.of(config))
    ours = to_ours(table, theirs)
    assert ours["class_embed.weight"].shape == (11, 128)
    assert torch.equal(ours["class_embed.weight"][:10], theirs["label_emb.weight"])
    assert not ours["class_embed.weight"][10].any()
    back = to_theirs(table, ours)
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in theirs.items())
