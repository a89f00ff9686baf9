"""Fréchet distance between two Gaussians in float64, exact for rank-deficient covariances.

|mu_a - mu_b|^2 + tr(C_a) + tr(C_b) - 2 tr((C_a C_b)^{1/2})  (Dowson and Landau 1982, eq. 4; Heusel et al.
2017, eq. 6). With factors C = L L^T the eigenvalues of C_a C_b are the squares of the singular values of
S = L_a^T L_b, so the last trace is their sum. It is taken from the eigenvalues of S S^T or S^T S, whichever
is smaller. Nothing takes the root of a nearly singular product, where `scipy.linalg.sqrtm` loses half the
digits or fails.

The factors are Cholesky factors with pivots, for three reasons. They have as many columns as the covariance
has rank, so n < d vectors cost O(d n^2) and no root of a rounding error enters. They cost a small part of an
eigen-decomposition (the whole distance a quarter of the form with two of them). And they are graded, so that
small singular values keep their digits when S is squared. Squaring still hides values below about 1e-8 of the
largest one (sets that overlap in a few directions only); then, and only then, the singular values are
computed without it, at several times the cost.
"""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg.lapack import dpstrf  # type: ignore[import-untyped]
from torch import Tensor

from eval.metrics.blocks import Features, blocks
from eval.moments import Moments

_LOST: Final = 8 * float(np.finfo(np.float64).eps)
"""An eigenvalue below this share of the largest one is rounding error."""


def _factor(moments: Moments) -> NDArray[np.float64]:
    """Return L [d, r] with L L^T = covariance, r its numerical rank.

    LAPACK's dpstrf stops where what remains is rounding error.
    """
    packed, pivots, rank, info = dpstrf(moments.scatter.numpy(), lower=1)
    assert info >= 0, f"dpstrf: argument {-info} is illegal"
    factor = np.zeros((len(packed), rank))
    factor[pivots - 1] = np.tril(packed[:, :rank])  # LAPACK counts from 1
    factor /= math.sqrt(moments.count - 1)
    return factor


def _sum_of_singular_values(matrix: NDArray[np.float64]) -> float:
    """Sum of the singular values of [m, n] (the nuclear norm)."""
    if not matrix.size:
        return 0.0
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    values = torch.linalg.eigvalsh(torch.from_numpy(wide @ wide.T))
    if values[0] <= _LOST * values[-1]:
        return float(torch.linalg.svdvals(torch.from_numpy(wide)).sum())
    return float(values.sqrt().sum())


def _trace(moments: Moments) -> float:
    return float(moments.scatter.trace()) / (moments.count - 1)


@dataclass(frozen=True)
class PreparedReference:
    """A reference whose covariance is factored once, for many distances to it.

    Attributes:
        mean: [d] float64.
        trace: Trace of the covariance.
        factor: [d, r] float64, L with L L^T = covariance of rank r.
    """

    mean: Tensor
    trace: float
    factor: NDArray[np.float64]

    @classmethod
    def of(cls, moments: Moments) -> "PreparedReference":
        """Prepare the moments of at least two vectors."""
        assert moments.count >= 2, "a covariance needs two vectors"
        return cls(moments.mean, _trace(moments), _factor(moments))

    def distance(self, samples: Moments) -> float:
        """Squared Fréchet distance of the samples' Gaussian to this one; see `frechet_distance`."""
        assert samples.count >= 2, "a covariance needs two vectors"
        overlap = _sum_of_singular_values(_factor(samples).T @ self.factor)
        means = float((samples.mean - self.mean).square().sum())
        return max(means + _trace(samples) + self.trace - 2 * overlap, 0.0)

    def influence(self, features: Features, samples: Moments) -> NDArray[np.float64]:
        """Influence of every vector on its set's distance: the first derivative by the vector's weight.

        The derivative of the distance by the mean is 2 (mu_a - mu_b), that by the covariance is I - T, where
        T = L (L^T C_a L)^{-1/2} L^T is the linear part of the optimal map from a to b (Gelbrich 1990). So the
        sample variance of these numbers over n estimates the distance's variance to first order in 1/n.

        Args:
            features: The n vectors, [n, d].
            samples: Their moments.

        Returns:
            [n] float64 of mean zero (up to rounding).
        """
        projected = _factor(samples).T @ self.factor
        values, vectors = torch.linalg.eigh(torch.from_numpy(projected.T @ projected))
        kept = values > max(float(values[-1]), 0.0) * len(values) * _LOST
        root = torch.from_numpy(self.factor) @ (vectors[:, kept] / values[kept].pow(0.25))
        found = []
        for x in blocks(features):
            centred = x - samples.mean
            quadratic = centred.square().sum(dim=1) - (centred @ root).square().sum(dim=1)
            found.append(2 * centred @ (samples.mean - self.mean) + quadratic)
        influence = torch.cat(found)
        return (influence - influence.mean()).numpy()


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared Fréchet (2-Wasserstein) distance of the Gaussians with these moments.

    Args:
        a: Moments of at least two vectors.
        b: Same dimension as `a`.

    Returns:
        The distance, in squared units of the features; >= 0 (rounding below it is cut off).
    """
    return PreparedReference.of(b).distance(a)
