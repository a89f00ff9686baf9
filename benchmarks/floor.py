"""The convolutions of the network alone: what nobody who computes them by the same kernels can undercut."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Contender, Label, Layout, Mode, Precision
from benchmarks.network import Batch, our_network
from trainer.unet import UNet, UNetConfig

FLOOR = "convolutions"
"""Contender's name of the network's convolutions alone."""

Work = Callable[["Convolution"], object]
"""What is timed of a convolution: `forward` or `forward_backward`."""


@dataclass(frozen=True)
class Convolution:
    """One convolution with its operands.

    Attributes:
        layer: The layer of the network.
        x: Input as the network would give it.
        grad: Gradient of its output.
    """

    layer: nn.Conv2d
    x: Tensor
    grad: Tensor

    def output(self) -> Tensor:
        """What it gives."""
        layer = self.layer
        assert not isinstance(layer.padding, str)
        return F.conv2d(self.x, layer.weight, layer.bias, layer.stride, layer.padding)


@torch.no_grad()
def forward(convolution: Convolution) -> None:
    """What sampling needs of a convolution."""
    convolution.output()


def forward_backward(convolution: Convolution) -> None:
    """What training needs: the output, and the gradient of every operand that has one."""
    operands = (convolution.x, *convolution.layer.parameters())
    torch.autograd.grad(
        convolution.output(), [tensor for tensor in operands if tensor.requires_grad], convolution.grad
    )


def convolutions(model: UNet, batch: Batch, layout: Layout) -> list[Convolution]:
    """Record the convolutions of one forward pass.

    Args:
        model: Our network; its precision is that of all operands, so that no conversion is timed.
        batch: Inputs.
        layout: Of the images.
    """
    found: list[Convolution] = []
    dtype = model.stem.weight.dtype

    def record(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(layer, nn.Conv2d)
        # The gradient of the image itself is never asked for.
        x = torch.randn(args[0].shape, dtype=dtype).contiguous(memory_format=layout.memory_format)
        grad = torch.randn(output.shape, dtype=dtype).contiguous(memory_format=layout.memory_format)
        found.append(Convolution(layer, x.requires_grad_(bool(found)), grad))

    hooks = [
        module.register_forward_hook(record) for module in model.modules() if isinstance(module, nn.Conv2d)
    ]
    with torch.no_grad():
        model(batch.x_t.to(dtype), batch.t)
    for hook in hooks:
        hook.remove()
    return found


def floors(
    config: UNetConfig, batch: Batch, precision: Precision, work: Work, calls: int
) -> Iterator[Contender]:
    """The convolutions alone, in both layouts.

    Args:
        config: The network.
        batch: Inputs.
        precision: Of all operands.
        work: `forward` or `forward_backward`.
        calls: Of the network, in one call of the contender.
    """
    model = our_network(config).to(precision.dtype)
    for layout in Layout:
        size = len(batch.t)
        label = Label(contender=FLOOR, precision=precision, mode=Mode.EAGER, layout=layout, batch=size)
        yield Contender(label, _work(convolutions(model, batch, layout), work, calls))


def _work(recorded: list[Convolution], work: Work, calls: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(calls):
            for convolution in recorded:
                work(convolution)

    return run
