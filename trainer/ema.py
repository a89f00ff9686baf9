"""Exponential moving averages of the float32 weights, partitioned like the optimizer.

Each rank keeps and updates only the range of the flat float32 master weights it owns, so N ranks share the
cost N ways and no communication is needed.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from trainer.clock import ema_decay
from trainer.recipe_sections import EmaProfile


class PartitionedEma:
    """The averages of one rank's flat master weights.

    Args:
        profiles: By name.
        masters: This rank's flat float32 partitions, 1-D; read at every update, never written.
    """

    def __init__(self, profiles: Mapping[str, EmaProfile], masters: Sequence[Tensor]) -> None:
        self._profiles = dict(profiles)
        self._masters = list(masters)
        self.flats: dict[str, list[Tensor]] = {
            name: [master.detach().clone() for master in masters] for name in profiles
        }
        """By profile: 1-D float32 tensors laid out as the masters."""

    @torch.no_grad()
    def update(self, images: int, batch: int) -> None:
        """Average in the weights after the optimizer update that went from `images` to `images + batch`."""
        for name, profile in self._profiles.items():
            weight = 1.0 - ema_decay(profile, images, batch)
            # One kernel for all spans on a GPU: at ZeRO 0 there are hundreds.
            torch._foreach_lerp_(self.flats[name], self._masters, weight)
