"""Known numbers beside those measured here: does this installation compute what the names promise?

Without files: a distance that a formula gives, and the embedded network on scikit-learn's digits, measured
when the check was written. With the original Inception and CIFAR-10's training pictures as shards: the
published score.
"""

from collections.abc import Callable, Iterator
from typing import ClassVar, Final

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from sklearn.datasets import load_digits

from data_pipeline.documents import Document
from eval.features import FeatureChoice, FeatureNetwork, open_network, parse_choice
from eval.metrics.classifier_score import OPENAI_SPLITS
from eval.metrics.frechet import frechet_distance
from eval.moments import Moments
from eval.reference import RealJob, real_statistics
from eval.reference_cache import ReferenceCache
from eval.statistics import Job, Pictures, Statistics, accumulate
from eval.team import Team

CIFAR10_TRAIN_SCORE: Final = 11.2368
"""Inception Score of CIFAR-10's 50,000 training pictures, from torch-fidelity's documentation."""
DIGITS_DISTANCE: Final = 13.61462
"""FD-effnetlite0 between two sets of digits, as this code computed it (2026-11, x86 CPU)."""
DIGITS_SCORE: Final = 1.164293
"""CS-effnetlite0 of the first set, likewise."""
_DIGITS: Final = 48


class Check(BaseModel):
    """One number.

    Attributes:
        name: What was measured.
        measured: The number found here.
        expected: The known number.
        tolerance: How far the two may be apart.
        source: Where the known number is from.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str
    measured: float
    expected: float
    tolerance: float
    source: str

    @property
    def ok(self) -> bool:
        """Whether the number found is the known one; NaN is not."""
        return abs(self.measured - self.expected) <= self.tolerance


class SelfTest(Document):
    """All checks of one installation."""

    SCHEMA: ClassVar[str] = "selftest/1"

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether every number is the known one."""
        return all(check.ok for check in self.checks)


def selftest(
    team: Team, inception: FeatureChoice | None, cifar10: str | None, report: Callable[[Check], None]
) -> SelfTest:
    """Measure known numbers.

    Args:
        team: The processes.
        inception: The original Inception; None to leave its numbers out.
        cifar10: Shards whose split `train` is CIFAR-10's training pictures, unchanged (PNG); None likewise.
        report: Told each check as it is done.

    Returns:
        All checks.

    Raises:
        UserError: A file is missing or of another hash.
        Stopped: The team was asked to stop.
    """
    checks = []
    for check in _checks(team, inception, cifar10):
        report(check)
        checks.append(check)
    return SelfTest(checks=tuple(checks))


def _checks(team: Team, inception: FeatureChoice | None, cifar10: str | None) -> Iterator[Check]:
    yield _closed_form()
    if inception is not None:  # first, so that a wrong file is told of at once
        network = team.together(lambda: open_network(inception, team.device))
        yield Check(
            name=f"features of {network.identity.name}",
            measured=_statistics(team, network, _digits(0)).moments.mean.numel(),
            expected=2048,
            tolerance=0,
            source="the file was read, its SHA-256 is the one expected",
        )
        if cifar10 is not None:
            yield _published(team, network, cifar10)
    yield from _embedded(team)


def _closed_form() -> Check:
    """Two Gaussians with diagonal covariances a² and b²: the distance is sum (mu_a - mu_b)² + (a - b)²."""
    dim, count = 64, 1000
    a = torch.linspace(0.5, 2.0, dim, dtype=torch.float64)
    b, shift = a.flip(0), torch.linspace(-1.0, 1.0, dim, dtype=torch.float64)
    moments = [
        Moments(count, mean, torch.diag(sd.square()) * (count - 1))
        for mean, sd in ((0 * shift, a), (shift, b))
    ]
    expected = float((shift.square() + (a - b).square()).sum())
    return Check(
        name="Fréchet distance of two Gaussians",
        measured=frechet_distance(*moments),
        expected=expected,
        tolerance=1e-9 * expected,
        source="closed form for diagonal covariances (Dowson and Landau 1982, eq. 16)",
    )


def _embedded(team: Team) -> Iterator[Check]:
    network = team.together(lambda: open_network(parse_choice("effnetlite0"), team.device))
    a, b = (_statistics(team, network, _digits(start)) for start in (0, _DIGITS))
    source = f"scikit-learn's digits 0-{_DIGITS - 1} against {_DIGITS}-{2 * _DIGITS - 1}, 2026-11, CPU"
    distance, score = frechet_distance(a.moments, b.moments), a.score
    assert score is not None
    for name, measured, expected in (
        ("FD-effnetlite0", distance, DIGITS_DISTANCE),
        ("CS-effnetlite0", score.mean, DIGITS_SCORE),
    ):
        yield Check(name=name, measured=measured, expected=expected, tolerance=1e-3 * expected, source=source)


def _published(team: Team, network: FeatureNetwork, cifar10: str) -> Check:
    wanted = RealJob(cifar10, "train", (32, 32, 3), splits=OPENAI_SPLITS)
    score = real_statistics(team, network, wanted, ReferenceCache()).score
    assert score is not None
    return Check(
        name="IS of CIFAR-10's training pictures",
        measured=score.mean,
        expected=CIFAR10_TRAIN_SCORE,
        tolerance=0.1,
        source="torch-fidelity's documentation: 11.2368 ± 0.0951 over ten parts",
    )


def _digits(start: int) -> NDArray[np.uint8]:
    """[_DIGITS, 8, 8, 1] uint8: real digits, which scikit-learn brings along."""
    images: NDArray[np.float64] = load_digits().images[start : start + _DIGITS]
    return np.rint(images[..., None] * 255.0 / 16).astype(np.uint8)


def _statistics(team: Team, network: FeatureNetwork, images: NDArray[np.uint8]) -> Statistics:
    job = Job(total=len(images), chunk=16, shape=(8, 8, 1))

    def chunk(index: int) -> Pictures:
        rows = images[index * job.chunk : (index + 1) * job.chunk]
        return Pictures(rows, np.ones(len(rows), dtype=np.bool_))

    return accumulate(team, network, chunk, job)
