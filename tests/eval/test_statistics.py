from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from eval.features import Features
from eval.moments import moments_of
from eval.protocol import FeatureIdentity
from eval.statistics import Job, Pictures, Statistics, accumulate
from eval.team import Stopped, Team

IDENTITY = FeatureIdentity(name="pixels", sha256="0" * 64, dim=12, classes=3, spatial=4, resize="none")
JOB = Job(total=37, chunk=8, shape=(2, 2, 3), splits=2, keep=11, spatial=True, store=True)


@dataclass
class Pixels:
    """A feature network that is a formula: pixels, and functions of them."""

    calls: list[int] = field(default_factory=list)
    identity: FeatureIdentity = IDENTITY

    def __call__(self, images: NDArray[np.uint8]) -> Features:
        self.calls.append(len(images))
        x = torch.from_numpy(images).flatten(1).float() / 255
        probabilities = (x[:, :3] * 3).softmax(1) if self.identity.classes else None
        return Features(x, probabilities, x[:, :4].square())


def pictures(total: int = JOB.total) -> NDArray[np.uint8]:
    images = np.random.default_rng(0).integers(0, 256, (total, *JOB.shape), dtype=np.uint8)
    images[3:4] = 77  # of one colour
    return images


def taken(job: Job, team: Team) -> Statistics:
    images = pictures(job.total)

    def chunk(index: int) -> Pictures:
        rows = images[index * job.chunk : (index + 1) * job.chunk]
        finite = np.ones(len(rows), dtype=np.bool_)
        finite[: index == 2] = False
        padding = [(0, job.chunk - len(rows)), (0, 0), (0, 0), (0, 0)]
        return Pictures(np.pad(rows, padding), np.pad(finite, padding[0]))

    return accumulate(team, Pixels(), chunk, job)


def test_all_that_a_job_asks_for(team: Team) -> None:
    found = taken(JOB, team)
    x = torch.from_numpy(pictures()).flatten(1).float() / 255
    assert found.features is not None
    np.testing.assert_array_equal(found.features, x.numpy())
    expected = moments_of(x)
    torch.testing.assert_close(found.moments.scatter, expected.scatter, rtol=1e-12, atol=1e-12)
    assert found.spatial is not None
    torch.testing.assert_close(found.spatial.mean, x[:, :4].square().double().mean(0), rtol=1e-6, atol=1e-9)
    assert found.score is not None
    assert found.score.splits == 2
    np.testing.assert_array_equal(found.first, pictures()[:11])
    assert (found.not_finite, found.constant) == (1, 1)


def test_only_what_a_job_asks_for(team: Team) -> None:
    found = taken(replace(JOB, spatial=False, store=False), team)
    assert found.spatial is None
    assert found.features is None


@pytest.mark.parametrize("total", [1, 8, 37])
def test_overlap_changes_no_bit(team: Team, total: int) -> None:
    job = replace(JOB, total=total, splits=1)
    alone, beside = taken(job, team), taken(replace(job, overlap=True), team)
    assert torch.equal(alone.moments.scatter, beside.moments.scatter)
    assert alone.features is not None
    assert beside.features is not None
    np.testing.assert_array_equal(alone.features, beside.features)
    assert alone.score == beside.score
    assert (alone.not_finite, alone.constant) == (beside.not_finite, beside.constant)


@pytest.mark.parametrize("overlap", [False, True])
def test_error_of_the_network_ends_it(team: Team, overlap: bool) -> None:
    class Broken(Pixels):
        def __call__(self, images: NDArray[np.uint8]) -> Features:
            raise Stopped

    def chunk(index: int) -> Pictures:
        return Pictures(pictures()[:8], np.ones(8, dtype=np.bool_))

    with pytest.raises(Stopped):
        accumulate(team, Broken(), chunk, replace(JOB, overlap=overlap))


def test_network_without_classes(team: Team) -> None:
    network = Pixels(identity=IDENTITY.model_copy(update={"classes": 0}))

    def chunk(index: int) -> Pictures:
        return Pictures(pictures()[:8], np.ones(8, dtype=np.bool_))

    assert accumulate(team, network, chunk, Job(total=8, chunk=8, shape=(2, 2, 3))).score is None
