"""The paper's U-Net (Ho et al. 2020, appendix B; details as its published TensorFlow code ran them).

Architecture only: no parallelism, no autocast, no device. What others often change and this one keeps:

* A stride-2 convolution pads one row below and one column to the right ('SAME' on even sizes).
* The time embedding is a sine block, then a cosine block; frequencies run from 1 to exactly 1/10000.
* Self-attention has one head with scale C^-1/2.
* Group normalisation has 32 groups and eps 1e-6.
* Weights are Xavier-uniform, 1x1 and dense layers included; biases start at 0; the last layer of every
  residual branch and of the network starts near zero (variance scale 1e-10, not an exact 0).

Parameters are contiguous, activations channels_last. The names of the parameters are keys of checkpoints
and never change; levels are numbered by resolution (0 is the finest) both on the way down and up.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.layers import NEAR_ZERO, Conv2d, GroupNorm, Linear, channels_last, time_embedding


@dataclass(frozen=True)
class UNetConfig:
    """Shape of the network. Defaults: the paper's CIFAR-10 model (35,746,307 parameters, dropout 0.1 there).

    Attributes:
        image_size: Height and width; divisible by 2^(levels - 1).
        in_channels: Channels of the image.
        out_channels: Channels of the output.
        base_channels: Width of the finest level and of the time embedding's sinusoids; even, at least 4.
        channel_multipliers: Width of each level over base_channels, finest first.
        num_res_blocks: Residual blocks per level on the way down; one more on the way up.
        attention_resolutions: Heights at which each residual block is followed by self-attention. The
            middle always has one.
        dropout: Probability, in [0, 1), inside the residual blocks.
        norm_groups: Groups of every normalisation; must divide the width of each level.

    Raises:
        ValueError: At construction, if the numbers do not fit together.
    """

    image_size: int
    in_channels: int = 3
    out_channels: int = 3
    base_channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 2)
    num_res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (16,)
    dropout: float = 0.0
    norm_groups: int = 32

    def __post_init__(self) -> None:
        if not self.channel_multipliers:
            raise ValueError("channel_multipliers must name at least one level")
        for name, least in {
            "image_size": self.image_size,
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "channel_multipliers": min(self.channel_multipliers),
            "num_res_blocks": self.num_res_blocks,
            "norm_groups": self.norm_groups,
        }.items():
            if least < 1:
                raise ValueError(f"{name} must be at least 1, got {least}")
        halvings = len(self.channel_multipliers) - 1
        if self.image_size % 2**halvings:
            raise ValueError(
                f"image_size {self.image_size} cannot be halved {halvings} times: make it a multiple of "
                f"{2**halvings}, or name fewer channel_multipliers"
            )
        if self.base_channels % 2 or self.base_channels < 4:
            raise ValueError(
                f"base_channels must be even and at least 4 (halves: sine, cosine), got {self.base_channels}"
            )
        for width in (self.base_channels, *self.widths):
            if width % self.norm_groups:
                raise ValueError(
                    f"norm_groups {self.norm_groups} does not divide a width of {width} channels: set "
                    f"norm_groups to a divisor of base_channels {self.base_channels}, e.g. "
                    f"{math.gcd(self.base_channels, 32)}, or change base_channels"
                )
        absent = sorted(set(self.attention_resolutions) - set(self.resolutions))
        if absent:
            raise ValueError(
                f"attention_resolutions {absent} never occur: the levels are {list(self.resolutions)} high"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, finest first."""
        return tuple(self.base_channels * multiplier for multiplier in self.channel_multipliers)

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Height of each level, finest first."""
        return tuple(self.image_size >> level for level in range(len(self.channel_multipliers)))


class ResBlock(nn.Module):
    """Residual block: twice normalise, swish, convolve; the time enters between the two.

    Args:
        in_channels: Channels in.
        out_channels: Channels out; where they differ a 1x1 convolution carries the shortcut.
        config: Configuration of the network.
    """

    def __init__(self, in_channels: int, out_channels: int, config: UNetConfig) -> None:
        super().__init__()
        self.norm1 = GroupNorm(config.norm_groups, in_channels)
        self.conv1 = Conv2d(in_channels, out_channels, 3)
        self.time_proj = Linear(4 * config.base_channels, out_channels)
        self.norm2 = GroupNorm(config.norm_groups, out_channels)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = Conv2d(out_channels, out_channels, 3, init_scale=NEAR_ZERO)
        self.shortcut = nn.Identity() if in_channels == out_channels else Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Maps x [B, in, H, W] and the time embedding [B, 4 base] to [B, out, H, W]."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_proj(F.silu(embedding))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return cast(Tensor, self.shortcut(x) + h)


class Attention(nn.Module):
    """Self-attention over all pixels, one head, with a residual.

    Args:
        channels: Channels in and out.
        config: Configuration of the network.
    """

    def __init__(self, channels: int, config: UNetConfig) -> None:
        super().__init__()
        self.norm = GroupNorm(config.norm_groups, channels)
        self.query = Linear(channels, channels)
        self.key = Linear(channels, channels)
        self.value = Linear(channels, channels)
        self.out = Linear(channels, channels, init_scale=NEAR_ZERO)

    def forward(self, x: Tensor) -> Tensor:
        """Maps x [B, C, H, W] to the same shape."""
        B, C, H, W = x.shape
        # In channels_last the pixels already lie in memory as [B, HW, C].
        pixels = self.norm(x).permute(0, 2, 3, 1).reshape(B, 1, H * W, C)
        mixed = F.scaled_dot_product_attention(
            self.query(pixels), self.key(pixels), self.value(pixels), scale=C**-0.5
        )
        h: Tensor = self.out(mixed).reshape(B, H, W, C).permute(0, 3, 1, 2)
        return x + h


class Downsample(nn.Module):
    """Halves height and width with a learned stride-2 convolution.

    Args:
        channels: Channels in and out.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3)
        self.conv.stride, self.conv.padding = (2, 2), (0, 0)

    def forward(self, x: Tensor) -> Tensor:
        """Maps x [B, C, H, W] to [B, C, H/2, W/2]."""
        return cast(Tensor, self.conv(F.pad(x, (0, 1, 0, 1))))


class Upsample(nn.Module):
    """Doubles height and width: nearest neighbour, then a learned convolution.

    Args:
        channels: Channels in and out.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3)

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

    def descend(self, h: Tensor, embedding: Tensor) -> list[Tensor]:
        """Runs the level on the way down; returns everything the way up will be given."""
        skips = []
        for block, attention in zip(self.blocks, self.attentions, strict=True):
            h = attention(block(h, embedding))
            skips.append(h)
        if self.downsample is not None:
            skips.append(self.downsample(h))
        return skips

    def ascend(self, h: Tensor, embedding: Tensor, skips: list[Tensor]) -> Tensor:
        """Runs the level on the way up, taking its skips off the end of the list."""
        for block, attention in zip(self.blocks, self.attentions, strict=True):
            h = attention(block(torch.cat([h, skips.pop()], dim=1), embedding))
        return h if self.upsample is None else self.upsample(h)


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

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        """Maps h [B, C, H, W] and the time embedding to the same shape as h."""
        return cast(Tensor, self.block2(self.attention(self.block1(h, embedding)), embedding))


class Head(nn.Module):
    """Normalise, swish, and the last convolution.

    Args:
        config: Configuration of the network.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.norm = GroupNorm(config.norm_groups, config.widths[0])
        self.conv = Conv2d(config.widths[0], config.out_channels, 3, init_scale=NEAR_ZERO)

    def forward(self, h: Tensor) -> Tensor:
        """Maps h [B, C, H, W] to [B, out, H, W]."""
        return cast(Tensor, self.conv(F.silu(self.norm(h))))


class UNet(nn.Module):
    """The network: a noisy image and its timestep to the prediction.

    Args:
        config: Shape of the network.
        generator: Draws the initial weights, so that every process can draw the same; default: torch's own.

    Attributes:
        config: As given.
    """

    def __init__(self, config: UNetConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        base, widths, last = config.base_channels, config.widths, len(config.widths) - 1
        self.time_embed = nn.Sequential(Linear(base, 4 * base), nn.SiLU(), Linear(4 * base, 4 * base))
        self.stem = Conv2d(config.in_channels, base, 3)
        skips = [base]
        self.down = nn.ModuleList()
        for level, width in enumerate(widths):
            inputs = [skips[-1]] + [width] * (config.num_res_blocks - 1)
            resample = Downsample(width) if level < last else None
            self.down.append(Level(inputs, width, self._attends(level), resample, config))
            skips += [width] * (config.num_res_blocks + (level < last))
        self.mid = Middle(widths[-1], config)
        up: list[Level] = []
        h = widths[-1]
        for level in range(last, -1, -1):
            width = widths[level]
            inputs = [before + skips.pop() for before in [h] + [width] * config.num_res_blocks]
            up.append(Level(inputs, width, self._attends(level), Upsample(width) if level else None, config))
            h = width
        self.up = nn.ModuleList(reversed(up))
        self.head = Head(config)
        if generator is not None:
            self.reset_parameters(generator)

    def _attends(self, level: int) -> bool:
        return self.config.resolutions[level] in self.config.attention_resolutions

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws all initial weights afresh, in the order of the modules.

        Args:
            generator: Where from; default: torch's own generator.
        """
        for module in self.modules():
            if isinstance(module, Conv2d | Linear):
                module.reset_parameters(generator)
            elif isinstance(module, GroupNorm):
                module.reset_parameters()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Predicts from noisy images.

        Args:
            x: [B, in_channels, image_size, image_size], of the parameters' precision or under autocast.
            t: int64 [B] timesteps in [0, T), raw.

        Returns:
            [B, out_channels, image_size, image_size].

        Raises:
            ValueError: On a wrong shape or type of either.
        """
        size = self.config.image_size
        if x.ndim != 4 or x.shape[1:] != (self.config.in_channels, size, size):
            raise ValueError(
                f"images must be [B, {self.config.in_channels}, {size}, {size}], got {list(x.shape)}"
            )
        if not x.is_floating_point():
            raise ValueError(f"images must be of floating precision in [-1, 1], got {x.dtype}")
        if t.dtype != torch.int64 or t.shape != x.shape[:1]:
            raise ValueError(f"t must be int64 of shape [{x.shape[0]}], got {t.dtype} {list(t.shape)}")
        sinusoids = time_embedding(t, self.config.base_channels)
        embedding = self.time_embed(sinusoids.to(self.stem.weight.dtype))
        # An image of one channel has both layouts at once, and torch may take it for the contiguous one:
        # hence once before and once after.
        skips = [channels_last(self.stem(channels_last(x)))]
        for level in self.down:
            skips += cast(Level, level).descend(skips[-1], embedding)
        h = self.mid(skips[-1], embedding)
        for level in list(self.up)[::-1]:
            h = cast(Level, level).ascend(h, embedding, skips)
        assert not skips, "every skip is used"
        return cast(Tensor, self.head(h))
