"""Layers of the network that start, round and lie in memory as the profile says."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.unet_config import Conventions


class Conv2d(nn.Conv2d):
    """A square convolution with an odd kernel; as it stands, it keeps the size.

    Args:
        in_channels: Channels in.
        out_channels: Channels out.
        kernel_size: Odd height and width.
        conventions: How the weights start.
        ends_branch: Whether this is the last layer of a residual branch or of the network.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        conventions: Conventions,
        *,
        ends_branch: bool = False,
    ) -> None:
        self.conventions, self.ends_branch = conventions, ends_branch
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws the initial weights."""
        _draw(self, self.conventions, self.ends_branch, generator)

    def forward(self, x: Tensor) -> Tensor:
        """Convolves x [B, in, H, W]."""
        if self.kernel_size == (1, 1) and prefers_pixels(x):
            return self.dense(x)
        return super().forward(x)

    def dense(self, x: Tensor) -> Tensor:
        """A 1x1 convolution as a dense layer over the pixels of x [B, in, H, W]."""
        pixels = F.linear(x.permute(0, 2, 3, 1), self.weight[:, :, 0, 0], self.bias)
        return pixels.permute(0, 3, 1, 2)


class Linear(nn.Linear):
    """A dense layer.

    Args:
        in_features: Features in.
        out_features: Features out.
        conventions: How the weights start.
        ends_branch: Whether this is the last layer of a residual branch.
    """

    def __init__(
        self, in_features: int, out_features: int, conventions: Conventions, *, ends_branch: bool = False
    ) -> None:
        self.conventions, self.ends_branch = conventions, ends_branch
        super().__init__(in_features, out_features)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws the initial weights."""
        _draw(self, self.conventions, self.ends_branch, generator)


def _draw(
    layer: Conv2d | Linear, conventions: Conventions, ends_branch: bool, generator: torch.Generator | None
) -> None:
    """Uniform weights: Xavier's over zero biases, or torch's own, biases too; branch ends scaled."""
    receptive = layer.weight[0, 0].numel()
    fan_out, fan_in = (size * receptive for size in layer.weight.shape[:2])
    precision = (fan_in + fan_out) / 2 if conventions.xavier else 3 * fan_in  # 1 / variance
    limit = math.sqrt(3 * (conventions.branch_end_scale if ends_branch else 1.0) / precision)
    assert layer.bias is not None
    with torch.no_grad():
        layer.weight.uniform_(-limit, limit, generator=generator)
        if conventions.xavier:
            layer.bias.zero_()
        else:
            layer.bias.uniform_(-limit, limit, generator=generator)


class Embedding(nn.Embedding):
    """A row of numbers for every class.

    Args:
        num_embeddings: Number of classes.
        embedding_dim: Numbers in a row.
        conventions: How the rows start.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, conventions: Conventions) -> None:
        self.conventions = conventions
        super().__init__(num_embeddings, embedding_dim)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws the initial rows: as a dense layer over one-hot labels, or standard normal as torch's own."""
        with torch.no_grad():
            if self.conventions.xavier:
                limit = math.sqrt(6 / (self.num_embeddings + self.embedding_dim))
                self.weight.uniform_(-limit, limit, generator=generator)
            else:
                self.weight.normal_(generator=generator)


class GroupNorm(nn.GroupNorm):
    """Group normalisation that hands activations on in the layout they came in.

    Args:
        groups: Number of groups.
        channels: Number of channels.
        conventions: What is added to the variance.
    """

    def __init__(self, groups: int, channels: int, conventions: Conventions) -> None:
        super().__init__(groups, channels, eps=conventions.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """Normalises x [B, C, H, W]."""
        # CUDA's kernel answers in the contiguous layout whatever it is given; elsewhere this is no operation.
        return like(super().forward(x), x)


class Dropout(nn.Module):
    """Dropout; on a CPU with masks from 16 random bits for each number, four numbers to a draw.

    Torch draws a CPU's masks one by one, which takes as long as all normalisations together. There the
    probability is the nearest multiple of 2^-16, never 1, and what is kept is divided by exactly what that
    leaves.

    Args:
        probability: Of a number becoming 0, in [0, 1).
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability
        self.dropped = min(round(probability * 2**16), 2**16 - 1)

    def forward(self, x: Tensor) -> Tensor:
        """Drops numbers of x while training."""
        if not self.training or self.probability == 0.0:
            return x
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return F.dropout(x, self.probability)
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        bits = words.view(torch.int16)[: x.numel()]
        kept = (bits >= self.dropped - 2**15).to(x.dtype).mul_(2**16 / (2**16 - self.dropped))
        return x * like(kept.view(x.shape), x)


def time_embedding(t: Tensor, channels: int, conventions: Conventions) -> Tensor:
    """Sinusoids of the timestep, a block of sines and a block of cosines, in the conventions' order.

    The frequencies are w_i = 10000^(-i / (n - offset)) for i < n = channels / 2.

    Args:
        t: int64 [B] timesteps, raw.
        channels: Even number of sinusoids, at least 4.
        conventions: Order of the blocks and offset.

    Returns:
        float32 [B, channels].
    """
    half = channels // 2
    index = torch.arange(half, dtype=torch.float32, device=t.device)
    frequencies = torch.exp(index * (-math.log(10000.0) / (half - conventions.frequency_offset)))
    angles = t.to(torch.float32)[:, None] * frequencies
    blocks = [angles.sin(), angles.cos()]
    return torch.cat(blocks[::-1] if conventions.cosine_first else blocks, dim=1)


def is_channels_last(x: Tensor) -> bool:
    """Tells whether [B, C, H, W] lies in memory as [B, H, W, C], and only so."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def like(x: Tensor, other: Tensor) -> Tensor:
    """The same values in the layout of another tensor; no copy if they are already."""
    layout = torch.channels_last if is_channels_last(other) else torch.contiguous_format
    return x.contiguous(memory_format=layout)


def prefers_pixels(x: Tensor) -> bool:
    """Tells whether 1x1 convolutions of x [B, C, H, W] are better dense layers over [B, H, W, C].

    On a GPU, where torch's would add the bias separately; a CPU's convolutions are the faster ones.
    """
    return x.is_cuda and is_channels_last(x)


def fastest_layout(device: torch.device) -> torch.memory_format:
    """The layout in which the network is fastest on a device, with or without gradients as is the case.

    cuDNN's half-precision kernels take channels_last as it is. On a CPU oneDNN's forward convolutions are
    faster with it too, but what a gradient needs besides is faster on contiguous images.
    """
    trains_on_cpu = device.type == "cpu" and torch.is_grad_enabled()
    return torch.contiguous_format if trains_on_cpu else torch.channels_last


def space_to_depth(x: Tensor, block: int) -> Tensor:
    """Turns squares of pixels into channels, in TensorFlow's order.

    Args:
        x: [B, C, H, W], H and W divisible by block.
        block: Height and width of the squares.

    Returns:
        [B, block^2 C, H / block, W / block]: pixel (dy, dx) of a square, channel c is channel
        (dy * block + dx) * C + c.
    """
    B, C, H, W = x.shape
    squares = x.reshape(B, C, H // block, block, W // block, block)
    return squares.permute(0, 3, 5, 1, 2, 4).reshape(B, block * block * C, H // block, W // block)


def depth_to_space(x: Tensor, block: int) -> Tensor:
    """Turns channels back into squares of pixels: the inverse of `space_to_depth`.

    Args:
        x: [B, block^2 C, H, W].
        block: Height and width of the squares.

    Returns:
        [B, C, block H, block W].
    """
    B, channels, H, W = x.shape
    C = channels // block**2
    squares = x.reshape(B, block, block, C, H, W)
    return squares.permute(0, 3, 4, 1, 5, 2).reshape(B, C, block * H, block * W)
