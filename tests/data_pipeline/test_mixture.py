"""The mixture of several data sets is a format like the order: these vectors must never change."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import UserError
from data_pipeline.mixture import BLOCK, Mixture, source_seed
from data_pipeline.order import Order, derive, permutation

MASK = (1 << 64) - 1

seeds = st.integers(0, MASK)
# At most 1 : 100, so that each of up to 8 sources has its place.
weight_lists = st.lists(st.floats(0.1, 10), min_size=1, max_size=8)

# Frozen with the first release of the format: other numbers are a new format.
KNOWN_SHARES = (569, 341, 114)
KNOWN_SOURCES = [0, 0, 0, 0, 0, 0, 0, 1, 0]
KNOWN_WITHIN = [0, 1, 2, 3, 568, 569, 570, 41_112_074, 555_664_062_500_000]
KNOWN_BEGINNING = "00000100000202101001202010010000"
KNOWN_SEEDS = [4090964761329564422, 14953806170225822634]


def pairs(mixture: Mixture, positions: np.ndarray) -> list[tuple[int, int]]:
    sources, within = mixture.split(positions)
    return list(zip(sources.tolist(), within.tolist(), strict=True))


# A second implementation of the module's docstring, position after position.
def slow_stream(shares: tuple[int, ...], seed: int, length: int) -> list[tuple[int, int]]:
    named = [source for source, share in enumerate(shares) for _ in range(share)]
    used = [0] * len(shares)
    stream = []
    for block in range(-(-length // 1024)):
        for place in permutation(1024, derive(seed, 3, block)).tolist():
            source = named[place]
            stream.append((source, used[source]))
            used[source] += 1
    return stream[:length]


def test_known_answers() -> None:
    mixture = Mixture([5, 3, 1], seed=7)
    assert mixture.shares == KNOWN_SHARES
    sources, within = mixture.split(np.array([0, 1, 2, 3, 1023, 1024, 1025, 123_456_789, 10**15]))
    assert sources.tolist() == KNOWN_SOURCES
    assert within.tolist() == KNOWN_WITHIN
    assert "".join(map(str, mixture.split(np.arange(32))[0].tolist())) == KNOWN_BEGINNING
    assert mixture.consumed(10**15) == (555_664_062_500_000, 333_007_812_500_000, 111_328_125_000_000)
    assert [source_seed(7, source, 3) for source in (0, 2)] == KNOWN_SEEDS


@given(weight_lists, seeds)
@settings(max_examples=20, deadline=None)
def test_agrees_with_the_description(weights: list[float], seed: int) -> None:
    mixture, length = Mixture(weights, seed), 3 * BLOCK + 100
    assert pairs(mixture, np.arange(length)) == slow_stream(mixture.shares, seed, length)


@given(weight_lists, seeds, st.integers(0, 2**40))
@settings(max_examples=30, deadline=None)
def test_each_source_is_consumed_in_its_own_order_without_a_gap(
    weights: list[float], seed: int, block: int
) -> None:
    mixture, first = Mixture(weights, seed), block * BLOCK
    sources, within = mixture.split(first + np.arange(2 * BLOCK + 77))
    cursors, ends = mixture.consumed(first), mixture.consumed(first + 2 * BLOCK + 77)
    assert cursors == tuple(block * share for share in mixture.shares)
    for source, (begin, end) in enumerate(zip(cursors, ends, strict=True)):
        assert within[sources == source].tolist() == list(range(begin, end))


@given(weight_lists, seeds, st.integers(0, 2**40))
@settings(max_examples=30, deadline=None)
def test_every_block_has_exactly_the_shares(weights: list[float], seed: int, block: int) -> None:
    mixture = Mixture(weights, seed)
    sources, _ = mixture.split(block * BLOCK + np.arange(BLOCK))
    assert tuple(np.bincount(sources, minlength=len(weights)).tolist()) == mixture.shares


@given(weight_lists, seeds, st.data())
@settings(max_examples=30, deadline=None)
def test_random_access_equals_sequential(weights: list[float], seed: int, data: st.DataObject) -> None:
    length = 5 * BLOCK
    sequential = pairs(Mixture(weights, seed), np.arange(length))
    wanted = data.draw(st.lists(st.integers(0, length - 1), max_size=60))
    fresh = Mixture(weights, seed)
    assert pairs(fresh, np.array(wanted, dtype=np.int64)) == [sequential[position] for position in wanted]


@given(weight_lists, seeds, st.integers(0, 10 * BLOCK))
@settings(max_examples=40, deadline=None)
def test_consumed_counts_what_lies_before(weights: list[float], seed: int, position: int) -> None:
    mixture = Mixture(weights, seed)
    sources, _ = mixture.split(np.arange(position))
    assert mixture.consumed(position) == tuple(np.bincount(sources, minlength=len(weights)).tolist())
    source, within = (array.tolist()[0] for array in mixture.split(np.array([position])))
    assert mixture.consumed(position)[source] == within


@given(weight_lists)
def test_shares_follow_the_weights(weights: list[float]) -> None:
    shares = Mixture(weights, 0).shares
    total = sum(map(Fraction, weights))
    quotas = [BLOCK * Fraction(weight) / total for weight in weights]
    assert sum(shares) == BLOCK
    assert all(abs(share - quota) < 1 for share, quota in zip(shares, quotas, strict=True))
    rounded_up = [quota % 1 for quota, share in zip(quotas, shares, strict=True) if share > quota]
    rounded_down = [quota % 1 for quota, share in zip(quotas, shares, strict=True) if share < quota]
    assert min(rounded_up, default=1) >= max(rounded_down, default=0)
    assert Mixture([8 * weight for weight in weights], 0).shares == shares, "only proportions matter"


def test_ties_go_to_the_earlier_source() -> None:
    assert Mixture([1, 1, 1], 0).shares == (342, 341, 341)
    assert Mixture([0.2] * 5, 0).shares == (205, 205, 205, 205, 204)
    assert Mixture([1] * BLOCK, 0).shares == (1,) * BLOCK
    assert Mixture([1022.5, 0.75, 0.75], 0).shares == (1022, 1, 1)


@given(seeds, st.lists(st.integers(0, 2**62), max_size=30), st.floats(1e-300, 1e300))
def test_one_source_is_no_mixture(seed: int, positions: list[int], weight: float) -> None:
    mixture = Mixture([weight], seed)
    sources, within = mixture.split(np.array(positions, dtype=np.int64))
    assert sources.tolist() == [0] * len(positions)
    assert within.tolist() == positions
    assert all(mixture.consumed(position) == (position,) for position in positions)
    assert source_seed(seed, 0, 1) == seed


def test_sources_of_equal_size_have_orders_of_their_own() -> None:
    first, second = (
        Order([50] * 4, source_seed(11, source, 2), 2).locate(np.arange(200)) for source in (0, 1)
    )
    assert np.mean((first[0] == second[0]) & (first[1] == second[1])) < 0.1  # chance alone gives 0.005


def test_places_within_a_block_are_drawn_evenly() -> None:
    blocks = 2000
    mixture = Mixture([1, 3], seed=5)
    sources, _ = mixture.split(np.arange(blocks * BLOCK))
    counts = np.count_nonzero(sources.reshape(blocks, BLOCK) == 0, axis=0)  # at each place
    statistic = ((counts - blocks / 4) ** 2 / (blocks * 3 / 16)).sum()
    # chi-square with 1023 degrees of freedom is close to normal: 3.3 standard deviations on either side.
    assert abs(statistic - (BLOCK - 1)) < 3.3 * math.sqrt(2 * (BLOCK - 1))
    neighbours = np.mean(sources[1:] == sources[:-1])
    assert neighbours == pytest.approx(1 / 16 + 9 / 16, abs=0.002), "no runs, no alternation"


@pytest.mark.parametrize(
    ("weights", "seed", "named"),
    [
        ([], 0, "0 sources"),
        ([1.0] * (BLOCK + 1), 0, "1025 sources"),
        ([1, 0], 0, "0 of source 1"),
        ([-1, 1], 0, "-1 of source 0"),
        ([1, math.nan], 0, "nan of source 1"),
        ([1, math.inf], 0, "inf of source 1"),
        ([1, 1e-6], 0, "1e-06 of source 1 is too small"),
        ([1e308, 1e308, 1e300], 0, "source 2 is too small"),
        ([1, 1], -1, "seed"),
        ([1], 1 << 64, "seed"),
    ],
)
def test_impossible_mixtures_are_refused(weights: list[float], seed: int, named: str) -> None:
    with pytest.raises(UserError, match=named):
        Mixture(weights, seed)
