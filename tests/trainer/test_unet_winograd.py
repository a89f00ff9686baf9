"""The CPU's 3x3 convolution: against torch's in float64, its gradients, and where it is used."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.trainer.unet_support import PAPER_KNOBS, diffusers_twin, inputs, randomise
from trainer import winograd
from trainer.layers import Conv2d, channels_last
from trainer.unet import CONVENTIONS, Profile, UNet, UNetConfig
from trainer.winograd import conv3x3, suits

Operands = tuple[Tensor, Tensor, Tensor]


def operands(
    batch: int = 2, inside: int = 128, outside: int = 128, height: int = 8, width: int = 8, **kind: Any
) -> Operands:
    generator = torch.Generator().manual_seed(0)
    x = channels_last(torch.randn(batch, inside, height, width, generator=generator).to(**kind))
    weight = torch.randn(outside, inside, 3, 3, generator=generator).to(**kind) / (9 * inside) ** 0.5
    return x, weight, torch.randn(outside, generator=generator).to(**kind)


def rms(x: Tensor) -> float:
    return float(x.detach().square().mean().sqrt())


def direct(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(x, weight, bias, padding=1)


@given(
    batch=st.integers(0, 5),
    channels=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    size=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    tiles=st.sampled_from([1, 20, 256]),
)
@settings(max_examples=50, deadline=None)
def test_any_shape(batch: int, channels: tuple[int, int], size: tuple[int, int], tiles: int) -> None:
    """Values and gradients, in float64, however many images are taken at a time."""
    given_ = operands(batch, *channels, 2 * size[0], 2 * size[1], dtype=torch.float64)
    direction = torch.randn_like(direct(*given_))
    for tensor in given_:
        tensor.requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(winograd, "CHUNK", tiles)
        found = conv3x3(*given_)
        gradients = torch.autograd.grad(found, given_, direction)
    wanted = direct(*given_)
    torch.testing.assert_close(found, wanted)
    for a, b in zip(gradients, torch.autograd.grad(wanted, given_, direction), strict=True):
        torch.testing.assert_close(a, b)


def test_what_torch_wants_of_an_operator() -> None:
    for tensor in (given_ := operands(3, 5, 4, 4, 6, dtype=torch.float64)):
        tensor.requires_grad_()
    torch.library.opcheck(conv3x3, given_)
    assert torch.autograd.gradcheck(conv3x3, given_)


def test_layouts() -> None:
    x, weight, bias = operands()
    found = conv3x3(x.contiguous(), weight, bias)
    assert torch.equal(found, conv3x3(x, weight, bias))
    assert found.is_contiguous(memory_format=torch.channels_last)
    weight.requires_grad_()
    x.requires_grad_()
    dx, dw = torch.autograd.grad(conv3x3(x, weight, bias).square().sum(), (x, weight))
    assert dx.is_contiguous(memory_format=torch.channels_last)
    assert dw.is_contiguous()


def test_a_second_derivative_is_refused() -> None:
    x, weight, bias = operands()
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(conv3x3(x, weight, bias).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="conv3x3_backward"):
        gradient.sum().backward()


@pytest.mark.parametrize(("inside", "outside", "size"), [(128, 128, 32), (512, 256, 8)])
def test_rounding_is_no_worse_than_torchs(inside: int, outside: int, size: int) -> None:
    given_ = operands(2, inside, outside, size, size)
    wide = tuple(tensor.double() for tensor in given_)
    for tensor in (*given_, *wide):
        tensor.requires_grad_()
    truth = direct(*wide)
    direction = torch.randn_like(truth)
    true_gradients = torch.autograd.grad(truth, wide, direction)

    def errors(function: Any) -> list[float]:
        found = function(*given_)
        gradients = torch.autograd.grad(found, given_, direction.float())
        pairs = zip((found, *gradients), (truth, *true_gradients), strict=True)
        return [rms(a - b) / rms(b) for a, b in pairs]

    for mine, theirs in zip(errors(conv3x3), errors(direct), strict=True):
        assert mine < max(2 * theirs, 1e-6)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, ...]]:
    """Will hold the operands of all calls from now on."""
    calls: list[tuple[Tensor, ...]] = []

    def call(*args: Tensor) -> Tensor:
        calls.append(args)
        found: Tensor = conv3x3(*args)
        return found

    monkeypatch.setattr(winograd, "conv3x3", call)
    return calls


def test_network_is_as_near_the_truth_as_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    config = UNetConfig(
        16, base_channels=128, channel_multipliers=(1, 2), num_res_blocks=1, attention_resolutions=(8,)
    )
    model = UNet(config).eval()
    randomise(model)
    theirs = diffusers_twin(model, **PAPER_KNOBS)
    x, t = inputs(config)
    calls = counted(monkeypatch)
    with torch.no_grad():
        mine, other = model(x, t), theirs(x, t).sample
        truth = model.double()(x.double(), t)
    assert len(calls) == 2 * 8 + 1  # all blocks and the upsampling
    assert rms(mine - truth) < 1.1 * rms(other - truth) < 1e-5


def test_where_it_is_used() -> None:
    x, weight, _ = operands()
    assert suits(x, weight)
    assert not suits(x.double(), weight.double())
    assert not suits(x.bfloat16(), weight.bfloat16())
    assert not suits(x, weight.bfloat16())
    assert not suits(x.to("meta"), weight.to("meta"))
    assert not suits(x[:, :127], weight[:, :127])
    assert not suits(x, weight[:127])
    assert not suits(x[..., 1:], weight)
    assert not suits(x[:, :, 1:], weight)
    assert not suits(x[:, :, 2:], weight)
    assert not suits(x.new_empty(1, 128, 66, 64), weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert not suits(x, weight)


@pytest.mark.parametrize("profile", list(Profile))
def test_layer_uses_it_where_it_suits(profile: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    conv = Conv2d(128, 128, 3, CONVENTIONS[profile])
    x = operands(height=12)[0]
    calls = counted(monkeypatch)
    assert conv.bias is not None
    torch.testing.assert_close(conv(x), direct(x, conv.weight, conv.bias), atol=1e-5, rtol=1e-5)
    assert len(calls) == 1
    conv.stride = (2, 2)
    conv(x)
    assert len(calls) == 1
