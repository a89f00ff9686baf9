"""Nearest training pictures in feature space, and a test whether samples lie too close to them.

A model that has memorised draws samples nearer to its training pictures than new pictures of the same kind
are. So the yardstick are held-out pictures: distances from samples to their nearest training picture are
compared with those from held-out pictures to theirs, as in Meehan, Chaudhuri and Dasgupta 2020. Two numbers
tell different things. `share` looks at the tail: single copies among many good samples. `z` is the paper's
statistic without its cells, the rank-sum test of Mann and Whitney 1947: a whole model that sits too close (or
too far).

Neither proves innocence: a feature network may call two pictures alike that a person would not, and the other
way round. Look at the nearest pairs; their row numbers are returned.
"""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata  # type: ignore[import-untyped]

from eval.metrics.blocks import Features, centre_of, spans, squared_distances, widened


@dataclass(frozen=True)
class Nearest:
    """The nearest training picture of every query.

    Attributes:
        index: [n] int64, row of the training features; the lowest one among equals.
        distance: [n] float64, Euclidean distance in feature space; exactly 0 for equal vectors.
    """

    index: NDArray[np.int64]
    distance: NDArray[np.float64]


@dataclass(frozen=True)
class NeighbourOptions:
    """How memorisation is judged.

    Attributes:
        quantile: Share of held-out pictures meant to lie below the threshold, in (0, 1).
    """

    quantile: float = 0.01


DEFAULT: Final = NeighbourOptions()


@dataclass(frozen=True)
class Memorisation:
    """Samples' nearness to the training pictures beside that of held-out pictures.

    Attributes:
        threshold: Distance that a share `expected` of held-out pictures falls short of.
        share: Share of samples nearer than `threshold` to a training picture.
        expected: Its expectation if samples were like held-out pictures.
        standard_error: Its standard deviation in that case. A share several of these above `expected`
            shows copies.
        nearer: Probability that a sample is nearer than a held-out picture (ties count half); 0.5 expected.
        z: Rank-sum statistic in standard deviations: negative if samples are nearer than held-out pictures
            (copying), positive if farther (underfitting).
    """

    threshold: float
    share: float
    expected: float
    standard_error: float
    nearer: float
    z: float


def nearest(queries: Features, training: Features) -> Nearest:
    """Find every query's nearest training picture, exactly and by brute force.

    Costs 2 n m d operations in float64 and memory O(n).

    Args:
        queries: [n, d], e.g. samples.
        training: [m, d], m >= 1.
    """
    assert len(training) > 0, "no training pictures"
    centre = centre_of(training)
    index = torch.zeros(len(queries), dtype=torch.int64)
    distance = torch.zeros(len(queries), dtype=torch.float64)
    for a in spans(len(queries)):
        original = widened(queries, a)
        x = original - centre
        best = torch.full((len(x),), float("inf"), dtype=torch.float64)
        for b in spans(len(training)):
            values, places = squared_distances(x, widened(training, b) - centre).min(dim=1)
            better = values < best
            best = torch.where(better, values, best)
            index[a] = torch.where(better, places + b.start, index[a])
        # Once more without cancellation, so that a copy has distance 0.
        found = widened(training, index[a].numpy())
        distance[a] = (original - found).square().sum(dim=1).sqrt()
    return Nearest(index.numpy(), distance.numpy())


def memorisation(
    samples: NDArray[np.float64], held_out: NDArray[np.float64], options: NeighbourOptions = DEFAULT
) -> Memorisation:
    """Compare distances to the nearest training picture.

    The threshold is the k-th smallest of the m held-out distances, k = max(1, round(quantile (m + 1))). If
    samples and held-out pictures are exchangeable, the number of the n samples below it is beta-binomial
    with parameters (n, k, m + 1 - k): mean n k / (m + 1) and the variance stated, whatever the distribution
    of distances. (With ties the true mean is smaller.)

    Args:
        samples: [n] `nearest(samples, training).distance`.
        held_out: [m] `nearest(validation, training).distance`, of pictures not trained on.
        options: Where the threshold lies.
    """
    n, m = len(samples), len(held_out)
    assert min(n, m) >= 1, (n, m)
    assert 0 < options.quantile < 1, options
    k = min(m, max(1, round(options.quantile * (m + 1))))
    threshold = float(np.sort(held_out)[k - 1])
    expected = k / (m + 1)
    variance = expected * (1 - expected) * (m + 1 + n) / (n * (m + 2))
    nearer, z = _rank_sum(samples, held_out)
    return Memorisation(
        threshold=threshold,
        share=float((samples < threshold).mean()),
        expected=expected,
        standard_error=math.sqrt(variance),
        nearer=nearer,
        z=z,
    )


def _rank_sum(samples: NDArray[np.float64], held_out: NDArray[np.float64]) -> tuple[float, float]:
    """P(sample < held-out) with half of the ties, and the tie-corrected normal statistic of Mann-Whitney."""
    n, m = len(samples), len(held_out)
    ranks = rankdata(np.concatenate((samples, held_out)))
    larger = float(ranks[:n].sum()) - n * (n + 1) / 2  # pairs with the sample farther
    ties = np.unique(ranks, return_counts=True)[1].astype(np.float64)
    total = n + m
    variance = n * m / 12 * (total + 1 - float((ties**3 - ties).sum()) / (total * (total - 1)))
    z = (larger - n * m / 2) / math.sqrt(variance) if variance > 0 else 0.0
    return 1 - larger / (n * m), z
