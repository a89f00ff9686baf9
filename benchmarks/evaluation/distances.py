"""The Fréchet distance of two full covariances: ours and the peers' functions."""

from dataclasses import dataclass, field
from functools import partial
from typing import Final

import torch

from benchmarks.harness import OURS, SAMPLES_HEADER, Load, Record, Samples, take_turns, timed
from benchmarks.peers import clean_fid, torch_fidelity
from benchmarks.peers.clean_fid import CLEAN_FID
from benchmarks.peers.torch_fidelity import TORCH_FIDELITY
from benchmarks.report import Bar, missing_bar, ratio_bar, table
from eval.metrics.frechet import frechet_distance
from eval.moments import Moments, moments_of

DIM: Final = 2048
"""Inception's number of features."""
SQRTM_TARGET: Final = 4.0
DISTANCE_HEADER: Final = ("Fréchet distance", "d", *SAMPLES_HEADER, "distance")
_VECTORS: Final = 5000
_RTOL: Final = 1e-6
_FORMS: Final = {
    CLEAN_FID.name: "clean-fid, scipy.linalg.sqrtm",
    TORCH_FIDELITY.name: "torch-fidelity, numpy.linalg.eigvals",
}


class DistanceTimes(Samples):
    """The samples of one way to compute it.

    Attributes:
        name: Whose, and how.
        dim: d.
        distance: What it gives.
    """

    name: str
    dim: int
    distance: float

    def row(self) -> tuple[str, ...]:
        """The cells of `DISTANCE_HEADER`."""
        return self.name, str(self.dim), *self.cells(), f"{self.distance:.8g}"


class DistanceCheck(Record):
    """A peer's distance beside ours, before anything is timed.

    Attributes:
        name: Whose, and how.
        relative: Relative difference.
    """

    name: str
    relative: float


@dataclass
class Distances:
    """What was measured."""

    checks: list[DistanceCheck] = field(default_factory=list)
    times: list[DistanceTimes] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)

    def bars(self) -> list[Bar]:
        """Judge; nothing if nothing was measured."""
        if not self.times:
            return []
        by_name = {times.name: times for times in self.times}
        ours, theirs = by_name[OURS], by_name.get(_FORMS[CLEAN_FID.name])
        name = f"evaluation-frechet-{ours.dim}-sqrtm"
        if theirs is None:
            return [missing_bar(name, SQRTM_TARGET, CLEAN_FID.name)]
        measured = f"{theirs.name} {theirs.median:.3f} s over {ours.name} {ours.median:.3f} s"
        return [ratio_bar(name, SQRTM_TARGET, ours, theirs, measured)]


def measure_distances(dim: int, repeats: int) -> Distances:
    """Compare the values, then time the functions in turns.

    Args:
        dim: d.
        repeats: Timed calls of each.

    Raises:
        ValueError: They give different distances; then nothing is timed.
    """
    a, b = (_moments(dim, seed) for seed in (1, 2))
    pairs = [(each.mean.numpy(), each.covariance.numpy()) for each in (a, b)]
    runs = {OURS: partial(frechet_distance, a, b)}
    if CLEAN_FID.version is not None:
        runs[_FORMS[CLEAN_FID.name]] = partial(clean_fid.distance, *pairs)
    if TORCH_FIDELITY.version is not None:
        runs[_FORMS[TORCH_FIDELITY.name]] = partial(torch_fidelity.distance, *pairs)
    values = {name: run() for name, run in runs.items()}
    found = Distances()
    for name, value in values.items():
        relative = abs(value / values[OURS] - 1)
        if name != OURS:
            found.checks.append(DistanceCheck(name=name, relative=relative))
        if not relative <= _RTOL:
            raise ValueError(f"{name}: distance {value!r}, ours {values[OURS]!r}; nothing was timed")
    samples, load = take_turns([partial(timed, run) for run in runs.values()], repeats)
    found.times = [
        DistanceTimes(wall=each.wall, cpu=each.cpu, name=name, dim=dim, distance=values[name])
        for name, each in zip(runs, samples, strict=True)
    ]
    found.loads.append(load)
    print(table(DISTANCE_HEADER, [times.row() for times in found.times]))
    for each in found.checks:
        print(f"{each.name}: distance differs from ours by {each.relative:.1e}, relatively")
    return found


def _moments(dim: int, seed: int) -> Moments:
    """Moments of full rank, as of pooled features: not negative, correlated, of decaying variance."""
    generator = torch.Generator().manual_seed(seed)
    vectors = max(_VECTORS, 2 * dim) if dim == DIM else 4 * dim
    scale = torch.arange(1, dim + 1).float().rsqrt()
    mixing = torch.randn(dim, dim, generator=generator) / dim**0.5
    latent = torch.randn(vectors, dim, generator=generator) * scale
    return moments_of((latent @ mixing + 0.1 * seed).relu())
