"""Feature arrays read and compared in blocks, so that memory does not grow with the number of pictures.

Features are numpy arrays [N, d] of float32 or float64, or a `numpy.memmap` of them. Every block is widened to
float64 before it is used: differences of squares then lose nothing that matters, at about twice the time of
float32. Blocks have a fixed size and are visited in a fixed order, which fixes every rounding for a given
number of threads.
"""

from collections.abc import Iterator
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Features = NDArray[np.float32] | NDArray[np.float64]

BLOCK: Final = 2048
"""Vectors per block: at d = 2048 a block takes 32 MiB, and so does a block of distances."""


def widened(features: Features, rows: slice | NDArray[np.int64]) -> Tensor:
    """Copy rows of a feature array: [n, d] float64."""
    return torch.from_numpy(np.array(features[rows], dtype=np.float64))


def spans(count: int) -> Iterator[slice]:
    """Cut 0..count into blocks."""
    for start in range(0, count, BLOCK):
        yield slice(start, min(start + BLOCK, count))


def blocks(features: Features) -> Iterator[Tensor]:
    """All vectors in order, block by block: [n, d] float64."""
    for rows in spans(len(features)):
        yield widened(features, rows)


def centre_of(features: Features) -> Tensor:
    """Mean vector [d] float64."""
    total = torch.zeros(features.shape[1], dtype=torch.float64)
    for x in blocks(features):
        total += x.sum(dim=0)
    return total / len(features)


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Squared Euclidean distances [m, n] of float64 vectors [m, d] and [n, d].

    By |x|^2 + |y|^2 - 2 x.y, whose error is some 1e-16 of the squared norms; so move the origin into the
    cloud first. Never negative.
    """
    products = x @ y.T
    return (
        products.mul_(-2).add_(x.square().sum(dim=1, keepdim=True)).add_(y.square().sum(dim=1)).clamp_min_(0)
    )
