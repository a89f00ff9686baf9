import numpy as np
import pytest
from cleanfid.fid import kernel_distance as clean_fids_kid

from eval.metrics.kid import KernelDistance, KidOptions, kernel_distance
from tests.eval.fidelity import Pictures, fidelity


def cloud(count: int, seed: int, dim: int = 8, shift: float = 0.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(count, dim)) + shift).astype(np.float32)


def textbook(x: np.ndarray, y: np.ndarray) -> float:
    """Gretton et al. 2012, eq. 3, pair by pair."""

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return float((a.astype(float) @ b.astype(float) / len(a) + 1) ** 3)

    n, m = len(x), len(y)
    within_x = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_y = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within_x + within_y - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


def test_value_is_the_unbiased_estimator_and_its_error_the_jackknife() -> None:
    x, y = cloud(14, 1), cloud(19, 2, shift=0.3)
    found = kernel_distance(x, y, KidOptions(subsets=2))
    assert found.value == pytest.approx(textbook(x, y), rel=1e-12)
    assert found.pictures == (14, 19)
    variance = 0.0
    for count, without in (
        (14, [textbook(np.delete(x, i, 0), y) for i in range(14)]),
        (19, [textbook(x, np.delete(y, i, 0)) for i in range(19)]),
    ):
        variance += float(np.var(without)) * (count - 1)
    assert found.standard_error == pytest.approx(np.sqrt(variance), rel=1e-10)
    low, high = found.interval
    assert (found.value - low, high - found.value) == pytest.approx((1.959964 * np.sqrt(variance),) * 2)


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = cloud(50, 1), cloud(41, 2)
    whole = kernel_distance(x, y, KidOptions(subsets=3, subset_size=20))
    monkeypatch.setattr("eval.metrics.blocks.BLOCK", 7)
    pieces = kernel_distance(x, y, KidOptions(subsets=3, subset_size=20))
    for name in ("value", "standard_error", "subset_mean", "sd"):
        assert getattr(pieces, name) == pytest.approx(getattr(whole, name), rel=1e-11)


def test_subsets_are_a_function_of_the_seed() -> None:
    x, y = cloud(60, 1), cloud(60, 2)
    options = KidOptions(subsets=5, subset_size=10, seed=3)
    first = kernel_distance(x, y, options)
    assert kernel_distance(x, y, options) == first
    assert first.sd > 0
    other = kernel_distance(x, y, KidOptions(subsets=5, subset_size=10, seed=4))
    assert other.subset_mean != first.subset_mean
    assert other.value == first.value


def test_a_small_set_lowers_the_subset_size_and_says_so() -> None:
    x, y = cloud(30, 1), cloud(40, 2)
    found = kernel_distance(x, y, KidOptions(subsets=4))
    assert (found.subset_size, found.subsets) == (30, 4)
    same = kernel_distance(x, y[:30], KidOptions(subsets=4))
    assert (same.subset_size, same.subsets, same.sd) == (30, 1, 0.0)
    assert same.subset_mean == pytest.approx(same.value, rel=1e-12)


def test_at_most_so_many_pictures_enter_the_full_estimate() -> None:
    x, y = cloud(300, 1), cloud(40, 2)
    found = kernel_distance(x, y, KidOptions(subsets=2, subset_size=10, most=100))
    assert found.pictures == (100, 40)
    assert found.value == pytest.approx(kernel_distance(x, y, KidOptions(subsets=2)).value, abs=0.5)


def test_intervals_hold_the_distributions_distance_as_often_as_they_say() -> None:
    # For x ~ N(a, I) and y ~ N(b, I) in 16 dimensions, with p = a.b and q = |a|^2 + |b|^2 + 16, the powers of
    # t = x.y have the means p, p^2 + q and p^3 + 3 p (q + 2).
    def expected_kernel(a: float, b: float) -> float:
        p, q = 16 * a * b, 16 * (a**2 + b**2 + 1)
        return 1 + 3 * p / 16 + 3 * (p**2 + q) / 16**2 + (p**3 + 3 * p * (q + 2)) / 16**3

    truth = expected_kernel(0, 0) + expected_kernel(0.5, 0.5) - 2 * expected_kernel(0, 0.5)

    def run(seed: int, shift: float) -> KernelDistance:
        x, y = cloud(100, seed, 16), cloud(100, 10_000 + seed, 16, shift)
        return kernel_distance(x, y, KidOptions(subsets=1, subset_size=3))

    apart = [run(seed, 0.5) for seed in range(100)]
    values = np.array([found.value for found in apart])
    assert values.mean() == pytest.approx(truth, abs=4 * values.std() / np.sqrt(100))
    assert np.mean([found.interval[0] <= truth <= found.interval[1] for found in apart]) > 0.88
    equal = [run(seed, 0.0) for seed in range(100)]
    values = np.array([found.value for found in equal])
    assert np.mean([found.standard_error for found in equal]) > values.std()
    assert np.mean([found.interval[0] <= 0 <= found.interval[1] for found in equal]) > 0.9


def test_torch_fidelity_agrees_on_the_same_pictures() -> None:
    # One subset of all pictures is the only draw on which two generators agree; float64 features keep
    # torch-fidelity, which works in its features' own type, from rounding to float32.
    samples, reference = Pictures(120, 1, 10.0), Pictures(120, 2, 0.0)
    peer = fidelity(samples, reference, kid=True, kid_subsets=1, kid_subset_size=120)
    found = kernel_distance(samples.pooled, reference.pooled, KidOptions())
    assert found.value == pytest.approx(peer["kernel_inception_distance_mean"], rel=1e-9)
    assert found.subset_mean == pytest.approx(peer["kernel_inception_distance_mean"], rel=1e-9)


def test_torch_fidelity_draws_other_subsets_of_the_same_scatter() -> None:
    samples, reference = Pictures(120, 1, 10.0), Pictures(120, 2, 0.0)
    peer = fidelity(samples, reference, kid=True, kid_subsets=200, kid_subset_size=40)
    found = kernel_distance(samples.pooled, reference.pooled, KidOptions(subsets=200, subset_size=40))
    between = np.hypot(found.sd, peer["kernel_inception_distance_std"]) / np.sqrt(200)
    assert found.subset_mean == pytest.approx(peer["kernel_inception_distance_mean"], abs=4 * between)
    assert found.sd == pytest.approx(peer["kernel_inception_distance_std"], rel=0.2)


def test_clean_fid_agrees_on_one_subset() -> None:
    samples, reference = Pictures(120, 1, 10.0), Pictures(120, 2, 0.0)
    peer = clean_fids_kid(samples.pooled.astype(float), reference.pooled.astype(float), num_subsets=1)
    found = kernel_distance(samples.pooled, reference.pooled, KidOptions())
    assert found.value == pytest.approx(peer, rel=1e-9)
