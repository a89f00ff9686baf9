"""What the network can be asked for beyond the paper's: classes, squares of pixels, recomputation …"""

from dataclasses import replace
from itertools import pairwise, product
from typing import Any

import pytest
import torch
import torch._dynamo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck

from tests.trainer.unet_support import SMALL, TINY, inputs, output, random_unet, randomise
from trainer.blocks import Attention, Downsample, Head, ResBlock, Upsample
from trainer.layers import Conv2d, Dropout, depth_to_space, space_to_depth
from trainer.unet import Profile, UNet, UNetConfig, compile_blocks

LABELS = torch.tensor([0, 1, 2, 3])


@pytest.mark.parametrize("heads", [1, 2])
def test_both_layouts_compute_the_same(heads: int) -> None:
    """Values and gradients."""
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model = random_unet(replace(SMALL, num_heads=heads), torch.float64)
        model.layout = layout
        x, t = inputs(model.config, torch.float64)
        out = model(x.requires_grad_(), t)
        found.append([out, *torch.autograd.grad(out.square().sum(), [x, *model.parameters()])])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("heads", [1, 4])
def test_what_a_gpu_prefers_computes_the_same(heads: int) -> None:
    """Attention and 1x1 convolutions over pixels against those over channels: values and gradients."""
    config = replace(SMALL, num_heads=heads)
    model = random_unet(config, torch.float64)
    attention, width = model.mid.attention, config.widths[-1]
    h = torch.randn(2, width, 4, 6, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(3 * width, width, dtype=torch.float64) / width**0.5
    bias = torch.randn(3 * width, dtype=torch.float64)
    conv = Conv2d(width, 8, 1, config.conventions).double()
    operands = [h.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    pairs = [
        (attention.mix_pixels(*operands), attention.mix_channels(*operands), operands),
        (conv.dense(h), conv(h), [h, conv.weight, conv.bias]),
    ]
    for one, other, tensors in pairs:
        torch.testing.assert_close(one, other)
        assert one.stride() == other.stride()
        gradients = (torch.autograd.grad(out.square().sum(), tensors) for out in (one, other))
        for mine, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.001])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_dropout_is_unbiased_independent_and_repeatable(
    probability: float, layout: torch.memory_format
) -> None:
    layer = Dropout(probability)
    x = torch.ones(16, 37, 33, 31).contiguous(memory_format=layout).requires_grad_()
    torch.manual_seed(1)
    found = layer(x)
    dropped = (found == 0).double()
    deviation = (probability * (1 - probability) / x.numel()) ** 0.5
    assert abs(dropped.mean() - probability) < 5 * deviation
    assert found.unique().tolist() == pytest.approx([0.0, 1 / (1 - probability)], rel=2e-5)
    flat = dropped.flatten() - probability
    for distance in (1, 2, 3, 4, 31):  # four numbers share a draw
        together = (flat[:-distance] * flat[distance:]).mean() / (probability * (1 - probability))
        assert abs(together) < 5 / x.numel() ** 0.5
    (grad,) = torch.autograd.grad(found.sum(), x)
    torch.testing.assert_close(grad, found.detach(), msg="the gradient passes where the number did")
    torch.manual_seed(1)
    assert torch.equal(layer(x), found)
    assert not torch.equal(layer(x), found)
    layer.eval()
    assert layer(x) is x


@st.composite
def configs(draw: st.DrawFn) -> UNetConfig:
    levels = draw(st.integers(1, 3))
    block_size = draw(st.sampled_from([1, 2]))
    groups = draw(st.sampled_from([1, 2, 4]))
    image_size = block_size * 2 ** (levels - 1) * draw(st.integers(1, 3))
    heights = [image_size // block_size >> level for level in range(levels)]
    return UNetConfig(
        image_size=image_size,
        in_channels=draw(st.integers(1, 3)),
        out_channels=draw(st.integers(1, 6)),
        base_channels=8 * draw(st.integers(1, 2)),
        channel_multipliers=tuple(draw(st.lists(st.integers(1, 3), min_size=levels, max_size=levels))),
        num_res_blocks=draw(st.integers(1, 2)),
        attention_resolutions=tuple(draw(st.lists(st.sampled_from(heights), unique=True))),
        dropout=draw(st.sampled_from([0.0, 0.5])),
        norm_groups=groups,
        profile=draw(st.sampled_from(Profile)),
        num_heads=draw(st.sampled_from([None, 1, 2])),
        scale_shift_norm=draw(st.booleans()),
        block_size=block_size,
        num_classes=draw(st.sampled_from([None, 3])),
        checkpoint_activations=draw(st.booleans()),
    )


@given(configs(), st.integers(0, 3))
@settings(max_examples=20, deadline=None)
def test_every_configuration_maps_images_to_images(config: UNetConfig, batch: int) -> None:
    model = UNet(config)
    randomise(model)
    size = config.image_size
    labels = torch.full((batch,), model.null_label) if config.num_classes else None
    out = model(torch.randn(batch, config.in_channels, size, size), torch.arange(batch), labels)
    assert out.shape == (batch, config.out_channels, size, size)
    assert out.dtype == torch.float32
    assert out.isfinite().all()
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_space_to_depth_has_the_order_of_tensorflow() -> None:
    x = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6)
    deep = space_to_depth(x, 2)
    assert deep.shape == (2, 12, 2, 3)
    for dy, dx, c in product(range(2), range(2), range(3)):
        for i, j in product(range(2), range(3)):
            assert torch.equal(deep[:, (dy * 2 + dx) * 3 + c, i, j], x[:, c, 2 * i + dy, 2 * j + dx])
    assert torch.equal(depth_to_space(deep, 2), x)
    assert torch.equal(space_to_depth(x, 1), x)


def test_block_size_moves_pixels_into_channels_and_back() -> None:
    config = replace(SMALL, block_size=2, attention_resolutions=(4,))
    inner = replace(SMALL, image_size=8, in_channels=12, out_channels=12, attention_resolutions=(4,))
    x, t = inputs(config)
    outer = random_unet(config)
    plain = random_unet(inner)
    assert config.resolutions == (8, 4, 2)
    assert outer.state_dict().keys() == plain.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(outer(x, t), depth_to_space(plain(space_to_depth(x, 2), t), 2))


def test_learned_variances_double_the_output() -> None:
    model = UNet(replace(TINY, out_channels=2), torch.Generator().manual_seed(0))
    plain = UNet(TINY, torch.Generator().manual_seed(0))
    assert model(*inputs(TINY)).shape == (4, 2, 8, 8)
    for name, p in plain.named_parameters():
        if not name.startswith("head.conv"):
            assert torch.equal(p, model.get_parameter(name)), name


def test_classes_are_added_to_the_time_and_change_no_other_weight() -> None:
    config = replace(TINY, num_classes=3)
    drawn = UNet(config, torch.Generator().manual_seed(0)).state_dict()
    plain = UNet(TINY, torch.Generator().manual_seed(0)).state_dict()
    assert drawn["class_embed.weight"].shape == (4, 32)
    assert all(torch.equal(drawn[name], plain[name]) for name in plain)
    assert drawn.keys() - plain.keys() == {"class_embed.weight"}
    assert 0.3 < float(drawn["class_embed.weight"].abs().max()) <= (6 / (4 + 32)) ** 0.5  # Xavier's

    model = random_unet(config)
    assert model.null_label == 3
    by_label = [output(model, config, torch.full((4,), label)) for label in range(4)]
    assert all(float((a - b).abs().max()) > 1e-3 for a, b in pairwise(by_label))
    mixed = output(model, config, LABELS)
    for label in range(4):
        torch.testing.assert_close(mixed[label], by_label[label][label])
    # The row is added to the time embedding: so is a bias.
    moved = random_unet(TINY)
    moved.load_state_dict({name: p for name, p in model.state_dict().items() if "class" not in name})
    with torch.no_grad():
        bias = moved.time_embed[2].bias
        assert isinstance(bias, Tensor)
        bias += model.class_embed.weight[2]
    torch.testing.assert_close(output(moved, TINY), by_label[2])


@pytest.mark.parametrize("profile", [Profile.OPENAI, Profile.DIFFUSERS])
def test_rows_of_classes_start_as_torch_draws_them(profile: Profile) -> None:
    model = UNet(replace(SMALL, profile=profile, num_classes=9), torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    rows = model.class_embed.weight.detach()
    assert rows.shape == (10, 128)
    assert float(rows.std()) == pytest.approx(1, abs=0.1)


def test_wrong_labels() -> None:
    x, t = inputs(TINY)
    plain, model = UNet(TINY), UNet(replace(TINY, num_classes=3))
    with pytest.raises(ValueError, match="labels given, but the network knows no classes"):
        plain(x, t, LABELS)
    with pytest.raises(ValueError, match="set num_classes"):
        _ = plain.null_label
    with pytest.raises(ValueError, match=r"on 3 classes: give labels \(3, the null label, for none\)"):
        model(x, t)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 3\] \(3: none\), got 4"):
        model(x, t, LABELS + 1)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 3\] \(3: none\), got -1"):
        model(x, t, LABELS - 1)
    with pytest.raises(ValueError, match=r"labels must be int64 of shape \[4\], got torch.int64 \[3\]"):
        model(x, t, LABELS[:3])
    with pytest.raises(ValueError, match=r"labels must be int64 of shape \[4\], got torch.float32 \[4\]"):
        model(x, t, LABELS.float())


def test_scale_shift_norm_scales_and_shifts() -> None:
    block = ResBlock(8, 8, replace(TINY, scale_shift_norm=True))
    randomise(block)
    x, embedding = torch.randn(2, 8, 4, 4), torch.randn(2, 32)
    h = block.norm2(block.conv1(nn.functional.silu(block.norm1(x))))
    scale, shift = block.time_proj(embedding).split(8, dim=1)
    h = h * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    torch.testing.assert_close(block(x, embedding), x + block.conv2(nn.functional.silu(h)))


def test_heads_attend_apart() -> None:
    config = replace(TINY, num_heads=2)
    attention = Attention(8, config)
    randomise(attention)
    x = torch.randn(2, 8, 4, 4)
    pixels = attention.norm(x).flatten(2).transpose(1, 2)
    q, k, v = (layer(pixels) for layer in (attention.query, attention.key, attention.value))
    heads = []
    for channels in (slice(0, 4), slice(4, 8)):
        weights = (q[..., channels] @ k[..., channels].transpose(1, 2) / 2).softmax(-1)  # sqrt(4)
        heads.append(weights @ v[..., channels])
    mixed = attention.out(torch.cat(heads, dim=2)).transpose(1, 2).view_as(x)
    torch.testing.assert_close(attention(x), x + mixed)


def gradients(model: UNet, labels: Tensor | None = None) -> dict[str, Tensor]:
    x, t = inputs(model.config)
    torch.manual_seed(5)  # dropout
    model(x, t, labels).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("training", [True, False])
def test_checkpointing_changes_no_gradient(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(SMALL, dropout=0.5, num_classes=3, scale_shift_norm=True)
    plain = random_unet(config).train(training)
    frugal = random_unet(replace(config, checkpoint_activations=True)).train(training)
    runs = []
    forward = ResBlock.forward
    monkeypatch.setattr(ResBlock, "forward", lambda self, *args: runs.append(0) or forward(self, *args))
    wanted = gradients(plain, LABELS)
    assert len(runs) == 17
    found = gradients(frugal, LABELS)
    assert len(runs) == 17 + 2 * 17
    assert wanted.keys() == found.keys()
    for name, gradient in wanted.items():
        assert torch.equal(gradient, found[name]), name
    with torch.no_grad():
        frugal(*inputs(config), LABELS)
    assert len(runs) == 17 + 2 * 17 + 17


def test_checkpointing_keeps_less() -> None:
    def kept(model: UNet) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(*inputs(model.config)).sum()
        weights = {p.data_ptr() for p in model.parameters()}
        return sum(size for address, size in sizes.items() if address not in weights)

    assert 3 * kept(random_unet(replace(SMALL, checkpoint_activations=True))) < kept(random_unet(SMALL))


@pytest.mark.parametrize(
    "module",
    [
        ResBlock(4, 8, replace(TINY, base_channels=4, channel_multipliers=(1, 2))),
        ResBlock(4, 4, replace(TINY, base_channels=4, scale_shift_norm=True)),
        Attention(8, replace(TINY, num_heads=2)),
        Downsample(2, TINY),
        Downsample(2, replace(TINY, profile=Profile.OPENAI)),
        Upsample(2, TINY),
        Head(4, 3, TINY),
    ],
    ids=["block", "scale-shift", "attention", "down", "down-openai", "up", "head"],
)
def test_gradients_by_finite_differences(module: nn.Module) -> None:
    randomise(module)
    module.double()
    channels = next(p for p in module.parameters() if p.ndim > 1 or p.numel() > 1).shape
    width = channels[1] if len(channels) > 1 else channels[0]
    x = torch.randn(2, width, 4, 4, dtype=torch.float64, requires_grad=True)
    operands = [x]
    if isinstance(module, ResBlock):
        operands.append(torch.randn(2, 16, dtype=torch.float64, requires_grad=True))
    names = [name for name, _ in module.named_parameters()]

    def call(*tensors: Tensor) -> Tensor:
        parameters = dict(zip(names, tensors[len(operands) :], strict=True))
        out: Tensor = torch.func.functional_call(module, parameters, tensors[: len(operands)])
        return out

    weights = [p.detach().clone().requires_grad_() for p in module.parameters()]
    assert gradcheck(call, (*operands, *weights), fast_mode=True)


def test_the_whole_network_is_one_graph() -> None:
    model = random_unet(replace(TINY, dropout=0.5, num_classes=3, profile=Profile.OPENAI)).train()
    torch._dynamo.reset()
    explained = torch._dynamo.explain(model)(*inputs(TINY), LABELS)
    assert explained.graph_count == 1
    assert explained.graph_break_count == 0


@pytest.mark.parametrize("checkpointed", [False, True])
def test_compiled_blocks_compute_the_same(checkpointed: bool) -> None:
    """Also where the blocks have more shapes than torch allows variants of one function."""
    config = UNetConfig(
        image_size=4,
        base_channels=4,
        channel_multipliers=(1,) if checkpointed else (1, 2, 3),
        num_res_blocks=1,
        attention_resolutions=(4,) if checkpointed else (),
        norm_groups=2,
        checkpoint_activations=checkpointed,
    )
    model, plain = random_unet(config), random_unet(config)
    compiled = 0

    def backend(graph: torch.fx.GraphModule, example: list[Any]) -> Any:
        nonlocal compiled
        compiled += 1
        return graph.forward

    torch._dynamo.reset()
    compile_blocks(model, backend=backend)
    assert list(model.state_dict()) == list(plain.state_dict())
    found, wanted = gradients(model), gradients(plain)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, msg=name)
    blocks = [module for module in model.modules() if isinstance(module, ResBlock)]
    others = [m for m in model.modules() if isinstance(m, Attention | Downsample | Upsample | Head)]
    assert compiled == len(blocks) + len(others)
    limit = torch._dynamo.config.recompile_limit
    assert checkpointed or len({(b.conv1.weight.shape, b.norm2.weight.shape) for b in blocks}) >= limit


def test_a_block_compiles_for_real() -> None:
    block = Downsample(2, TINY)
    randomise(block)
    x = torch.randn(2, 2, 4, 4, requires_grad=True)
    wanted = block(x)
    (gradient,) = torch.autograd.grad(wanted.square().sum(), x)
    torch._dynamo.reset()
    block.compile(fullgraph=True)
    found = block(x)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.autograd.grad(found.square().sum(), x)[0], gradient)
