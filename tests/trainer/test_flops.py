"""Counted arithmetic equals arithmetic by hand, and what the paper's networks are known to take."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from tests.trainer.unet_support import SMALL, TINY
from trainer.blocks import Attention
from trainer.flops import executed_flops_per_image, flops_per_image, training_flops_per_image
from trainer.recipe import load_recipe
from trainer.unet import UNet, UNetConfig


@pytest.mark.parametrize(
    ("recipe", "giga"), [("cifar10", 12.44), ("celebahq256", 497.0), ("lsun_bedroom_large", 1117.0)]
)
def test_the_papers_networks(recipe: str, giga: float) -> None:
    """Known from other counts of these networks, to the digits given: we agree within 0.1 %."""
    assert flops_per_image(load_recipe(recipe).unet_config()) == pytest.approx(giga * 1e9, rel=1e-3)


def by_hand(config: UNetConfig) -> int:
    """Convolutions and dense layers from the shapes that pass them, attention's products from its formula."""
    total = 0

    def layer(module: nn.Module, _: object, output: Tensor) -> None:
        nonlocal total
        assert isinstance(module, nn.Conv2d | nn.Linear)
        total += 2 * output.numel() * module.weight[0].numel()

    def attention(module: nn.Module, _: object, output: Tensor) -> None:
        nonlocal total
        _, channels, height, width = output.shape
        pixels = height * width
        total += 2 * pixels * channels * (4 * channels) + 2 * 2 * pixels * pixels * channels

    network = UNet(config)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(layer)
        elif isinstance(module, Attention):
            module.register_forward_hook(attention)
    with torch.no_grad():
        network(torch.zeros(1, config.in_channels, config.image_size, config.image_size), torch.tensor([0]))
    return total


@pytest.mark.parametrize("config", [TINY, SMALL, dataclasses.replace(SMALL, num_heads=4, block_size=2)])
def test_forward_equals_the_count_by_hand(config: UNetConfig) -> None:
    if config.block_size == 2:
        config = dataclasses.replace(config, attention_resolutions=(4,))
    assert flops_per_image(config) == by_hand(config)


def test_training_is_three_times_the_forward_pass() -> None:
    """But for the first convolution, which needs no gradient of the image."""
    ratio = training_flops_per_image(SMALL) / flops_per_image(SMALL)
    assert 2.98 < ratio < 3


def test_recomputed_activations_are_executed_but_are_no_training() -> None:
    config = dataclasses.replace(SMALL, checkpoint_activations=True)
    assert flops_per_image(config) == flops_per_image(SMALL)
    assert training_flops_per_image(config) == training_flops_per_image(SMALL)
    assert executed_flops_per_image(SMALL) == training_flops_per_image(SMALL)
    again = executed_flops_per_image(config) - training_flops_per_image(config)
    assert 0.6 * flops_per_image(SMALL) < again <= flops_per_image(SMALL)


def test_class_labels_are_counted() -> None:
    assert flops_per_image(dataclasses.replace(SMALL, num_classes=10)) == flops_per_image(SMALL)


def test_counting_leaves_the_random_numbers_alone() -> None:
    config = dataclasses.replace(SMALL, dropout=0.25)
    before = torch.get_rng_state()
    training_flops_per_image(config)
    assert torch.equal(torch.get_rng_state(), before)
