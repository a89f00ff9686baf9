"""From statistics to numbers: which metrics a protocol has, under which names, with which warnings."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from eval.metrics.bootstrap import BootstrapOptions, bootstrap_distance
from eval.metrics.frechet import frechet_distance
from eval.metrics.infinity import InfinityOptions, frechet_infinity
from eval.metrics.kid import LEAST as LEAST_KERNEL
from eval.metrics.kid import KidOptions, kernel_distance
from eval.metrics.manifold import ManifoldOptions, Radii, manifold
from eval.metrics.neighbours import NeighbourOptions, memorisation, nearest
from eval.moments import Moments
from eval.protocol import FeatureIdentity, Protocol
from eval.results import Metric
from eval.spill import Float32Array
from eval.statistics import Statistics
from trainer.recipe_evaluation import MetricName

Metrics = dict[str, Metric]


KERNEL: Final = KidOptions()
MANIFOLD: Final = ManifoldOptions()
INFINITY: Final = InfinityOptions()
INTERVAL: Final = BootstrapOptions()
NEIGHBOURS: Final = NeighbourOptions()
Options = KidOptions | ManifoldOptions | InfinityOptions | BootstrapOptions | NeighbourOptions
CONSTANTS: Final[dict[MetricName, Options]] = {
    MetricName.KERNEL: KERNEL,
    MetricName.MANIFOLD: MANIFOLD,
    MetricName.INFINITY: INFINITY,
    MetricName.INTERVAL: INTERVAL,
    MetricName.NEIGHBOURS: NEIGHBOURS,
}
"""What the metrics that have constants are computed with; part of the protocol."""
LEAST_PICTURES: Final[dict[MetricName, int]] = {
    MetricName.KERNEL: LEAST_KERNEL,
    MetricName.MANIFOLD: MANIFOLD.k_density + 1,
    MetricName.INFINITY: 2 * INFINITY.points,
}
"""So many samples some metrics need, `kernel` and `manifold` reference pictures, too."""


@dataclass(frozen=True)
class Reference:
    """What samples are compared with.

    Attributes:
        moments: Of the reference pictures' pooled features.
        spatial: Of their spatial features; None if no metric needs them.
        features: [N, d] float32, each picture's; None if no metric needs them, and outside the main process.
        held_out: Moments of all held-out pictures; None if no metric needs them.
        radii: Of the reference pictures' neighbourhoods; None if no metric needs them, and outside the main
            process.
    """

    moments: Moments
    spatial: Moments | None = None
    features: Float32Array | None = None
    held_out: Moments | None = None
    radii: Radii | None = None


def measure(
    protocol: Protocol,
    statistics: Statistics,
    reference: Reference,
    held_out_distances: NDArray[np.float64] | None = None,
    check: Callable[[], None] = lambda: None,
) -> Metrics:
    """Compute all metrics of a protocol that are made of features. Main process only.

    Args:
        protocol: Which.
        statistics: Of the samples, or of real pictures in their place.
        reference: What they are compared with.
        held_out_distances: [n] from real held-out pictures to their nearest reference pictures; None where
            there is nothing to compare with, as for the held-out pictures themselves.
        check: Called before every metric; may raise to end the work early.

    Returns:
        The metrics by name, in the protocol's order.
    """
    found: Metrics = {}
    left_out = _left_out(protocol, statistics, reference)
    for metric, compute in _MEASURES.items():
        if protocol.measures(metric) and metric not in left_out:
            check()
            found |= compute(protocol, statistics, reference)
    if protocol.measures(MetricName.NEIGHBOURS) and held_out_distances is not None:
        check()
        found |= _neighbours(protocol, statistics, reference, held_out_distances)
    return found


def warnings_of(protocol: Protocol, statistics: Statistics, reference: Reference) -> list[str]:
    """What a reader of the numbers must know."""
    dim = protocol.features.dim
    counts = [("samples", statistics.moments.count)]
    if protocol.reference_file is None:
        counts.append(("reference", reference.moments.count))
    if reference.held_out is not None:
        counts.append(("all held-out pictures", reference.held_out.count))
    found = [
        f"{name}: {count} pictures for {dim} features: the covariance is rank-deficient and the distance "
        "biased high; compare equal counts only"
        for name, count in counts
        if count <= dim
    ]
    if protocol.reference_file is not None:
        found.append(
            f"reference: a file of kind {protocol.reference_file.kind}, which does not tell how many pictures"
        )
    total = statistics.moments.count
    found += [
        f"{metric}: left out, needs {LEAST_PICTURES[metric]} pictures and has {total}"
        for metric in _left_out(protocol, statistics, reference)
        if metric in LEAST_PICTURES
    ]
    if statistics.not_finite:
        found.append(
            f"{statistics.not_finite} of {total} samples are not finite "
            "(NaN or infinity); such pixels count as black or white"
        )
    if statistics.constant:
        found.append(f"{statistics.constant} of {total} pictures have one colour")
    return found


def _left_out(protocol: Protocol, statistics: Statistics, reference: Reference) -> list[MetricName]:
    """Metrics that these pictures are too few for, or that mean nothing of them: of held-out ones only.

    (A plan refuses too few samples.)
    """
    count = statistics.moments.count
    few = [metric for metric, least in LEAST_PICTURES.items() if protocol.measures(metric) and count < least]
    return few if reference.held_out is not None else [*few, MetricName.HELD_OUT]


def _named(features: FeatureIdentity, name: str) -> str:
    """Name of a metric of features: plain for the original Inception only, as FID is."""
    _, _, label = features.distance_name.partition("-")
    return f"{name}-{label}" if label else name


def _distance(protocol: Protocol, statistics: Statistics, reference: Reference) -> Metrics:
    value = frechet_distance(statistics.moments, reference.moments)
    return {protocol.features.distance_name: Metric(value=value)}


def _held_out(protocol: Protocol, statistics: Statistics, reference: Reference) -> Metrics:
    assert reference.held_out is not None
    value = frechet_distance(statistics.moments, reference.held_out)
    return {f"{protocol.features.distance_name}-{protocol.held_out.split}": Metric(value=value)}


def _score(protocol: Protocol, statistics: Statistics, reference: Reference) -> Metrics:
    score = statistics.score
    assert score is not None, "the plan refuses a score without classes"
    sd = score.sd if score.splits > 1 else None
    return {protocol.features.score_name: Metric(value=score.mean, sd=sd, splits=score.splits)}


def _spatial(protocol: Protocol, statistics: Statistics, reference: Reference) -> Metrics:
    assert statistics.spatial is not None
    assert reference.spatial is not None
    value = frechet_distance(statistics.spatial, reference.spatial)
    return {protocol.features.spatial_name: Metric(value=value)}


def _kernel(protocol: Protocol, statistics: Statistics, reference: Reference) -> Metrics:
    assert statistics.features is not None
    assert reference.features is not None
    found = kernel_distance(statistics.features, reference.features, KERNEL)
    low, high = found.interval
    return {
        _named(protocol.features, "KID"): Metric(
            value=found.value, standard_error=found.standard_error, low=low, high=high
        ),
        _named(protocol.features, "KID-subsets"): Metric(
            value=found.subset_mean, sd=found.sd, splits=found.subsets
        ),
    }


def _manifold(protocol: Protocol, statistics: Statistics, reference: Reference) -> Metrics:
    assert statistics.features is not None
    assert reference.features is not None
    found = manifold(statistics.features, reference.features, MANIFOLD, reference.radii)
    shares = {
        "precision": found.precision,
        "recall": found.recall,
        "density": found.density,
        "coverage": found.coverage,
    }
    return {_named(protocol.features, name): Metric(value=value) for name, value in shares.items()}


def _infinity(protocol: Protocol, statistics: Statistics, reference: Reference) -> Metrics:
    assert statistics.features is not None
    found = frechet_infinity(statistics.features, reference.moments, INFINITY)
    low, high = found.interval
    metric = Metric(value=found.value, standard_error=found.standard_error, low=low, high=high)
    return {f"{protocol.features.distance_name}-infinity": metric}


def _interval(protocol: Protocol, statistics: Statistics, reference: Reference) -> Metrics:
    assert statistics.features is not None
    found = bootstrap_distance(statistics.features, reference.moments, INTERVAL)
    metric = Metric(value=found.value, standard_error=found.standard_error, low=found.low, high=found.high)
    return {f"{protocol.features.distance_name}-interval": metric}


def _neighbours(
    protocol: Protocol, statistics: Statistics, reference: Reference, held_out: NDArray[np.float64]
) -> Metrics:
    assert statistics.features is not None
    assert reference.features is not None
    distances = nearest(statistics.features, reference.features).distance
    found = memorisation(distances, held_out, NEIGHBOURS)
    return {
        _named(protocol.features, "memorised"): Metric(value=found.share),
        _named(protocol.features, "memorised-expected"): Metric(
            value=found.expected, standard_error=found.standard_error
        ),
        _named(protocol.features, "memorised-z"): Metric(value=found.z),
    }


_Measure = Callable[[Protocol, Statistics, Reference], Metrics]
_MEASURES: Final[dict[MetricName, _Measure]] = {
    MetricName.DISTANCE: _distance,
    MetricName.HELD_OUT: _held_out,
    MetricName.SCORE: _score,
    MetricName.SPATIAL: _spatial,
    MetricName.KERNEL: _kernel,
    MetricName.MANIFOLD: _manifold,
    MetricName.INFINITY: _infinity,
    MetricName.INTERVAL: _interval,
}
