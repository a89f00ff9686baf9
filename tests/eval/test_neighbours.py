import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import betabinom, mannwhitneyu, norm
from sklearn.datasets import load_digits
from sklearn.neighbors import NearestNeighbors

from eval.metrics.neighbours import NeighbourOptions, memorisation, nearest

FEW_DISTANCES = st.lists(st.integers(0, 6), min_size=3, max_size=30)


def cloud(count: int, seed: int, dim: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)


def test_sklearn_finds_the_same_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, training = cloud(50, 1), cloud(83, 2)
    peer = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(training.astype(float))
    distance, index = peer.kneighbors(queries.astype(float))
    monkeypatch.setattr("eval.metrics.blocks.BLOCK", 11)
    found = nearest(queries, training)
    np.testing.assert_array_equal(found.index, index[:, 0])
    np.testing.assert_allclose(found.distance, distance[:, 0], rtol=1e-12)


def test_a_copy_has_distance_zero_far_from_the_origin() -> None:
    training = cloud(40, 1) + 1000
    found = nearest(training[::-1], training)
    assert found.index.tolist() == list(range(40))[::-1]
    assert not found.distance.any()


def test_expected_share_and_its_error_are_those_of_equal_distributions() -> None:
    # n samples, m held-out: the count below the k-th smallest of m is beta-binomial (n, k, m + 1 - k).
    rng = np.random.default_rng(0)
    options = NeighbourOptions(quantile=0.05)
    found = [memorisation(rng.random(80), rng.random(150), options) for _ in range(1500)]
    exact = betabinom(80, 8, 143)
    assert found[0].expected == pytest.approx(exact.mean() / 80)
    assert found[0].standard_error == pytest.approx(exact.std() / 80)
    shares = np.array([result.share for result in found])
    assert shares.mean() == pytest.approx(found[0].expected, abs=4 * shares.std() / np.sqrt(1500))
    assert shares.std() == pytest.approx(found[0].standard_error, rel=0.1)
    assert np.std([result.z for result in found]) == pytest.approx(1.0, rel=0.1)


@settings(max_examples=20, deadline=None)
@given(FEW_DISTANCES, FEW_DISTANCES)
def test_rank_sum_is_scipys(samples: list[int], held_out: list[int]) -> None:
    x, y = np.array(samples, dtype=float), np.array(held_out, dtype=float)
    found = memorisation(x, y)
    if len(set(samples + held_out)) == 1:
        assert (found.z, found.nearer) == (0.0, 0.5)
        return
    peer = mannwhitneyu(x, y, alternative="less", method="asymptotic", use_continuity=False)
    assert found.nearer == pytest.approx(1 - peer.statistic / (len(x) * len(y)))
    assert norm.cdf(found.z) == pytest.approx(peer.pvalue)


def test_copies_of_real_digits_are_found_and_fresh_digits_are_not() -> None:
    digits = load_digits().data.astype(np.float32)
    order = np.random.default_rng(0).permutation(len(digits))
    training, held_out, fresh = digits[order[:900]], digits[order[900:1300]], digits[order[1300:1700]]
    yardstick = nearest(held_out, training).distance
    honest = memorisation(nearest(fresh, training).distance, yardstick)
    assert abs(honest.share - honest.expected) < 3 * honest.standard_error
    assert abs(honest.z) < 3
    few_copies = fresh.copy()
    few_copies[:40] = training[:40]
    caught = memorisation(nearest(few_copies, training).distance, yardstick)
    assert caught.share > caught.expected + 5 * caught.standard_error
    all_close = training[:400] + np.random.default_rng(1).normal(0, 0.5, (400, 64)).astype(np.float32)
    assert memorisation(nearest(all_close, training).distance, yardstick).z < -10
