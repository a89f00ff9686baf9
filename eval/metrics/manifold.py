"""Precision and recall, density and coverage: how the samples' and the reference's neighbourhoods overlap.

Precision and recall: Kynkäänniemi et al. 2019, eqs. 1-2. A set's manifold is the union of the closed balls
around its vectors that reach to the k-th nearest other vector of the set. Precision is the share of samples
inside the reference's manifold, recall the share of reference pictures inside the samples'.

Density and coverage: Naeem et al. 2020, section 3, with open balls around the reference's vectors only, as in
their code: how many balls hold a sample, over k, on average (it may exceed 1); and the share of balls that
hold any sample.

All four depend on both numbers of pictures and on k, and are biased with them, so compare equal numbers only.
Distances are squared, in float64, block by block: memory is O(N), whatever N^2 may be.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eval.metrics.blocks import Features, centre_of, spans, squared_distances, widened

_FAR: Final = float("inf")


@dataclass(frozen=True)
class ManifoldOptions:
    """Which neighbour sets the radius.

    Attributes:
        k: Of precision and recall.
        k_density: Of density and coverage.
    """

    k: int = 3
    k_density: int = 5


@dataclass(frozen=True)
class Manifold:
    """The four numbers; all but density lie in [0, 1]."""

    precision: float
    recall: float
    density: float
    coverage: float


@dataclass(frozen=True)
class Radii:
    """Squared distances from every vector of a set to its neighbours in the same set.

    Attributes:
        k: [N] float64, to the k-th nearest other vector.
        k_density: [N] float64, to the k_density-th.
    """

    k: NDArray[np.float64]
    k_density: NDArray[np.float64]


def radii(features: Features, options: ManifoldOptions) -> Radii:
    """Compute the squared radii of a set, e.g. once for a reference that serves many checkpoints.

    Costs N^2 d operations.

    Args:
        features: [N, d], N > max(k, k_density).
        options: Which neighbours.
    """
    most = max(options.k, options.k_density)
    assert len(features) > most >= min(options.k, options.k_density) >= 1, (len(features), options)
    centre = centre_of(features)
    nearest = torch.full((len(features), most), _FAR, dtype=torch.float64)
    for a in spans(len(features)):
        x = widened(features, a) - centre
        for b in spans(a.start):
            distances = squared_distances(x, widened(features, b) - centre)
            nearest[a] = _smallest(nearest[a], distances)
            nearest[b] = _smallest(nearest[b], distances.T)
        nearest[a] = _smallest(nearest[a], squared_distances(x, x).fill_diagonal_(_FAR))
    return Radii(nearest[:, options.k - 1].numpy().copy(), nearest[:, options.k_density - 1].numpy().copy())


def _smallest(found: Tensor, distances: Tensor) -> Tensor:
    """Merge the smallest distances found so far, [n, k] in increasing order, with more of them, [n, m]."""
    return torch.cat((found, distances), dim=1).topk(found.shape[1], dim=1, largest=False).values


def manifold(
    samples: Features, reference: Features, options: ManifoldOptions, reference_radii: Radii | None = None
) -> Manifold:
    """Compare the neighbourhoods of two sets.

    Args:
        samples: [n, d], n > max(k, k_density).
        reference: [m, d], m > max(k, k_density).
        options: Which neighbours.
        reference_radii: `radii(reference, options)` if already known.

    Returns:
        Precision, recall, density and coverage of the samples.
    """
    of_reference = radii(reference, options) if reference_radii is None else reference_radii
    assert len(of_reference.k) == len(reference), "radii of another set"
    ball = torch.from_numpy(of_reference.k)
    open_ball = torch.from_numpy(of_reference.k_density)
    sample_ball = torch.from_numpy(radii(samples, options).k)
    centre = centre_of(reference)
    precise = torch.zeros(len(samples), dtype=torch.bool)
    recalled = torch.zeros(len(reference), dtype=torch.bool)
    covered = torch.zeros(len(reference), dtype=torch.bool)
    held = 0
    for a in spans(len(samples)):
        x = widened(samples, a) - centre
        for b in spans(len(reference)):
            distances = squared_distances(x, widened(reference, b) - centre)
            precise[a] |= (distances <= ball[b]).any(dim=1)
            recalled[b] |= (distances <= sample_ball[a, None]).any(dim=0)
            inside = distances < open_ball[b]
            covered[b] |= inside.any(dim=0)
            held += int(inside.sum())
    return Manifold(
        precision=_share(precise),
        recall=_share(recalled),
        density=held / (options.k_density * len(samples)),
        coverage=_share(covered),
    )


def _share(yes: Tensor) -> float:
    return int(yes.sum()) / len(yes)
