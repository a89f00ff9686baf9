"""The network: parameter counts, parity with diffusers, initial weights, layouts, refusals."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from tests.trainer.unet_support import SMALL, TINY, inputs, randomise
from trainer.layers import Conv2d, GroupNorm, Linear, time_embedding
from trainer.unet import UNet, UNetConfig

BIG = (1, 1, 2, 2, 4, 4)


@pytest.mark.parametrize(
    ("config", "parameters", "tensors"),
    [
        (UNetConfig(32), 35_746_307, 328),
        (UNetConfig(32, out_channels=6), 35_749_766, 328),
        (UNetConfig(256, channel_multipliers=BIG), 113_673_219, 450),
        (UNetConfig(256, base_channels=192, channel_multipliers=BIG), 255_677_955, 450),
    ],
    ids=["cifar10", "cifar10-6-out", "256", "256-large"],
)
def test_parameter_counts_of_the_paper(config: UNetConfig, parameters: int, tensors: int) -> None:
    with torch.device("meta"):
        model = UNet(config)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(list(model.parameters())) == tensors
    assert len(model.state_dict()) == tensors  # no buffers


def test_time_embedding() -> None:
    t = torch.tensor([0, 1, 999])
    e = time_embedding(t, 8, SMALL.conventions).double()
    frequencies = torch.tensor([1.0, 10 ** (-4 / 3), 10 ** (-8 / 3), 1e-4], dtype=torch.float64)
    angles = t[:, None] * frequencies
    torch.testing.assert_close(e, torch.cat([angles.sin(), angles.cos()], dim=1), atol=2e-4, rtol=0)
    assert e.dtype == torch.float64
    assert time_embedding(t, 8, SMALL.conventions).dtype == torch.float32


def test_initial_weights() -> None:
    model = UNet(replace(SMALL, base_channels=64), torch.Generator().manual_seed(0))
    near_zero = 0
    for name, layer in model.named_modules():
        if isinstance(layer, GroupNorm):
            assert torch.equal(layer.weight, torch.ones_like(layer.weight)), name
            assert layer.eps == 1e-6
        if not isinstance(layer, Conv2d | Linear):
            continue
        assert layer.bias is not None
        assert not layer.bias.any(), name
        fan_out, fan_in, *kernel = layer.weight.shape
        branch_end = name.endswith(("conv2", "attention.out", "head.conv")) or (
            "attentions" in name and name.endswith("out")
        )
        near_zero += branch_end
        limit = math.sqrt(6 / ((fan_in + fan_out) * math.prod(kernel))) * (1e-5 if branch_end else 1.0)
        u = (layer.weight.detach().double().flatten() / limit).sort().values
        assert float(u.abs().max()) <= 1.0 + 1e-6, name
        assert float(u.abs().max()) > 0, name
        distance = (u / 2 + 0.5 - torch.linspace(0, 1, len(u), dtype=torch.float64)).abs().max()
        assert float(distance) < 2.2 / math.sqrt(len(u)), name  # uniform, by Kolmogorov-Smirnov
    assert near_zero == 17 + 6 + 1  # residual blocks, attentions, head


def test_first_loss_is_one() -> None:
    model = UNet(TINY)
    x = torch.randn(256, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = model(x, torch.arange(256))
    assert 0 < float(out.abs().max()) < 1e-4
    assert float((out - x).square().mean()) == pytest.approx(1.0, abs=0.02)


def test_generator_decides_the_weights() -> None:
    a, b, c = (UNet(TINY, torch.Generator().manual_seed(seed)).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["stem.weight"], c["stem.weight"])


def test_names_are_frozen() -> None:
    names = set(UNet(TINY).state_dict())
    assert {
        "time_embed.0.weight",
        "time_embed.2.bias",
        "stem.weight",
        "down.0.blocks.0.conv1.weight",
        "down.0.blocks.0.time_proj.weight",
        "down.0.downsample.conv.weight",
        "down.1.blocks.0.shortcut.weight",
        "down.1.attentions.0.query.weight",
        "mid.block1.norm2.bias",
        "mid.attention.out.weight",
        "up.1.upsample.conv.weight",
        "up.0.blocks.1.conv2.weight",
        "up.1.attentions.1.norm.weight",
        "head.norm.weight",
        "head.conv.bias",
    } <= names
    assert len(names) == 144


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_activations_keep_their_layout_and_parameters_are_contiguous(
    channels: int, layout: torch.memory_format
) -> None:
    config = replace(TINY, in_channels=channels, out_channels=channels)
    model = UNet(config, layout=layout)
    wrong: list[str] = []
    seen = 0

    def watch(name: str, module: nn.Module) -> None:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            nonlocal seen
            # The stem follows its input's layout, and an image of one channel has both; the network converts
            # what the stem gives. Attention's projections work on pixels [B, 1, HW, C].
            if out.ndim == 4 and min(out.shape[1:]) > 1 and name != "stem":
                seen += 1
                if not out.is_contiguous(memory_format=layout):
                    wrong.append(name)

        module.register_forward_hook(hook)

    for name, module in model.named_modules():
        watch(name, module)
    x, t = inputs(config)
    model(x.contiguous(), t).sum().backward()
    assert seen > 30
    assert wrong == []
    for name, p in model.named_parameters():
        assert p.is_contiguous(), name
        assert p.grad is not None, name
        assert p.grad.is_contiguous(), name


def test_bf16_autocast_stays_near() -> None:
    model = UNet(TINY)
    randomise(model)
    x, t = inputs(TINY)
    full = model(x, t)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(x, t)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), full, atol=0.05, rtol=0)
    assert model.bfloat16()(x.bfloat16(), t).dtype == torch.bfloat16


def test_dropout_acts_in_training_only() -> None:
    model = UNet(replace(TINY, dropout=0.5))
    randomise(model)
    x, t = inputs(TINY)
    with torch.no_grad():
        assert not torch.equal(model.train()(x, t), model(x, t))
        assert torch.equal(model.eval()(x, t), model(x, t))


def test_impossible_inputs() -> None:
    model = UNet(TINY)
    x, t = inputs(TINY)
    with pytest.raises(ValueError, match=r"images must be \[B, 1, 8, 8\], got \[4, 1, 8, 7\]"):
        model(x[..., :7], t)
    with pytest.raises(ValueError, match=r"images must be \[B, 1, 8, 8\], got \[4, 3, 8, 8\]"):
        model(x.expand(4, 3, 8, 8), t)
    with pytest.raises(ValueError, match="floating precision"):
        model(x.to(torch.uint8), t)
    with pytest.raises(ValueError, match=r"images are torch.float64, the network's parameters torch.float32"):
        model(x.double(), t)
    with pytest.raises(
        ValueError, match=r"images are torch.bfloat16, the network's parameters torch.float32"
    ):
        model(x.bfloat16(), t)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match=r"images are torch.float64, the network's parameters torch.float32"),
    ):
        model(x.double(), t)
    with pytest.raises(ValueError, match="t must be int64"):
        model(x, t.float())
    with pytest.raises(ValueError, match=r"t must be int64 of shape \[4\]"):
        model(x, t[:1])
