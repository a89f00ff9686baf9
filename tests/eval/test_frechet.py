import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_fid.fid_score import calculate_frechet_distance

from eval.metrics.frechet import PreparedReference, frechet_distance
from eval.moments import Moments, moments_of
from tests.eval.fidelity import Pictures, fidelity


def gaussian(mean: torch.Tensor, covariance: torch.Tensor) -> Moments:
    return Moments(1001, mean.double(), covariance.double() * 1000)


def sample(count: int, dim: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    x = torch.from_numpy(np.random.default_rng(seed).normal(size=(count, dim)))
    return x * torch.linspace(0.1, scale, dim, dtype=torch.float64)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), dim=st.integers(1, 8))
def test_commuting_gaussians_in_closed_form(seed: int, dim: int) -> None:
    # Equal eigenvectors Q: distance = |difference of means|^2 + sum (sqrt a - sqrt b)^2.
    rng = np.random.default_rng(seed)
    q = torch.linalg.qr(torch.from_numpy(rng.normal(size=(dim, dim))))[0]
    a, b, step = (torch.from_numpy(rng.uniform(0, 3, dim)) for _ in range(3))
    expected = (step.square() + (a.sqrt() - b.sqrt()).square()).sum()
    found = frechet_distance(
        gaussian(torch.zeros(dim), q @ a.diag() @ q.T), gaussian(q @ step, q @ b.diag() @ q.T)
    )
    assert found == pytest.approx(float(expected), rel=1e-10, abs=1e-10)


def test_full_rank_agrees_with_scipys_matrix_root() -> None:
    a, b = moments_of(sample(300, 40, 1)), moments_of(sample(300, 40, 2, scale=2.0))
    root = scipy.linalg.sqrtm(a.covariance.numpy() @ b.covariance.numpy())
    expected = float((a.mean - b.mean).square().sum()) + np.trace(a.covariance + b.covariance - 2 * root.real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)


def test_exact_for_fewer_pictures_than_features() -> None:
    # Two clouds inside an 8-dimensional subspace of 200 dimensions: the distance is that within the subspace.
    inside_a, inside_b = sample(30, 8, 1), sample(12, 8, 2, scale=3.0)
    basis = torch.linalg.qr(torch.from_numpy(np.random.default_rng(3).normal(size=(200, 8))))[0]
    expected = frechet_distance(moments_of(inside_a), moments_of(inside_b))
    found = frechet_distance(moments_of(inside_a @ basis.T), moments_of(inside_b @ basis.T))
    assert expected > 1.0
    assert found == pytest.approx(expected, rel=1e-12)


def test_equal_and_degenerate_sets() -> None:
    cloud = moments_of(sample(50, 100, 1))
    assert frechet_distance(cloud, cloud) == pytest.approx(0.0, abs=1e-9)
    point = moments_of(torch.ones(5, 100))
    shifted = moments_of(torch.full((5, 100), 3.0))
    assert frechet_distance(point, shifted) == pytest.approx(400.0)


def test_sets_that_share_few_directions_are_exact() -> None:
    # Each spans two thirds of the space, half of that in common: S has zero singular values, which squaring
    # alone would turn into 1e-8 of the largest each. Within a direction, 4 and 1 times w are sqrt(w) apart.
    basis = torch.linalg.qr(torch.from_numpy(np.random.default_rng(3).normal(size=(60, 60))))[0]
    zero, wide = torch.zeros(20, dtype=torch.float64), torch.linspace(1, 9, 20, dtype=torch.float64)
    variances_a, variances_b = torch.cat((wide, wide, zero)), torch.cat((zero, 4 * wide, wide))
    found = frechet_distance(
        gaussian(torch.zeros(60), basis @ variances_a.diag() @ basis.T),
        gaussian(torch.zeros(60), basis @ variances_b.diag() @ basis.T),
    )
    assert found == pytest.approx(3 * float(wide.sum()), rel=1e-12)


def test_a_prepared_reference_gives_the_same_distances() -> None:
    reference = moments_of(sample(60, 40, 1))
    prepared = PreparedReference.of(reference)
    for seed, count in ((2, 25), (3, 80)):
        samples = moments_of(sample(count, 40, seed))
        assert prepared.distance(samples) == frechet_distance(samples, reference)


def test_torch_fidelity_agrees_on_the_same_pictures() -> None:
    samples, reference = Pictures(150, 1, 10.0), Pictures(130, 2, 0.0)
    peer = fidelity(samples, reference, fid=True)
    found = frechet_distance(*(moments_of(torch.from_numpy(x.pooled)) for x in (samples, reference)))
    assert found == pytest.approx(peer["frechet_inception_distance"], rel=1e-9)


def pytorch_fid(a: Moments, b: Moments) -> float:
    means, covariances = [x.mean.numpy() for x in (a, b)], [x.covariance.numpy() for x in (a, b)]
    return float(calculate_frechet_distance(means[0], covariances[0], means[1], covariances[1]))


def test_pytorch_fids_formula_agrees_on_the_same_pictures() -> None:
    a, b = (moments_of(torch.from_numpy(Pictures(150, seed, 10.0 * seed).pooled)) for seed in (1, 2))
    assert frechet_distance(a, b) == pytest.approx(pytorch_fid(a, b), rel=1e-9)


def test_pytorch_fids_root_loses_digits_where_ours_does_not() -> None:
    # Clouds inside 8 of 24 dimensions, where the true distance is that within the 8.
    inside_a, inside_b = sample(20, 8, 1), sample(20, 8, 2, scale=3.0)
    basis = torch.linalg.qr(torch.from_numpy(np.random.default_rng(3).normal(size=(24, 8))))[0]
    expected = frechet_distance(moments_of(inside_a), moments_of(inside_b))
    a, b = moments_of(inside_a @ basis.T), moments_of(inside_b @ basis.T)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-13)
    found = pytorch_fid(a, b) / expected - 1
    assert 1e-10 < abs(found) < 1e-4
