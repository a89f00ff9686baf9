"""The convolutions of the network alone: what nobody who computes them by the same kernels can undercut.

Measured with torch's kernels; in float32 in both layouts, and with ours: on a CPU `trainer.winograd` computes
most of them with fewer multiplications, so ours may stay below torch's floor; its own is the other one.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Contender, Label, Layout, Mode, Precision
from benchmarks.network import Batch, our_network
from trainer.unet import UNet, UNetConfig

TORCH_FLOOR = "convolutions"
"""Contender's name of the network's convolutions alone, by torch's kernels."""
OUR_FLOOR = "our-convolutions"
"""The same by whatever kernels our network calls."""

Work = Callable[["Convolution", Callable[["Convolution"], Tensor]], object]
"""(convolution, how it is computed) -> what is timed of it: `forward` or `forward_backward`."""


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

    def by_torch(self) -> Tensor:
        """The output, by torch's kernel."""
        layer = self.layer
        assert not isinstance(layer.padding, str)
        return F.conv2d(self.x, layer.weight, layer.bias, layer.stride, layer.padding)

    def by_us(self) -> Tensor:
        """The output, as our layer computes it."""
        output: Tensor = self.layer(self.x)
        return output


@torch.no_grad()
def forward(convolution: Convolution, compute: Callable[[Convolution], Tensor]) -> None:
    """What sampling needs of a convolution."""
    compute(convolution)


def forward_backward(convolution: Convolution, compute: Callable[[Convolution], Tensor]) -> None:
    """What training needs: the output, and the gradient of every operand that has one."""
    operands = (convolution.x, *convolution.layer.parameters())
    torch.autograd.grad(
        compute(convolution), [tensor for tensor in operands if tensor.requires_grad], convolution.grad
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
    """The convolutions alone, by torch's kernels in the layout of our network, and in fp32 by two more ways.

    Args:
        config: The network.
        batch: Inputs.
        precision: Of all operands.
        work: `forward` or `forward_backward`.
        calls: Of the network, in one call of the contender.
    """
    model = our_network(config).to(precision.dtype)
    kinds = [(TORCH_FLOOR, Convolution.by_torch, Layout.CHANNELS_LAST)]
    if precision is Precision.FP32:
        kinds.append((TORCH_FLOOR, Convolution.by_torch, Layout.CONTIGUOUS))
        kinds.append((OUR_FLOOR, Convolution.by_us, Layout.CHANNELS_LAST))  # in bf16 ours are torch's
    for name, compute, layout in kinds:
        label = Label(contender=name, precision=precision, mode=Mode.EAGER, layout=layout, batch=len(batch.t))
        yield Contender(label, _work(convolutions(model, batch, layout), compute, work, calls))


def _work(
    recorded: list[Convolution], compute: Callable[[Convolution], Tensor], work: Work, calls: int
) -> Callable[[], None]:
    def run() -> None:
        for _ in range(calls):
            for convolution in recorded:
                work(convolution, compute)

    return run
