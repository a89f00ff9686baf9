"""The order of training is a format: these vectors must never change."""

import itertools
import math
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import order as order_module
from data_pipeline.errors import UserError
from data_pipeline.order import ROUNDS, Order, derive, mix64, permutation, permute, rank_slice, round_keys

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15

shard_sizes = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(lambda sizes: sum(sizes) > 0)
seeds = st.integers(0, MASK)
windows = st.integers(1, 14)


# Frozen with the first release of the format.
KNOWN_DERIVE_0 = 16294208416658607535
KNOWN_DERIVE_7231 = 13554122703032680334
KNOWN_PERMUTATION_10 = [0, 3, 4, 1, 8, 7, 6, 2, 9, 5]
KNOWN_ORDER = [
    (3, 0),
    (4, 0),
    (0, 1),
    (4, 3),
    (0, 0),
    (0, 2),
    (4, 2),
    (4, 1),
    (2, 1),
    (2, 3),
    (2, 2),
    (2, 4),
    (2, 0),
    (4, 3),
    (4, 0),
    (4, 2),
    (4, 1),
    (3, 0),
    (0, 1),
    (0, 2),
    (0, 0),
    (2, 1),
    (2, 3),
    (2, 2),
    (2, 4),
    (2, 0),
]
KNOWN_BIG = [(161, 15923), (146, 10717), (88, 4529), (37, 7081)]


# An independent second implementation of the module's docstring, in Python integers.
def slow_mix64(z: int) -> int:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def slow_derive(*words: int) -> int:
    h = 0
    for word in words:
        h = slow_mix64((h + GOLDEN) & MASK ^ word)
    return h


def slow_bijection(x: int, n: int, key: int) -> int:
    if n == 1:
        return x
    a = math.ceil(math.sqrt(n))
    a += a % 2
    b = math.ceil(n / a)
    while True:
        left, right = divmod(x, b)
        for i in range(24):
            k = slow_mix64((key + (i + 1) * GOLDEN) & MASK)
            if i % 2 == 0:
                left = (left + slow_mix64(right ^ k) % a) % a
            else:
                right = (right + slow_mix64(left ^ k) % b) % b
        x = left * b + right
        if x < n:
            return x


def slow_epoch(sizes: list[int], seed: int, window: int, epoch: int) -> list[tuple[int, int]]:
    count = len(sizes)
    shards = [slow_bijection(i, count, slow_derive(seed, 1, epoch)) for i in range(count)]
    result = []
    for w, first in enumerate(range(0, count, window)):
        members = [(s, m) for s in shards[first : first + window] for m in range(sizes[s])]
        key = slow_derive(seed, 2, epoch, w)
        result += [members[slow_bijection(j, len(members), key)] for j in range(len(members))]
    return result


def pairs(order: Order, positions: np.ndarray) -> list[tuple[int, int]]:
    shards, members = order.locate(positions)
    return list(zip(shards.tolist(), members.tolist(), strict=True))


def test_mix64_is_splitmix64() -> None:
    # First outputs of SplitMix64 with seed 1234567, as published with many implementations.
    states = np.array([(1234567 + i * GOLDEN) & MASK for i in range(1, 6)], dtype=np.uint64)
    assert mix64(states).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_known_answers() -> None:
    assert derive(0) == KNOWN_DERIVE_0
    assert derive(7, 2, 3, 1) == KNOWN_DERIVE_7231
    assert permutation(10, derive(42)).tolist() == KNOWN_PERMUTATION_10
    assert pairs(Order([3, 0, 5, 1, 4], seed=1, window_shards=2), np.arange(26)) == KNOWN_ORDER
    big = Order([17_000] * 200, seed=2**64 - 1, window_shards=16)
    assert pairs(big, np.array([0, 1, 123_456_789, 10**15])) == KNOWN_BIG


@given(shard_sizes, seeds, windows, st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_agrees_with_the_description(sizes: list[int], seed: int, window: int, epoch: int) -> None:
    order = Order(sizes, seed, window)
    positions = np.arange(order.epoch_size, dtype=np.int64) + epoch * order.epoch_size
    assert pairs(order, positions) == slow_epoch(sizes, seed, window, epoch)


@given(shard_sizes, seeds, windows, st.integers(0, 2**40))
@settings(max_examples=40, deadline=None)
def test_every_member_exactly_once_per_epoch(sizes: list[int], seed: int, window: int, epoch: int) -> None:
    order = Order(sizes, seed, window)
    found = pairs(order, np.arange(order.epoch_size, dtype=np.int64) + epoch * order.epoch_size)
    assert sorted(found) == [(s, m) for s, size in enumerate(sizes) for m in range(size)]


@given(shard_sizes, seeds, windows, st.data())
@settings(max_examples=40, deadline=None)
def test_random_access_equals_sequential(
    sizes: list[int], seed: int, window: int, data: st.DataObject
) -> None:
    order = Order(sizes, seed, window)
    length = 3 * order.epoch_size
    sequential = pairs(order, np.arange(length))
    wanted = data.draw(st.lists(st.integers(0, length - 1), max_size=50))
    assert pairs(Order(sizes, seed, window), np.array(wanted, dtype=np.int64)) == [
        sequential[p] for p in wanted
    ]


@given(shard_sizes, seeds, windows, st.integers(1, 40), st.integers(1, 9), st.integers(0, 500))
@settings(max_examples=40, deadline=None)
def test_any_world_reads_the_same_sequence(
    sizes: list[int], seed: int, window: int, batch: int, world: int, start: int
) -> None:
    order = Order(sizes, seed, window)
    whole = pairs(order, np.arange(start, start + batch))
    parts = [rank_slice(batch, rank, world) for rank in range(world)]
    positions = np.arange(start, start + batch)
    assert [p for part in parts for p in pairs(order, positions[part])] == whole
    lengths = [part.stop - part.start for part in parts]
    assert max(lengths) - min(lengths) <= 1
    assert lengths == sorted(lengths, reverse=True)


def test_a_window_stays_within_its_shards() -> None:
    order = Order([50] * 20, seed=3, window_shards=4)
    for first in range(0, 1000, 200):
        shards, _ = order.locate(np.arange(first, first + 200))
        assert len(set(shards.tolist())) == 4
        assert len(set(shards[:20].tolist())) > 1, "the window's shards are mixed with each other"


def test_epochs_and_seeds_differ() -> None:
    order = Order([100] * 5, seed=0, window_shards=2)
    orders = [pairs(order, np.arange(500) + epoch * 500) for epoch in range(3)]
    orders.append(pairs(Order([100] * 5, seed=1, window_shards=2), np.arange(500)))
    for one, other in itertools.combinations(orders, 2):
        assert sum(a == b for a, b in zip(one, other, strict=True)) < 20  # chance alone gives about 1


# Critical values of chi-square with n! - 1 degrees of freedom at 0.1 %.
@pytest.mark.parametrize(("n", "critical"), [(3, 20.52), (4, 49.73), (5, 172.42)])
def test_small_permutations_are_equally_frequent(n: int, critical: float) -> None:
    trials = 12_000
    # Keys 0, 2^40, 2*2^40 …; round i's is mix64(key + (i+1)*G), as `round_keys` has it.
    keys = mix64(
        np.array(
            [[((k << 40) + (i + 1) * GOLDEN) & MASK for i in range(ROUNDS)] for k in range(trials)], np.uint64
        )
    )
    assert np.array_equal(keys[5], round_keys(np.array([5 << 40], dtype=np.uint64))[0])
    sizes = np.full(trials, n)
    a, b = order_module._factors(n)
    columns = [
        permute(np.full(trials, x), sizes, np.full(trials, a), np.full(trials, b), keys) for x in range(n)
    ]
    counts = Counter(zip(*(column.tolist() for column in columns), strict=True))
    expected = trials / math.factorial(n)
    assert len(counts) == math.factorial(n)
    statistic = sum((count - expected) ** 2 / expected for count in counts.values())
    assert statistic < critical


@given(st.integers(0, 3000), seeds)
@settings(max_examples=40, deadline=None)
def test_permutation_is_a_bijection(n: int, key: int) -> None:
    assert np.array_equal(np.sort(permutation(n, key)), np.arange(n))
    assert round_keys(np.array([key], dtype=np.uint64)).shape == (1, ROUNDS)


@pytest.mark.parametrize(
    ("sizes", "seed", "window", "named"),
    [
        ([], 0, 1, "no samples"),
        ([0, 0], 0, 1, "no samples"),
        ([1], -1, 1, "seed"),
        ([1], 1 << 64, 1, "seed"),
        ([1], 0, 0, "window_shards"),
    ],
)
def test_impossible_orders_are_refused(sizes: list[int], seed: int, window: int, named: str) -> None:
    with pytest.raises(UserError, match=named):
        Order(sizes, seed, window)


def test_the_pure_room_imports_lightly() -> None:
    code = (
        "import data_pipeline.order, sys; print([m for m in ('PIL', 'fsspec', 'torch') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
