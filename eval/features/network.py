"""What every feature network is to the rest: uint8 pictures in, features on the CPU out."""

from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from eval.protocol import FeatureIdentity

FEATURE_BATCH: Final = 16
"""Pictures per call of a network; fixed, because summation order inside a kernel may depend on it."""


@dataclass(frozen=True)
class Features:
    """What a network says of b pictures.

    Attributes:
        pooled: [b, d] float32 on the CPU, the input of Fréchet distances.
        probabilities: [b, k] float32 on the CPU, p(y|x) of the network's own classes; None if it has none.
        spatial: [b, s] float32 on the CPU, features that keep their places; None if the network gives none.
    """

    pooled: Tensor
    probabilities: Tensor | None = None
    spatial: Tensor | None = None


class FeatureNetwork(Protocol):
    """A network that tells pictures apart, with the identity that metric names carry."""

    @property
    def identity(self) -> FeatureIdentity:
        """Name, weights' hash, sizes and resize."""

    def __call__(self, images: NDArray[np.uint8]) -> Features:
        """Compute features of [b, H, W, C] uint8 pictures; C is 1 (repeated to RGB) or 3."""
