from pathlib import Path

import numpy as np
import pytest
import torch

from eval.metrics.frechet import PreparedReference, frechet_distance
from eval.metrics.infinity import InfinityOptions, frechet_infinity, sizes_for
from eval.moments import Moments, moments_of

DIM = 6
SCALES = np.linspace(0.5, 2, DIM)


def samples(count: int, seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(count, DIM)) * SCALES).astype(np.float32)


def reference() -> Moments:
    """An exact Gaussian: mean 0.1, covariance 1.44 times the samples'."""
    covariance = torch.from_numpy(np.diag(SCALES**2 * 1.44))
    return Moments(1_000_001, torch.full((DIM,), 0.1, dtype=torch.float64), covariance * 1_000_000)


TRUTH = DIM * 0.01 + 0.04 * float((SCALES**2).sum())


def test_sizes_are_chong_and_forsyths_where_they_apply() -> None:
    assert sizes_for(50_000, 2048, 15) == tuple(np.linspace(5000, 50_000, 15).astype(int))
    assert sizes_for(10_000, 1280, 15)[0] == 2560
    assert sizes_for(5000, 2048, 15)[0] == 2500


def test_extrapolation_removes_the_bias_and_states_its_error() -> None:
    found = [frechet_infinity(samples(300, seed), reference(), InfinityOptions()) for seed in range(60)]
    plain = np.array([result.distances[-1] for result in found])
    values = np.array([result.value for result in found])
    errors = np.array([result.standard_error for result in found])
    uncertainty = values.std() / np.sqrt(60)
    assert plain.mean() - TRUTH > 4 * uncertainty
    assert values.mean() == pytest.approx(TRUTH, abs=3 * uncertainty)
    assert np.sqrt(np.square(errors).mean()) == pytest.approx(values.std(), rel=0.3)
    held = np.mean([result.interval[0] <= TRUTH <= result.interval[1] for result in found])
    assert held > 0.85


def test_points_are_distances_of_subsets_and_the_last_is_the_whole(tmp_path: Path) -> None:
    x = samples(200, 1)
    options = InfinityOptions(points=5, seed=7)
    found = frechet_infinity(x, reference(), options)
    assert found.sizes == (20, 65, 110, 155, 200)
    assert found.distances[-1] == pytest.approx(
        frechet_distance(moments_of(torch.from_numpy(x)), reference()), rel=1e-12
    )
    slope, intercept = np.polyfit(1 / np.array(found.sizes), np.array(found.distances), 1)
    assert (found.value, found.slope) == pytest.approx((intercept, slope), rel=1e-9)
    assert frechet_infinity(x, reference(), options) == found
    assert frechet_infinity(x, reference(), InfinityOptions(points=5, seed=8)).value != found.value
    spilled = np.memmap(tmp_path / "features", dtype=np.float32, mode="w+", shape=x.shape)
    spilled[:] = x
    assert frechet_infinity(spilled, reference(), options) == found


def test_influence_is_the_derivative_by_a_vectors_weight() -> None:
    x = samples(40, 3).astype(np.float64)
    whole = moments_of(torch.from_numpy(x))
    influence = PreparedReference.of(reference()).influence(x, whole)

    def distance(weights: np.ndarray) -> float:
        mean = weights @ x
        centred = x - mean
        scatter = torch.from_numpy((centred * weights[:, None]).T @ centred)
        # Divisor n - 1 of an unweighted set, so that equal weights give `whole`.
        return frechet_distance(Moments(40, torch.from_numpy(mean), scatter * 40), reference())

    even = np.full(40, 1 / 40)
    for i in (0, 17, 39):
        step = 1e-5 * (np.eye(40)[i] - even)
        derivative = (distance(even + step) - distance(even - step)) / 2e-5
        # Of the covariance with divisor n - 1, hence the small factor on its part: compare to 3 %.
        assert influence[i] == pytest.approx(derivative, rel=0.03, abs=0.03 * influence.std())
