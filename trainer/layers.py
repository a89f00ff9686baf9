"""Layers of the network that start, round and lie in memory as the paper's code had them."""

import math
from typing import cast

import torch
from torch import Tensor, nn

NEAR_ZERO = 1e-10
"""Variance scale of the layers that start near zero."""


class Conv2d(nn.Conv2d):
    """A square convolution that keeps the size (odd kernels) and starts as the paper's did.

    Args:
        in_channels: Channels in.
        out_channels: Channels out.
        kernel_size: Odd height and width.
        init_scale: Variance scale of the initial weights.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, init_scale: float = 1.0
    ) -> None:
        self.init_scale = init_scale
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws the initial weights."""
        _variance_scaling(self, self.init_scale, generator)


class Linear(nn.Linear):
    """A dense layer that starts as the paper's did.

    Args:
        in_features: Features in.
        out_features: Features out.
        init_scale: Variance scale of the initial weights.
    """

    def __init__(self, in_features: int, out_features: int, init_scale: float = 1.0) -> None:
        self.init_scale = init_scale
        super().__init__(in_features, out_features)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws the initial weights."""
        _variance_scaling(self, self.init_scale, generator)


def _variance_scaling(layer: Conv2d | Linear, scale: float, generator: torch.Generator | None) -> None:
    """Zero bias; uniform weights of variance scale / mean(fan in, fan out): Xavier's at scale 1."""
    fan_out, fan_in = layer.weight.shape[:2]
    receptive = layer.weight[0, 0].numel()
    limit = math.sqrt(3 * scale / ((fan_in + fan_out) * receptive / 2))
    with torch.no_grad():
        layer.weight.uniform_(-limit, limit, generator=generator)
        cast(Tensor, layer.bias).zero_()


class GroupNorm(nn.GroupNorm):
    """Group normalisation with the paper's eps that hands activations on in the layout they came in.

    Args:
        groups: Number of groups.
        channels: Number of channels.
    """

    def __init__(self, groups: int, channels: int) -> None:
        super().__init__(groups, channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Normalises x [B, C, H, W]."""
        # CUDA's kernel answers in the contiguous layout; elsewhere this is no operation.
        return channels_last(super().forward(x))


def time_embedding(t: Tensor, channels: int) -> Tensor:
    """Sinusoids of the timestep: sin(t w_i) for all i, then cos(t w_i), w_i = 10000^(-i / (channels/2 - 1)).

    Args:
        t: int64 [B] timesteps, raw.
        channels: Even number of sinusoids, at least 4.

    Returns:
        float32 [B, channels].
    """
    half = channels // 2
    index = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t.to(torch.float32)[:, None] * torch.exp(index * (-math.log(10000.0) / (half - 1)))
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def channels_last(x: Tensor) -> Tensor:
    """The same [B, C, H, W] values laid out as [B, H, W, C]; no copy if they are already."""
    return x.contiguous(memory_format=torch.channels_last)
