"""The network: parameter counts, parity with diffusers, initial weights, layouts, refusals."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from trainer.layers import Conv2d, GroupNorm, Linear, time_embedding
from trainer.unet import UNet, UNetConfig

SMALL = UNetConfig(
    image_size=16,
    base_channels=32,
    channel_multipliers=(1, 2, 2),
    num_res_blocks=2,
    attention_resolutions=(8,),
)
TINY = UNetConfig(
    image_size=8,
    in_channels=1,
    out_channels=1,
    base_channels=8,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(4,),
    norm_groups=4,
)
# What makes diffusers' network the paper's.
PAPER_KNOBS: dict[str, Any] = {
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "attention_head_dim": None,
}
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


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Weights far from any special value: near-zero layers would hide what they multiply."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.05, generator=generator)


def diffusers_name(name: str, levels: int) -> str:
    """The name diffusers gives one of our parameters."""
    *parts, kind = name.split(".")
    block = {"time_proj": "time_emb_proj", "shortcut": "conv_shortcut"}
    attention = {"norm": "group_norm", "query": "to_q", "key": "to_k", "value": "to_v", "out": "to_out.0"}
    match parts:
        case ["time_embed", index]:
            theirs = f"time_embedding.linear_{1 + int(index) // 2}"
        case ["stem"]:
            theirs = "conv_in"
        case ["head", layer]:
            theirs = f"conv_{layer}_out".replace("conv_conv_out", "conv_out")
        case ["mid", "attention", layer]:
            theirs = f"mid_block.attentions.0.{attention[layer]}"
        case ["mid", which, layer]:
            theirs = f"mid_block.resnets.{int(which[-1]) - 1}.{block.get(layer, layer)}"
        case [way, level, *rest]:
            place = int(level) if way == "down" else levels - 1 - int(level)
            match rest:
                case ["blocks", j, layer]:
                    tail = f"resnets.{j}.{block.get(layer, layer)}"
                case ["attentions", j, layer]:
                    tail = f"attentions.{j}.{attention[layer]}"
                case _:
                    tail = f"{way}samplers.0.conv"
            theirs = f"{way}_blocks.{place}.{tail}"
    return f"{theirs}.{kind}"


def twins(config: UNetConfig, dtype: torch.dtype, **knobs: Any) -> tuple[UNet, UNet2DModel]:
    """Our network and diffusers' with the same random weights."""
    ours = UNet(config)
    randomise(ours)
    attends = [resolution in config.attention_resolutions for resolution in config.resolutions]
    theirs = UNet2DModel(
        sample_size=config.image_size,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        layers_per_block=config.num_res_blocks,
        block_out_channels=config.widths,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        norm_num_groups=config.norm_groups,
        **(PAPER_KNOBS | knobs),
    )
    levels = len(config.widths)
    theirs.load_state_dict(
        {diffusers_name(name, levels): p for name, p in ours.state_dict().items()}, strict=True
    )
    return ours.to(dtype).eval(), theirs.to(dtype).eval()


def inputs(config: UNetConfig, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, config.in_channels, config.image_size, config.image_size, generator=generator)
    return x.to(dtype), torch.tensor([0, 1, 500, 999])


class OurSinusoids(nn.Module):
    """Our time embedding inside their network: theirs is float32 rounded otherwise, which 1e-10 would see."""

    def forward(self, t: Tensor) -> Tensor:
        return time_embedding(t, SMALL.base_channels)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_parity_with_diffusers(dtype: torch.dtype, atol: float) -> None:
    ours, theirs = twins(SMALL, dtype)
    if dtype == torch.float64:
        theirs.time_proj = OurSinusoids()
    x, t = inputs(SMALL, dtype)
    x.requires_grad_()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=dtype)
    mine = ours(x, t)
    (dx,) = torch.autograd.grad((mine * direction).mean(), x, retain_graph=True)
    (mine * direction).mean().backward()
    y = x.detach().clone().requires_grad_()
    other = theirs(y, t).sample
    (other * direction).mean().backward()
    assert float(other.detach().abs().max()) > 0.3  # not a comparison of zeros
    torch.testing.assert_close(mine, other, atol=atol, rtol=0)
    torch.testing.assert_close(dx, y.grad, atol=atol, rtol=0)
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, gradients[diffusers_name(name, 3)], atol=atol, rtol=0, msg=name)


@pytest.mark.parametrize(
    ("knob", "least"),
    [
        ({"downsample_padding": 1}, 1e-2),
        ({"flip_sin_to_cos": True}, 1e-2),
        ({"freq_shift": 0}, 1e-3),
        ({"norm_eps": 1e-5}, 1e-5),
        ({"attention_head_dim": 8}, 1e-3),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_each_detail_of_the_paper_shows(knob: dict[str, Any], least: float) -> None:
    """With one detail as others have it, the parity above must break."""
    ours, theirs = twins(SMALL, torch.float64, **knob)
    x, t = inputs(SMALL, torch.float64)
    with torch.no_grad():
        assert float((ours(x, t) - theirs(x, t).sample).abs().max()) > least


def test_time_embedding() -> None:
    t = torch.tensor([0, 1, 999])
    e = time_embedding(t, 8).double()
    frequencies = torch.tensor([1.0, 10 ** (-4 / 3), 10 ** (-8 / 3), 1e-4], dtype=torch.float64)
    angles = t[:, None] * frequencies
    torch.testing.assert_close(e, torch.cat([angles.sin(), angles.cos()], dim=1), atol=2e-4, rtol=0)
    assert e.dtype == torch.float64
    assert time_embedding(t, 8).dtype == torch.float32


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
def test_activations_are_channels_last_and_parameters_contiguous(channels: int) -> None:
    config = replace(TINY, in_channels=channels, out_channels=channels)
    model = UNet(config)
    wrong: list[str] = []
    seen = 0

    def watch(name: str, module: nn.Module) -> None:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            nonlocal seen
            # The stem follows its input's layout, and an image of one channel has both; the network converts
            # what the stem gives. Attention's projections work on pixels [B, 1, HW, C].
            if out.ndim == 4 and min(out.shape[1:]) > 1 and name != "stem":
                seen += 1
                if not out.is_contiguous(memory_format=torch.channels_last):
                    wrong.append(name)

        module.register_forward_hook(hook)

    for name, module in model.named_modules():
        watch(name, module)
    x, t = inputs(config)
    model(x.contiguous(), t).sum().backward()
    assert seen > 40
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


def test_blocks_compile_without_graph_breaks() -> None:
    middle = UNet(TINY).mid
    randomise(middle)
    h, embedding = torch.randn(2, 16, 4, 4), torch.randn(2, 32)
    compiled = torch.compile(middle, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(h, embedding), middle(h, embedding))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 9}, "image_size 9 cannot be halved 1 times: make it a multiple of 2"),
        ({"image_size": 0}, "image_size must be at least 1"),
        ({"base_channels": 7}, "base_channels must be even"),
        ({"base_channels": 2, "norm_groups": 1}, "at least 4"),
        ({"norm_groups": 32}, "set norm_groups to a divisor of base_channels 8, e.g. 8"),
        ({"norm_groups": 16, "channel_multipliers": (2, 4)}, "does not divide a width of 8 channels"),
        (
            {"attention_resolutions": (16, 4)},
            r"attention_resolutions \[16\] never occur: the levels are \[8, 4\] high",
        ),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\)"),
        ({"channel_multipliers": ()}, "at least one level"),
        ({"channel_multipliers": (1, 0)}, "channel_multipliers must be at least 1"),
        ({"num_res_blocks": 0}, "num_res_blocks must be at least 1"),
    ],
)
def test_impossible_configurations(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)


def test_impossible_inputs() -> None:
    model = UNet(TINY)
    x, t = inputs(TINY)
    with pytest.raises(ValueError, match=r"images must be \[B, 1, 8, 8\], got \[4, 1, 8, 7\]"):
        model(x[..., :7], t)
    with pytest.raises(ValueError, match=r"images must be \[B, 1, 8, 8\], got \[4, 3, 8, 8\]"):
        model(x.expand(4, 3, 8, 8), t)
    with pytest.raises(ValueError, match="floating precision"):
        model(x.to(torch.uint8), t)
    with pytest.raises(ValueError, match="t must be int64"):
        model(x, t.float())
    with pytest.raises(ValueError, match=r"t must be int64 of shape \[4\]"):
        model(x, t[:1])
