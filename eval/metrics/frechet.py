"""Fréchet distance between two Gaussians in float64, exact for rank-deficient covariances."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg.lapack import dpstrf  # type: ignore[import-untyped]

from eval.moments import Moments


def _factor(moments: Moments) -> NDArray[np.float64]:
    """Return L [d, r] with L L^T = covariance, r its numerical rank.

    By Cholesky with pivots (LAPACK's dpstrf), which stops where what remains is rounding error. It costs
    d r^2 operations, so little for few pictures, and about a thirtieth of an eigen-decomposition for many.
    """
    packed, pivots, rank, info = dpstrf(moments.scatter.numpy(), lower=1)
    assert info >= 0, f"dpstrf: argument {-info} is illegal"
    factor = np.zeros((len(packed), rank))
    factor[pivots - 1] = np.tril(packed[:, :rank])  # LAPACK counts from 1
    factor /= math.sqrt(moments.count - 1)
    return factor


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared Fréchet (2-Wasserstein) distance of the Gaussians with these moments.

    |mu_a - mu_b|^2 + tr(C_a) + tr(C_b) - 2 tr((C_a C_b)^{1/2})  (Dowson and Landau 1982, eq. 4; Heusel et
    al. 2017, eq. 6). With C = L L^T the eigenvalues of C_a C_b are those of the symmetric S S^T for
    S = L_a^T L_b, so the last trace is the sum of the singular values of S. Nothing takes the root of a
    nearly singular product, where `scipy.linalg.sqrtm` loses half the digits or fails.

    Args:
        a: Moments of at least two vectors.
        b: Same dimension as `a`.

    Returns:
        The distance, in squared units of the features; >= 0 (rounding below it is cut off).
    """
    assert min(a.count, b.count) >= 2, "a covariance needs two vectors"
    cross = torch.from_numpy(_factor(a).T @ _factor(b))
    overlap = torch.linalg.svdvals(cross).sum() if cross.numel() else torch.zeros((), dtype=torch.float64)
    traces = a.scatter.trace() / (a.count - 1) + b.scatter.trace() / (b.count - 1)
    distance = (a.mean - b.mean).square().sum() + traces - 2 * overlap
    return max(float(distance), 0.0)
