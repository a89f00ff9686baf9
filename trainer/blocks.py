"""The parts of the U-Net: residual blocks, attention, resampling, and the levels they form.

Every block hands activations on in the layout they came in. What differs between the profiles is read off
`UNetConfig.conventions`.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainer.layers import Conv2d, Dropout, GroupNorm, Linear, like, prefers_pixels
from trainer.unet_config import UNetConfig


class ResBlock(nn.Module):
    """Residual block: twice normalise, swish, convolve; the time enters between the two.

    Args:
        in_channels: Channels in.
        out_channels: Channels out; where they differ a 1x1 convolution carries the shortcut.
        config: Configuration of the network.
    """

    def __init__(self, in_channels: int, out_channels: int, config: UNetConfig) -> None:
        super().__init__()
        conventions = config.conventions
        self.scale_shift = config.scale_shift_norm
        self.norm1 = GroupNorm(config.norm_groups, in_channels, conventions)
        self.conv1 = Conv2d(in_channels, out_channels, 3, conventions)
        time_channels = 2 * out_channels if self.scale_shift else out_channels
        self.time_proj = Linear(4 * config.base_channels, time_channels, conventions)
        self.norm2 = GroupNorm(config.norm_groups, out_channels, conventions)
        self.dropout = Dropout(config.dropout)
        self.conv2 = Conv2d(out_channels, out_channels, 3, conventions, ends_branch=True)
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.shortcut = Conv2d(in_channels, out_channels, 1, conventions)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Maps x [B, in, H, W] and the swished embedding [B, 4 base] to [B, out, H, W]."""
        h = self.conv1(F.silu(self.norm1(x)))
        time = self.time_proj(embedding)[:, :, None, None]
        if self.scale_shift:
            scale, shift = time.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + time)
        h = self.conv2(self.dropout(F.silu(h)))
        return cast(Tensor, self.shortcut(x) + h)


class Attention(nn.Module):
    """Self-attention over all pixels, with a residual.

    Args:
        channels: Channels in and out.
        config: Configuration of the network.
    """

    def __init__(self, channels: int, config: UNetConfig) -> None:
        super().__init__()
        conventions = config.conventions
        self.heads = config.heads(channels)
        self.norm = GroupNorm(config.norm_groups, channels, conventions)
        self.query = Linear(channels, channels, conventions)
        self.key = Linear(channels, channels, conventions)
        self.value = Linear(channels, channels, conventions)
        self.out = Linear(channels, channels, conventions, ends_branch=True)

    def forward(self, x: Tensor) -> Tensor:
        """Maps x [B, C, H, W] to the same shape."""
        h = self.norm(x)
        # One product for all three: their gradients then need no adding up.
        layers = (self.query, self.key, self.value)
        weight = torch.cat([layer.weight for layer in layers])
        bias = torch.cat([layer.bias for layer in layers])
        mix = self.mix_pixels if prefers_pixels(h) else self.mix_channels
        return x + mix(h, weight, bias)

    def mix_pixels(self, h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Attends over pixels [B, HW, C], as channels_last lays them.

        Args:
            h: [B, C, H, W], normalised.
            weight: [3 C, C] of query, key and value.
            bias: [3 C].

        Returns:
            [B, C, H, W], the branch's outcome.
        """
        B, C, H, W = h.shape
        pixels = h.permute(0, 2, 3, 1).reshape(B, H * W, C)
        split = F.linear(pixels, weight, bias).view(B, H * W, 3, self.heads, C // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        # Scaled by 1 / sqrt(channels of a head).
        mixed = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(B, H * W, C))
        return out.view(B, H, W, C).permute(0, 3, 1, 2)

    def mix_channels(self, h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The same over [B, C, HW] by plain products, which spare a CPU the rearranging."""
        B, C, H, W = h.shape
        channels = C // self.heads
        split = F.conv2d(h, weight[:, :, None, None], bias).reshape(B, 3, self.heads, channels, H * W)
        query, key, value = (part.reshape(B * self.heads, channels, H * W) for part in split.unbind(1))
        scores = torch.bmm((query * channels**-0.5).transpose(1, 2), key)
        shares = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
        mixed = torch.bmm(value, shares.to(value.dtype).transpose(1, 2)).view(B, C, H, W)
        return like(F.conv2d(mixed, self.out.weight[:, :, None, None], self.out.bias), h)


class Downsample(nn.Module):
    """Halves height and width with a learned stride-2 convolution.

    Args:
        channels: Channels in and out.
        config: Configuration of the network.
    """

    def __init__(self, channels: int, config: UNetConfig) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, config.conventions)
        before, after = config.conventions.downsample_padding
        # On even sizes a row of padding below that the last window does not reach makes no difference.
        self.conv.stride, self.conv.padding = (2, 2), (before, before)
        self.padding = None if before else (0, after, 0, after)

    def forward(self, x: Tensor) -> Tensor:
        """Maps x [B, C, H, W] to [B, C, H/2, W/2]."""
        return cast(Tensor, self.conv(x if self.padding is None else F.pad(x, self.padding)))


class Upsample(nn.Module):
    """Doubles height and width: nearest neighbour, then a learned convolution.

    Args:
        channels: Channels in and out.
        config: Configuration of the network.
    """

    def __init__(self, channels: int, config: UNetConfig) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, config.conventions)

    def forward(self, x: Tensor) -> Tensor:
        """Maps x [B, C, H, W] to [B, C, 2H, 2W]."""
        return cast(Tensor, self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest")))


class Level(nn.Module):
    """One resolution on one way: residual blocks, each with its attention where the resolution has it.

    Args:
        in_channels: Channels into each residual block.
        out_channels: Channels out of each of them.
        attends: Whether attention follows each block.
        resample: Leads on to the next level, None at the end.
        config: Configuration of the network.
    """

    def __init__(
        self,
        in_channels: Iterable[int],
        out_channels: int,
        attends: bool,
        resample: Downsample | Upsample | None,
        config: UNetConfig,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ResBlock(channels, out_channels, config) for channels in in_channels)
        self.attentions = nn.ModuleList(
            Attention(out_channels, config) if attends else nn.Identity() for _ in self.blocks
        )
        self.downsample = resample if isinstance(resample, Downsample) else None
        self.upsample = resample if isinstance(resample, Upsample) else None
        self.recomputes = config.checkpoint_activations

    def descend(self, h: Tensor, embedding: Tensor) -> list[Tensor]:
        """Runs the level on the way down; returns everything the way up will be given."""
        skips = []
        for block, attention in zip(self.blocks, self.attentions, strict=True):
            h = recomputed(self.recomputes, partial(_attend, block, attention), embedding, h)
            skips.append(h)
        if self.downsample is not None:
            skips.append(self.downsample(h))
        return skips

    def ascend(self, h: Tensor, embedding: Tensor, skips: list[Tensor]) -> Tensor:
        """Runs the level on the way up, taking its skips off the end of the list."""
        for block, attention in zip(self.blocks, self.attentions, strict=True):
            h = recomputed(self.recomputes, partial(_attend, block, attention), embedding, h, skips.pop())
        return h if self.upsample is None else self.upsample(h)


def _attend(block: nn.Module, attention: nn.Module, embedding: Tensor, *parts: Tensor) -> Tensor:
    """A residual block on the concatenated channels of the parts, then its attention."""
    h = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
    return cast(Tensor, attention(block(h, embedding)))


def recomputed(enabled: bool, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Applies a function; if enabled, what its gradient needs is computed again instead of kept.

    Args:
        enabled: Whether to save memory. Where nobody asks for gradients there is nothing to save.
        function: Draws at most from torch's own generators, whose state is put back for the second time.
        inputs: Its arguments.
    """
    if enabled and torch.is_grad_enabled():
        return checkpoint(function, *inputs, use_reentrant=False)
    return function(*inputs)


class Middle(nn.Module):
    """The coarsest level's residual block, attention, residual block.

    Args:
        channels: Channels in and out.
        config: Configuration of the network.
    """

    def __init__(self, channels: int, config: UNetConfig) -> None:
        super().__init__()
        self.block1 = ResBlock(channels, channels, config)
        self.attention = Attention(channels, config)
        self.block2 = ResBlock(channels, channels, config)
        self.recomputes = config.checkpoint_activations

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        """Maps h [B, C, H, W] and the swished embedding to the same shape as h."""
        h = recomputed(self.recomputes, partial(_attend, self.block1, self.attention), embedding, h)
        return recomputed(self.recomputes, self.block2, h, embedding)


class Head(nn.Module):
    """Normalise, swish, and the last convolution.

    Args:
        channels: Channels in.
        out_channels: Channels out.
        config: Configuration of the network.
    """

    def __init__(self, channels: int, out_channels: int, config: UNetConfig) -> None:
        super().__init__()
        self.norm = GroupNorm(config.norm_groups, channels, config.conventions)
        self.conv = Conv2d(channels, out_channels, 3, config.conventions, ends_branch=True)

    def forward(self, h: Tensor) -> Tensor:
        """Maps h [B, C, H, W] to [B, out, H, W]."""
        return cast(Tensor, self.conv(F.silu(self.norm(h))))
