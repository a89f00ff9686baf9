"""A feature network that costs next to nothing: where not the network is measured, and to try things out."""

from collections.abc import Callable
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from eval.features import EFFNETLITE0, Features
from eval.features.resize import to_float
from eval.protocol import FeatureIdentity

_SIDE: Final = 4


class Projection(nn.Module):
    """Random features: the picture averaged to 4 x 4, times a fixed random matrix.

    Args:
        dim: d, the number of features.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3 * _SIDE * _SIDE, dim, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, 3, H, W] float32 in 0..255 to [B, d]."""
        small = nn.functional.adaptive_avg_pool2d(x / 255, _SIDE)
        return (small.flatten(1) @ self.weight).relu()


class ProjectionFeatures:
    """The projection as our feature network; it has no classes.

    Args:
        dim: d, the number of features.
        resize: Makes [B, 3, S, S] float32 of [B, H, W, 3] pictures; by default without changing their size.
    """

    def __init__(self, dim: int, resize: Callable[[NDArray[np.uint8]], Tensor] = to_float) -> None:
        changes = {"name": "projection", "sha256": "0" * 64, "dim": dim, "classes": 0}
        self._identity = EFFNETLITE0.model_copy(update=changes)
        self._network, self._resize = Projection(dim), resize

    @property
    def identity(self) -> FeatureIdentity:
        """Name and sizes."""
        return self._identity

    def __call__(self, images: NDArray[np.uint8]) -> Features:
        """Compute features of [b, H, W, 3] uint8 pictures."""
        with torch.inference_mode():
            return Features(self._network(self._resize(images)))
