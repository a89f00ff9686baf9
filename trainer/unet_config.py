"""Shape of the U-Net, and the conventions in which published U-Nets of that shape differ, as data.

`ho` is the network of the paper's TensorFlow code, `openai` the one of improved- and guided-diffusion,
`diffusers` the one of `UNet2DModel`'s defaults. They have the same parameters under the same names; what
differs is how these are drawn, and what is computed with them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Final


class Profile(StrEnum):
    """Whose conventions the network follows; `CONVENTIONS` tells what they are."""

    HO = "ho"
    OPENAI = "openai"
    DIFFUSERS = "diffusers"


@dataclass(frozen=True)
class Conventions:
    """What the profiles differ in.

    Attributes:
        downsample_padding: Zero rows above and below (columns left and right) a stride-2 convolution's input.
        cosine_first: Whether the cosines of the time embedding precede the sines.
        frequency_offset: The lowest of the n frequencies is 10000^(-(n - 1) / (n - frequency_offset)):
            exactly 1/10000 with 1, a little more with 0.
        norm_eps: What group normalisation adds to the variance.
        xavier: Whether weights start Xavier-uniform over zero biases; otherwise uniform in ±1/sqrt(fan in),
            biases too, as torch's own layers do.
        branch_end_scale: Factor on the initial variance of the last layer of every residual branch and of the
            network.
        num_heads: Attention heads where the configuration names neither these nor head_channels.
        head_channels: Channels of a head where the configuration names neither.
    """

    downsample_padding: tuple[int, int]
    cosine_first: bool
    frequency_offset: int
    norm_eps: float
    xavier: bool
    branch_end_scale: float
    num_heads: int | None = None
    head_channels: int | None = None


CONVENTIONS: Final[Mapping[Profile, Conventions]] = MappingProxyType(
    {
        # TensorFlow's 'SAME' pads the end only, its group normalisation has eps 1e-6, and the branches start
        # near zero, not at it: variance scale 1e-10.
        Profile.HO: Conventions(
            downsample_padding=(0, 1),
            cosine_first=False,
            frequency_offset=1,
            norm_eps=1e-6,
            xavier=True,
            branch_end_scale=1e-10,
            num_heads=1,
        ),
        # Its scripts ask for 4 heads; its class alone would take 1.
        Profile.OPENAI: Conventions(
            downsample_padding=(1, 1),
            cosine_first=True,
            frequency_offset=0,
            norm_eps=1e-5,
            xavier=False,
            branch_end_scale=0.0,
            num_heads=4,
        ),
        Profile.DIFFUSERS: Conventions(
            downsample_padding=(1, 1),
            cosine_first=True,
            frequency_offset=0,
            norm_eps=1e-5,
            xavier=False,
            branch_end_scale=1.0,
            head_channels=8,
        ),
    }
)


@dataclass(frozen=True)
class UNetConfig:
    """Shape of the network. Defaults: the paper's CIFAR-10 model (35,746,307 parameters, dropout 0.1 there).

    Attributes:
        image_size: Height and width; divisible by block_size * 2^(levels - 1).
        in_channels: Channels of the image.
        out_channels: Channels of the output; twice the image's with learned variances.
        base_channels: Width of the finest level and of the time embedding's sinusoids; even, at least 4.
        channel_multipliers: Width of each level over base_channels, finest first.
        num_res_blocks: Residual blocks per level on the way down; one more on the way up.
        attention_resolutions: Heights at which each residual block is followed by self-attention. The
            middle always has one.
        dropout: Probability, in [0, 1), inside the residual blocks.
        norm_groups: Groups of every normalisation; must divide the width of each level.
        profile: Whose conventions to follow.
        num_heads: Attention heads; must divide the width of each level with attention.
        head_channels: Channels of one head instead. Neither: the profile's default.
        scale_shift_norm: Whether the time scales and shifts the second normalisation of a residual block
            instead of being added before it (Dhariwal & Nichol 2021, eq. 8).
        block_size: Squares of so many pixels a side become channels before the network, and channels become
            squares after it.
        num_classes: Number of class labels the network is conditioned on; None: on none.
        checkpoint_activations: Whether to keep only the blocks' inputs for the backward pass and compute the
            rest again: less memory, a third more arithmetic, the same gradients.

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
    profile: Profile = Profile.HO
    num_heads: int | None = None
    head_channels: int | None = None
    scale_shift_norm: bool = False
    block_size: int = 1
    num_classes: int | None = None
    checkpoint_activations: bool = False

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
            "num_heads": self.num_heads,
            "head_channels": self.head_channels,
            "block_size": self.block_size,
            "num_classes": self.num_classes,
        }.items():
            if least is not None and least < 1:
                raise ValueError(f"{name} must be at least 1, got {least}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")
        self._check_sizes()
        self._check_widths()
        self._check_heads()

    def _check_sizes(self) -> None:
        halvings = len(self.channel_multipliers) - 1
        multiple = self.block_size * 2**halvings
        if self.image_size % multiple:
            remedy = "name fewer channel_multipliers"
            blocks = ""
            if self.block_size > 1:
                blocks, remedy = f"cut into blocks of {self.block_size} and ", "change block_size"
            raise ValueError(
                f"image_size {self.image_size} cannot be {blocks}halved {halvings} times: make it a multiple "
                f"of {multiple}, or {remedy}"
            )
        absent = sorted(set(self.attention_resolutions) - set(self.resolutions))
        if absent:
            raise ValueError(
                f"attention_resolutions {absent} never occur: the levels are {list(self.resolutions)} high"
            )

    def _check_widths(self) -> None:
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

    def _check_heads(self) -> None:
        if self.num_heads is not None and self.head_channels is not None:
            raise ValueError(
                f"num_heads {self.num_heads} and head_channels {self.head_channels} both say how attention "
                "is divided: give one of them"
            )
        name, number = self._division
        for width in self.attention_widths:
            if width % number:
                given = self.num_heads is not None or self.head_channels is not None
                whose = "" if given else f", the default of {self.profile},"
                raise ValueError(
                    f"{name} {number}{whose} does not divide a width of {width} channels that has "
                    f"attention: set {name} to a divisor, e.g. {math.gcd(width, number)}, or change "
                    "base_channels"
                )

    @property
    def _division(self) -> tuple[str, int]:
        """How attention divides a width: the name of the deciding number and the number."""
        source = self if self.num_heads or self.head_channels else self.conventions
        if source.num_heads is not None:
            return "num_heads", source.num_heads
        assert source.head_channels is not None, "every profile names one"
        return "head_channels", source.head_channels

    @property
    def conventions(self) -> Conventions:
        """What the profile stands for."""
        return CONVENTIONS[self.profile]

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, finest first."""
        return tuple(self.base_channels * multiplier for multiplier in self.channel_multipliers)

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Height of each level, finest first."""
        return tuple(
            self.image_size // self.block_size >> level for level in range(len(self.channel_multipliers))
        )

    def attends(self, level: int) -> bool:
        """Tells whether a level, counted from the finest, has attention."""
        return self.resolutions[level] in self.attention_resolutions

    @property
    def attention_widths(self) -> tuple[int, ...]:
        """Channels of the levels with attention, finest first, and of the middle, which always has it."""
        attending = (width for level, width in enumerate(self.widths) if self.attends(level))
        return tuple(dict.fromkeys((*attending, self.widths[-1])))

    def heads(self, width: int) -> int:
        """Returns the number of attention heads at a width of so many channels."""
        name, number = self._division
        return number if name == "num_heads" else width // number
