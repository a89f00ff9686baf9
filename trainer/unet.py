"""The paper's U-Net (Ho et al. 2020, appendix B; details as its published TensorFlow code ran them).

Architecture only: no parallelism, no autocast, no device. What others often change and the default profile
keeps (`trainer.unet_config.CONVENTIONS` tells the others'):

* A stride-2 convolution pads one row below and one column to the right ('SAME' on even sizes).
* The time embedding is a sine block, then a cosine block; frequencies run from 1 to exactly 1/10000.
* Self-attention has one head with scale C^-1/2.
* Group normalisation has 32 groups and eps 1e-6.
* Weights are Xavier-uniform, 1x1 and dense layers included; biases start at 0; the last layer of every
  residual branch and of the network starts near zero (variance scale 1e-10, not an exact 0).

Parameters are contiguous; activations are in the layout that is fastest on the device, channels_last on a
GPU. The names of the parameters are keys of checkpoints and never change; levels are numbered by
resolution (0 is the finest) both on the way down and up.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.blocks import Attention, Downsample, Head, Level, Middle, ResBlock, Upsample
from trainer.layers import (
    Conv2d,
    Embedding,
    GroupNorm,
    Linear,
    depth_to_space,
    fastest_layout,
    space_to_depth,
    time_embedding,
)
from trainer.unet_config import CONVENTIONS, Conventions, Profile, UNetConfig

__all__ = ["CONVENTIONS", "Conventions", "Profile", "UNet", "UNetConfig", "compile_blocks"]


class UNet(nn.Module):
    """The network: a noisy image and its timestep to the prediction.

    Args:
        config: Shape of the network.
        generator: Draws the initial weights, so that every process can draw the same; default: torch's own.
        layout: Of the activations in memory; default: what is fastest on their device.

    Attributes:
        config: As given.
        layout: As given.
    """

    def __init__(
        self,
        config: UNetConfig,
        generator: torch.Generator | None = None,
        *,
        layout: torch.memory_format | None = None,
    ) -> None:
        super().__init__()
        self.config, self.layout = config, layout
        self.conventions = conventions = config.conventions
        pixels = config.block_size**2
        base, widths, last = config.base_channels, config.widths, len(config.widths) - 1
        self.time_embed = nn.Sequential(
            Linear(base, 4 * base, conventions), nn.SiLU(), Linear(4 * base, 4 * base, conventions)
        )
        self.stem = Conv2d(pixels * config.in_channels, base, 3, conventions)
        skips = [base]
        self.down = nn.ModuleList()
        for level, width in enumerate(widths):
            inputs = [skips[-1]] + [width] * (config.num_res_blocks - 1)
            resample = Downsample(width, config) if level < last else None
            self.down.append(Level(inputs, width, config.attends(level), resample, config))
            skips += [width] * (config.num_res_blocks + (level < last))
        self.mid = Middle(widths[-1], config)
        up: list[Level] = []
        h = widths[-1]
        for level in range(last, -1, -1):
            width = widths[level]
            inputs = [before + skips.pop() for before in [h] + [width] * config.num_res_blocks]
            upsample = Upsample(width, config) if level else None
            up.append(Level(inputs, width, config.attends(level), upsample, config))
            h = width
        self.up = nn.ModuleList(reversed(up))
        self.head = Head(h, pixels * config.out_channels, config)
        if config.num_classes is not None:
            # Last, so that a generator draws the other weights as it does without classes.
            self.class_embed = Embedding(config.num_classes + 1, 4 * base, conventions)
        if generator is not None:
            self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws all initial weights afresh, in the order of the modules.

        Args:
            generator: Where from; default: torch's own generator.
        """
        for module in self.modules():
            if isinstance(module, Conv2d | Linear | Embedding):
                module.reset_parameters(generator)
            elif isinstance(module, GroupNorm):
                module.reset_parameters()

    @property
    def null_label(self) -> int:
        """The label that stands for no class.

        Raises:
            ValueError: The network is not conditioned on classes.
        """
        if self.config.num_classes is None:
            raise ValueError("the network knows no classes: set num_classes for a null label")
        return self.config.num_classes

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Predicts from noisy images.

        Args:
            x: [B, in_channels, image_size, image_size], of the parameters' precision or under autocast.
            t: int64 [B] timesteps in [0, T), raw.
            labels: int64 [B] classes in [0, num_classes], num_classes for none; exactly if the network is
                conditioned on classes.

        Returns:
            [B, out_channels, image_size, image_size].

        Raises:
            ValueError: On a wrong shape or type of any; on labels missing, unasked for, or (on a CPU) out of
                range.
        """
        self._check(x, t)
        sinusoids = time_embedding(t, self.config.base_channels, self.conventions)
        embedding = self.time_embed(sinusoids.to(self.stem.weight.dtype))
        if self._labelled(labels, len(x)):
            embedding = embedding + self.class_embed(labels)
        # Every residual block begins with the swish of the embedding: once is enough.
        embedding = F.silu(embedding)
        # An image of one channel has both layouts at once, and torch may take it for the other one: hence
        # once before and once after.
        layout = self.layout or fastest_layout(x.device)
        images = space_to_depth(x, self.config.block_size).contiguous(memory_format=layout)
        skips = [self.stem(images).contiguous(memory_format=layout)]
        for level in self.down:
            skips += cast(Level, level).descend(skips[-1], embedding)
        h = self.mid(skips[-1], embedding)
        for level in list(self.up)[::-1]:
            h = cast(Level, level).ascend(h, embedding, skips)
        assert not skips, "every skip is used"
        return depth_to_space(self.head(h), self.config.block_size)

    def _check(self, x: Tensor, t: Tensor) -> None:
        """Refuses images and timesteps of a wrong shape or type."""
        size, channels = self.config.image_size, self.config.in_channels
        if x.ndim != 4 or x.shape[1:] != (channels, size, size):
            raise ValueError(f"images must be [B, {channels}, {size}, {size}], got {list(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"images must be of floating precision in [-1, 1], got {x.dtype}")
        dtype = self.stem.weight.dtype
        # Autocast converts to its own precision whatever is not float64.
        if x.dtype != dtype and (x.dtype == torch.float64 or not torch.is_autocast_enabled(x.device.type)):
            raise ValueError(f"images are {x.dtype}, the network's parameters {dtype}: convert one of them")
        if t.dtype != torch.int64 or t.shape != x.shape[:1]:
            raise ValueError(f"t must be int64 of shape [{x.shape[0]}], got {t.dtype} {list(t.shape)}")

    def _labelled(self, labels: Tensor | None, batch: int) -> bool:
        """Tells whether there are labels, refusing wrong ones."""
        classes = self.config.num_classes
        if classes is None:
            if labels is not None:
                raise ValueError(
                    "labels given, but the network knows no classes: set num_classes or leave them out"
                )
            return False
        if labels is None:
            raise ValueError(
                f"the network is conditioned on {classes} classes: give labels ({classes}, the null label, "
                "for none)"
            )
        if labels.dtype != torch.int64 or labels.shape != (batch,):
            raise ValueError(
                f"labels must be int64 of shape [{batch}], got {labels.dtype} {list(labels.shape)}"
            )
        # Elsewhere than on a CPU looking at the values would wait for the device, and would break a graph.
        if labels.device.type == "cpu" and not torch.compiler.is_compiling():
            wrong = labels[(labels < 0) | (labels > classes)]
            if len(wrong):
                raise ValueError(f"labels must lie in [0, {classes}] ({classes}: none), got {int(wrong[0])}")
        return True


def compile_blocks(model: UNet, **options: Any) -> None:
    """Compiles the network block by block, in place: quick to compile, and names do not change.

    Each block is one graph, for fixed shapes: another batch size compiles anew.

    Args:
        model: The network.
        options: Passed to `torch.compile`, e.g. backend or mode.
    """
    for module in model.modules():
        if isinstance(module, ResBlock | Attention | Downsample | Upsample | Head):
            # The blocks share their code but not their shapes: counted together they would exceed torch's
            # limit on the variants of one function.
            settings = {"fullgraph": True, "dynamic": False, "isolate_recompiles": True} | options
            module.compile(**settings)
