"""Streaming first and second moments of features in float64, added in a fixed order.

Each chunk is centred on its own mean before it is squared, and joined to what came before by the pairwise
update of Chan, Golub and LeVeque (1979, eq. 2.1), so no precision is lost to a large mean. Memory is
O(d^2), whatever the number of pictures.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg.blas import dsyrk  # type: ignore[import-untyped]
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Count, mean and scatter of a set of feature vectors.

    Attributes:
        count: Number of vectors n.
        mean: [d] float64.
        scatter: [d, d] float64, the sum of (x - mean)(x - mean)^T.
    """

    count: int
    mean: Tensor
    scatter: Tensor

    @property
    def covariance(self) -> Tensor:
        """[d, d] float64 unbiased covariance (divisor n - 1), as numpy.cov in TTUR and clean-fid."""
        assert self.count >= 2, "a covariance needs two vectors"
        return self.scatter / (self.count - 1)


class MomentSums:
    """Moments in the making. The order of the chunks moves the last digits, so keep it fixed.

    Args:
        dim: d, the number of features.
    """

    def __init__(self, dim: int) -> None:
        self._count = 0
        self._mean = np.zeros(dim)
        # The lower triangle only, in the order of columns that BLAS wants to add to it in place.
        self._scatter = np.zeros((dim, dim), order="F")

    def add(self, features: Tensor) -> None:
        """Add a chunk [n, d], n >= 1, of any float type."""
        x = features.to(torch.float64).numpy()
        assert x.ndim == 2, x.shape
        assert len(x) > 0, "a chunk holds at least one vector"
        mean = x.mean(axis=0)
        count = self._count + len(x)
        step = mean - self._mean
        # The scatter between both means, n_a n_b / n step step^T, rides along as one more row.
        between = step * math.sqrt(self._count * len(x) / count)
        rows = np.concatenate((x - mean, between[None]))
        self._scatter = dsyrk(1.0, rows.T, beta=1.0, c=self._scatter, lower=1, overwrite_c=1)
        self._mean += step * (len(x) / count)
        self._count = count

    def result(self) -> Moments:
        """Moments of all vectors added so far."""
        scatter = self._scatter + self._scatter.T  # above the diagonal there are zeros
        np.fill_diagonal(scatter, self._scatter.diagonal())
        return Moments(self._count, torch.from_numpy(self._mean.copy()), torch.from_numpy(scatter))


def moments_of(features: Tensor) -> Moments:
    """Moments of one set [n, d], n >= 1."""
    sums = MomentSums(features.shape[1])
    sums.add(features)
    return sums.result()
