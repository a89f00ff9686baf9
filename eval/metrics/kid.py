"""Kernel distance: unbiased squared MMD of features under a cubic kernel, with an interval.

Bińkowski et al. 2018, section 4: k(x, y) = (x.y / d + 1)^3, and the estimator of Gretton et al. 2012, eq. 3,
whose expectation is the distributions' MMD^2 whatever the number of pictures, so small sets are not punished
as by a Fréchet distance. It can come out below zero.

Two numbers describe its scatter, and they mean different things. `sd` is the literature's: the standard
deviation over random subsets, which tells how an estimate of `subset_size` pictures scatters and does not
shrink with more pictures. `interval` holds the MMD^2 of the two *distributions*; its standard error is the
delete-one jackknife of the U-statistic over both sets (Arvesen 1969), which is exact to first order and, by
the inequality of Efron and Stein (1981), too large rather than too small on average, also where the
distributions are equal and the U-statistic degenerates. The estimate is skewed, though: in simulations with
64 and 256 skewed features and 50 to 800 pictures the 95 % interval held the truth in 88 to 99 % of the cases.
"""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eval.metrics.blocks import Features, spans, widened
from eval.metrics.interval import normal_interval
from eval.metrics.resampling import Draws, subset

LEAST: Final = 3
"""Vectors a set must hold: leaving one out must leave a pair."""


@dataclass(frozen=True)
class KidOptions:
    """How to estimate.

    Attributes:
        subsets: Random subsets of the literature's mean and sd.
        subset_size: Pictures in each, of each side.
        seed: Seed of the subsets, in [0, 2^64).
        most: At most so many pictures of each side enter the full estimate (drawn without replacement),
            whose cost is quadratic.
        level: Level of the interval.
    """

    subsets: int = 100
    subset_size: int = 1000
    seed: int = 0
    most: int = 10_000
    level: float = 0.95


@dataclass(frozen=True)
class KernelDistance:
    """Squared MMD, in units of the kernel.

    Attributes:
        value: Unbiased estimate from all pictures (up to `most`) of both sides.
        interval: (low, high) around `value` for the MMD^2 of the two distributions.
        standard_error: The jackknife's.
        subset_mean: Mean over the subsets: what torch-fidelity and clean-fid call KID. Estimates the same
            quantity as `value`, with more noise.
        sd: Standard deviation over the subsets (divisor: their number), the literature's +-.
        subsets: Subsets drawn: one if a subset is all there is.
        subset_size: Their size: that asked for, or the smaller set's.
        pictures: Pictures of each side behind `value`: (samples, reference).
    """

    value: float
    interval: tuple[float, float]
    standard_error: float
    subset_mean: float
    sd: float
    subsets: int
    subset_size: int
    pictures: tuple[int, int]


def kernel_distance(samples: Features, reference: Features, options: KidOptions) -> KernelDistance:
    """Estimate the kernel distance; a pure function of its arguments (up to the threads' rounding).

    Costs 2 (most^2 + 3 / 2 * subsets * subset_size^2) d multiplications at most, in float64, and memory
    O(most + subset_size d).

    Args:
        samples: [n, d], n >= 3.
        reference: [m, d], m >= 3.
        options: How to estimate.

    Returns:
        Estimates with their scatter.
    """
    assert min(len(samples), len(reference)) >= LEAST, (len(samples), len(reference))
    x = _limited(samples, Draws.KERNEL_SAMPLES, options)
    y = _limited(reference, Draws.KERNEL_REFERENCE, options)
    value, standard_error = _jackknifed(samples, x, reference, y)
    size = min(options.subset_size, len(samples), len(reference))
    only_one = size == len(samples) == len(reference)
    subsets = 1 if only_one else options.subsets
    estimates = np.array([_subset_estimate(samples, reference, size, j, options) for j in range(subsets)])
    return KernelDistance(
        value=value,
        interval=normal_interval(value, standard_error, options.level),
        standard_error=standard_error,
        subset_mean=float(estimates.mean()),
        sd=float(estimates.std()),
        subsets=subsets,
        subset_size=size,
        pictures=(len(x), len(y)),
    )


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    """[m, n] of [m, d] and [n, d]."""
    s = (x @ y.T).div_(x.shape[1]).add_(1)
    return s.square().mul_(s)


def _limited(features: Features, use: Draws, options: KidOptions) -> NDArray[np.int64]:
    """Rows that enter the full estimate; their draw is numbered after those of the subsets."""
    size = min(len(features), options.most)
    return subset(options.seed, use, options.subsets, len(features), size)


def _subset_estimate(
    samples: Features, reference: Features, size: int, number: int, options: KidOptions
) -> float:
    """Unbiased MMD^2 of subset `number` of each side."""
    x, y = (
        widened(features, subset(options.seed, use, number, len(features), size))
        for features, use in ((samples, Draws.KERNEL_SAMPLES), (reference, Draws.KERNEL_REFERENCE))
    )
    within = (k.sum() - k.trace() for k in (_kernel(x, x), _kernel(y, y)))
    return float(sum(within) / (size * (size - 1)) - 2 * _kernel(x, y).mean())


def _within(features: Features, rows: NDArray[np.int64]) -> Tensor:
    """Sum of k(x_i, x_j) over j != i: [n] float64."""
    sums = torch.zeros(len(rows), dtype=torch.float64)
    for a in spans(len(rows)):
        x = widened(features, rows[a])
        for b in spans(a.start):
            kernel = _kernel(x, widened(features, rows[b]))
            sums[a] += kernel.sum(dim=1)
            sums[b] += kernel.sum(dim=0)
        sums[a] += _kernel(x, x).fill_diagonal_(0).sum(dim=1)
    return sums


def _between(
    samples: Features, x_rows: NDArray[np.int64], reference: Features, y_rows: NDArray[np.int64]
) -> tuple[Tensor, Tensor]:
    """Sums of k(x_i, y_j) over j and over i: [n] and [m] float64."""
    of_x = torch.zeros(len(x_rows), dtype=torch.float64)
    of_y = torch.zeros(len(y_rows), dtype=torch.float64)
    for a in spans(len(x_rows)):
        x = widened(samples, x_rows[a])
        for b in spans(len(y_rows)):
            kernel = _kernel(x, widened(reference, y_rows[b]))
            of_x[a] += kernel.sum(dim=1)
            of_y[b] += kernel.sum(dim=0)
    return of_x, of_y


def _jackknifed(
    samples: Features, x_rows: NDArray[np.int64], reference: Features, y_rows: NDArray[np.int64]
) -> tuple[float, float]:
    """The U-statistic of all given rows and its delete-one jackknife standard error.

    Leaving a vector out takes its row and column from the sums of the kernel, so every one of the n + m
    estimates follows from the row sums.
    """
    own_x, own_y = _within(samples, x_rows), _within(reference, y_rows)
    between_x, between_y = _between(samples, x_rows, reference, y_rows)
    mixed = between_x.sum()

    def pairs(total: Tensor, count: int) -> Tensor:
        return total / (count * (count - 1))

    n, m = len(x_rows), len(y_rows)
    value = pairs(own_x.sum(), n) + pairs(own_y.sum(), m) - 2 * mixed / (n * m)
    variance = 0.0
    for own, between, count, other in ((own_x, between_x, n, m), (own_y, between_y, m, n)):
        without = pairs(own.sum() - 2 * own, count - 1) - 2 * (mixed - between) / ((count - 1) * other)
        variance += float(without.var(correction=0)) * (count - 1)
    return float(value), math.sqrt(variance)
