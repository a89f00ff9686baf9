"""Fréchet distance extrapolated to infinitely many samples (Chong and Forsyth 2020).

A Fréchet distance of N samples is biased upwards by about c / N, with a c that depends on the model. The
distances of random subsets of several sizes are fitted by a straight line over 1 / N; its value at 0 is the
estimate. Only the samples' bias is removed: the reference stays the finite set it is.

Two sources make the standard error. The scatter about the line gives that of the fit. Beside it, all subsets
come from the same N samples: to first order the extrapolated value is a weighted mean of the samples'
influences (`PreparedReference.influence`), with weights that follow from the subsets and from the fit. In
simulations with Gaussian and heavier-tailed features it was 1.0 to 1.2 times the true standard deviation.

The law c / N holds where N is a few times d. Chong and Forsyth go from 5,000 to 50,000 at d = 2048. Here the
smallest size is max(N / 10, 2 d), but at most N / 2. With N below 4 d the line is bent over much of its range
and the value comes out too low: in those simulations by one standard error at N = 2 d, and by less than half
of one from 4 d on.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eval.metrics.blocks import Features, centre_of
from eval.metrics.frechet import PreparedReference
from eval.metrics.interval import normal_interval
from eval.metrics.resampling import Draws, subset, weighted_moments
from eval.moments import Moments


@dataclass(frozen=True)
class InfinityOptions:
    """How to extrapolate.

    Attributes:
        points: Number of sizes, evenly spaced, N the last.
        seed: Seed of the subsets, in [0, 2^64).
        level: Level of the interval.
    """

    points: int = 15
    seed: int = 0
    level: float = 0.95


@dataclass(frozen=True)
class Infinity:
    """A line through distances over 1 / N.

    Attributes:
        value: At 1 / N = 0, in squared units of the features. May come out below 0.
        standard_error: Of `value`.
        interval: (low, high) around `value`.
        slope: c of the bias c / N.
        sizes: N of each point, increasing.
        distances: The distance at each size.
    """

    value: float
    standard_error: float
    interval: tuple[float, float]
    slope: float
    sizes: tuple[int, ...]
    distances: tuple[float, ...]


def sizes_for(samples: int, dim: int, points: int) -> tuple[int, ...]:
    """Sizes of the subsets; see the module."""
    smallest = min(max(samples // 10, 2 * dim), samples // 2)
    return tuple(int(n) for n in np.linspace(smallest, samples, points))


def frechet_infinity(samples: Features, reference: Moments, options: InfinityOptions) -> Infinity:
    """Extrapolate the Fréchet distance of the samples to the reference.

    Costs `points` distances and the moments of as many random subsets, about 8 N d^2 operations for 15.

    Args:
        samples: [N, d], N >= 2 * points.
        reference: Moments of at least two vectors.
        options: How to extrapolate.
    """
    count, dim = samples.shape
    assert options.points >= 3, "a line with a standard error needs three points"
    assert count >= 2 * options.points, (count, options.points)
    prepared, centre = PreparedReference.of(reference), centre_of(samples)
    sizes = sizes_for(count, dim, options.points)
    shares = np.zeros((len(sizes), count))
    distances = np.zeros(len(sizes))
    for k, size in enumerate(sizes):
        weights = np.zeros(count, dtype=np.int64)
        weights[subset(options.seed, Draws.INFINITY, k, count, size)] = 1
        moments = weighted_moments(samples, weights, centre)
        distances[k], shares[k] = prepared.distance(moments), weights / size
    # Every size < N was a proper subset; the last is the whole set, whose moments give the influences.
    influence = prepared.influence(samples, moments)
    value, slope, intercept_weights, fit_error = _line(1 / np.array(sizes), distances)
    sampling_error = math.sqrt(float(np.square((intercept_weights @ shares) * influence).sum()))
    standard_error = math.hypot(fit_error, sampling_error)
    return Infinity(
        value=value,
        standard_error=standard_error,
        interval=normal_interval(value, standard_error, options.level),
        slope=slope,
        sizes=sizes,
        distances=tuple(float(x) for x in distances),
    )


def _line(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[float, float, NDArray[np.float64], float]:
    """Least squares y = a + b x: (a, b, weights w with a = w.y, standard error of a from the residuals)."""
    centred = x - x.mean()
    spread = float(centred @ centred)
    weights = 1 / len(x) - x.mean() * centred / spread
    intercept, slope = float(weights @ y), float(centred @ y) / spread
    residuals = y - intercept - slope * x
    variance = float(residuals @ residuals) / (len(x) - 2)
    return intercept, slope, weights, math.sqrt(variance * float(weights @ weights))
