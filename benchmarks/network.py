"""The network that is measured, and the same inputs for everyone."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from benchmarks.harness import Layout, Precision
from trainer.unet import UNet, UNetConfig

CIFAR10 = UNetConfig(image_size=32, dropout=0.1)
"""The paper's CIFAR-10 network, 35,746,307 parameters: the one the bars are about."""
SMALL = UNetConfig(
    image_size=16,
    base_channels=32,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(8,),
    dropout=0.1,
)
"""For trying the benchmarks out; no bar is about it."""
NUM_TIMESTEPS = 1000
"""T of the paper."""


@dataclass(frozen=True)
class Batch:
    """Inputs of one call.

    Attributes:
        x_t: float32 [B, C, H, W] noisy images.
        t: int64 [B] timesteps.
        noise: float32, like x_t: what the network is to predict.
    """

    x_t: Tensor
    t: Tensor
    noise: Tensor

    @classmethod
    def draw(cls, config: UNetConfig, size: int) -> "Batch":
        """Random inputs, the same at every call."""
        generator = torch.Generator().manual_seed(1)
        shape = (size, config.in_channels, config.image_size, config.image_size)
        return cls(
            x_t=torch.randn(shape, generator=generator),
            t=torch.randint(NUM_TIMESTEPS, (size,), generator=generator),
            noise=torch.randn(shape, generator=generator),
        )

    def to(self, layout: Layout) -> "Batch":
        """The same inputs with images in this layout."""
        return replace(self, x_t=self.x_t.contiguous(memory_format=layout.memory_format))


def our_network(config: UNetConfig) -> UNet:
    """Our network in evaluation mode with weights far from any special value.

    Freshly initialised, the last layer of every branch is next to zero, which would hide what it multiplies
    from a comparison.
    """
    model = UNet(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            gain = "norm" in name and name.endswith("weight")
            parameter.normal_(1.0 if gain else 0.0, 0.05, generator=generator)
    return model.eval()


def count(model: nn.Module) -> int:
    """Number of a network's parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


@contextmanager
def autocast(precision: Precision) -> Iterator[None]:
    """The network's arithmetic in this precision, its parameters in float32."""
    with torch.autocast("cpu", torch.bfloat16, enabled=precision is Precision.BF16):
        yield


def compiled(model: nn.Module, *, fullgraph: bool) -> nn.Module:
    """`torch.compile` of a whole network, which is left as it is; shapes are fixed."""
    return torch.compile(model, fullgraph=fullgraph, dynamic=False)  # type: ignore[return-value]
