from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.metrics.blocks import centre_of
from eval.metrics.bootstrap import BootstrapOptions, bootstrap_distance, paired_difference
from eval.metrics.frechet import frechet_distance
from eval.metrics.resampling import Draws, multiplicities, subset, weighted_moments
from eval.moments import Moments, moments_of

DIM = 5


def samples(count: int, seed: int, scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(count, DIM)) * scale).astype(np.float32)


def reference() -> Moments:
    return Moments(1001, torch.full((DIM,), 0.2, dtype=torch.float64), torch.eye(DIM).double() * 1440)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), count=st.integers(2, 40))
def test_weights_are_copies(seed: int, count: int) -> None:
    x = samples(count, seed) + 1000
    weights = np.random.default_rng(seed).integers(0, 4, count)
    weights[0] += 1
    found = weighted_moments(x, weights, centre_of(x))
    copied = moments_of(torch.from_numpy(x.repeat(weights, axis=0)).double())
    assert found.count == copied.count
    torch.testing.assert_close(found.mean, copied.mean, rtol=1e-13, atol=1e-12)
    torch.testing.assert_close(found.scatter, copied.scatter, rtol=1e-10, atol=1e-10)


def test_draws_are_pure_and_fair() -> None:
    drawn = np.stack([multiplicities(5, Draws.BOOTSTRAP, repetition, 50) for repetition in range(400)])
    assert (drawn.sum(axis=1) == 50).all()
    np.testing.assert_array_equal(drawn[7], multiplicities(5, Draws.BOOTSTRAP, 7, 50))
    assert drawn.mean(axis=0) == pytest.approx(1.0, abs=5 / np.sqrt(400))
    assert drawn.var() == pytest.approx(1 - 1 / 50, abs=0.05)
    rows = np.stack([subset(5, Draws.INFINITY, repetition, 50, 20) for repetition in range(400)])
    assert (np.diff(rows, axis=1) > 0).all()
    assert np.bincount(rows.ravel(), minlength=50) == pytest.approx(160, abs=5 * np.sqrt(400 * 0.24))
    assert not np.array_equal(
        subset(5, Draws.INFINITY, 0, 50, 20), subset(5, Draws.KERNEL_SAMPLES, 0, 50, 20)
    )


def test_replicates_are_distances_of_resampled_copies() -> None:
    x = samples(30, 1)
    options = BootstrapOptions(replicates=6, seed=9)
    found = bootstrap_distance(x, reference(), options)
    replicates = [
        frechet_distance(moments_of(torch.from_numpy(x.repeat(weights, axis=0)).double()), reference())
        for weights in (multiplicities(9, Draws.BOOTSTRAP, r, 30) for r in range(6))
    ]
    assert found.value == pytest.approx(
        frechet_distance(moments_of(torch.from_numpy(x).double()), reference())
    )
    assert found.standard_error == pytest.approx(np.std(replicates, ddof=1), rel=1e-9)
    assert found.bias == pytest.approx(np.mean(replicates) - found.value, rel=1e-9)
    assert (found.low + found.high) / 2 == pytest.approx(found.value)
    assert bootstrap_distance(x, reference(), options) == found


def test_standard_error_and_bias_are_those_of_other_noise() -> None:
    truth = DIM * (0.04 + (1.2 - 1.0) ** 2)
    found = [
        bootstrap_distance(samples(100, seed), reference(), BootstrapOptions(replicates=50))
        for seed in range(10)
    ]
    other_noise = [moments_of(torch.from_numpy(samples(100, seed)).double()) for seed in range(300)]
    values = np.array([frechet_distance(moments, reference()) for moments in other_noise])
    error = np.sqrt(np.mean([result.standard_error**2 for result in found]))
    assert error == pytest.approx(values.std(), rel=0.2)
    assert np.mean([result.bias for result in found]) == pytest.approx(values.mean() - truth, rel=0.5)


def test_common_noise_makes_a_small_difference_visible() -> None:
    noise = samples(200, 1)
    a, b = noise, noise * np.float32(0.97)  # b is a little farther from the reference's scale 1.2
    options = BootstrapOptions(replicates=60)
    paired = paired_difference(a, b, reference(), options)
    assert paired.difference == pytest.approx(paired.a - paired.b)
    assert paired.high < 0
    assert paired.probability_a_better > 0.975
    assert paired.correlation > 0.9
    strangers = paired_difference(a, samples(200, 2, scale=0.97), reference(), options)
    assert strangers.standard_error > 4 * paired.standard_error
    assert abs(strangers.correlation) < 0.5
    swapped = paired_difference(b, a, reference(), options)
    assert swapped.difference == -paired.difference
    assert swapped.probability_a_better == pytest.approx(1 - paired.probability_a_better)


def test_paired_error_is_that_of_other_noise() -> None:
    def pair(seed: int) -> tuple[np.ndarray, np.ndarray]:
        noise = samples(150, seed)
        return noise, noise * np.float32(0.9) + samples(150, seed + 50_000, scale=0.3)

    def difference(seed: int) -> float:
        a, b = (frechet_distance(moments_of(torch.from_numpy(x)), reference()) for x in pair(seed))
        return a - b

    spread = np.std([difference(seed) for seed in range(300)])
    options = BootstrapOptions(replicates=40)
    errors = [paired_difference(*pair(seed), reference(), options).standard_error for seed in range(8)]
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(spread, rel=0.25)


def test_equal_sets_do_not_differ() -> None:
    x = samples(30, 1)
    same = paired_difference(x, x, reference(), BootstrapOptions(replicates=4))
    assert (same.difference, same.low, same.high, same.probability_a_better) == (0.0, 0.0, 0.0, 0.5)


def test_blocks_and_spill_files_change_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    x = samples(40, 1)
    whole = bootstrap_distance(x, reference(), BootstrapOptions(replicates=5))
    monkeypatch.setattr("eval.metrics.blocks.BLOCK", 7)
    spilled = np.memmap(tmp_path / "features", dtype=np.float32, mode="w+", shape=x.shape)
    spilled[:] = x
    found = bootstrap_distance(spilled, reference(), BootstrapOptions(replicates=5))
    assert found.standard_error == pytest.approx(whole.standard_error, rel=1e-9)
    assert found.value == pytest.approx(whole.value, rel=1e-12)
