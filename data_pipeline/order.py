"""Stream position -> (shard, member): the order in which training sees a data set.

The order is a pure function of (samples per shard, seed, window_shards, position), so the whole state
of a stream is one integer, any world size reads the same sequence, and resuming costs nothing. It is
also a format: runs are continued and reproduced with it, so no line that moves a number may change
(known-answer tests hold it). A better order gets another name.

The construction, all in 64-bit arithmetic modulo 2^64:

* ``mix64`` is the output function of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom
  number generators", OOPSLA 2014, section 3; constants of Stafford's "Mix13").
* ``derive(w1, w2, …)``: h = 0; for every word h = mix64((h + G) xor w), G = 0x9E3779B97F4A7C15.
* A keyed bijection of {0 … n-1}: the generalised Feistel cipher of Black and Rogaway ("Ciphers with
  arbitrary finite domains", CT-RSA 2002, section 5) over Z_a x Z_b, a = ceil(sqrt(n)) rounded up to an
  even number (with both factors odd only even permutations could be reached), b = ceil(n/a),
  x = L*b + R, 24 rounds: even rounds L = (L + F_i(R)) mod a, odd rounds R = (R + F_i(L)) mod b, with
  F_i(v) = mix64(v xor k_i), k_i = mix64(key + (i+1)*G). Results >= n are enciphered again (cycle
  walking); a*b < n + a, so that is rare. With 24 rounds all permutations of small
  domains are equally frequent (n <= 7, chi-square over 10^6 keys; with 12 they are visibly not).
* Epoch e = position // epoch_size. Its shards are permuted with key derive(seed, 1, e). Window w is
  the w-th run of `window_shards` shards in that permuted order (the last may be shorter); the
  members of a window, counted through its shards in permuted order, are permuted together with key
  derive(seed, 2, e, w). Windows follow one another, so a reader needs few shards at a time, and every
  member comes exactly once per epoch.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_pipeline.errors import UserError

Int64Array = npt.NDArray[np.int64]
UInt64Array = npt.NDArray[np.uint64]

ROUNDS = 24
_GOLDEN = 0x9E3779B97F4A7C15
_SHARDS, _MEMBERS = 1, 2  # which of the two bijections a key belongs to
_CACHED_EPOCHS = 4


def mix64(z: UInt64Array) -> UInt64Array:
    """Return SplitMix64's output function of every element (uint64 in, uint64 out, bijective)."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def derive(*words: int) -> int:
    """Hash a sequence of integers in [0, 2^64) to one 64-bit key."""
    h = np.zeros(1, dtype=np.uint64)
    for word in words:
        h = _derive_further(h, np.array([word], dtype=np.uint64))
    return int(h[0])


def _derive_further(h: UInt64Array, words: UInt64Array) -> UInt64Array:
    """Hash one more word each onto `derive` of the words before, uint64 [1] and [B] -> [B]."""
    return mix64((h + np.uint64(_GOLDEN)) ^ words)


def round_keys(keys: UInt64Array) -> UInt64Array:
    """Return the round keys of bijections with keys uint64 [B], uint64 [B, ROUNDS]."""
    steps = np.arange(1, ROUNDS + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    return mix64(keys[:, None] + steps)


def _factors(n: int) -> tuple[int, int]:
    """Return (a, b), both close to sqrt(n), with a even and n <= a*b < n + a; (1, 1) for n <= 1."""
    if n <= 1:
        return 1, 1
    a = math.isqrt(n - 1) + 1
    a += a % 2
    return a, -(-n // a)


def _encipher(x: UInt64Array, a: UInt64Array, b: UInt64Array, keys: UInt64Array) -> UInt64Array:
    """One pass of the Feistel network over {0 … a*b-1}; `keys` is [B, ROUNDS], the others [B]."""
    left, right = x // b, x % b
    for i in range(0, ROUNDS, 2):
        left = (left + mix64(right ^ keys[:, i]) % a) % a
        right = (right + mix64(left ^ keys[:, i + 1]) % b) % b
    return left * b + right


def permute(x: Int64Array, sizes: Int64Array, a: Int64Array, b: Int64Array, keys: UInt64Array) -> Int64Array:
    """Apply keyed bijections, one per element: x[j] in {0 … sizes[j]-1} with its own factors and keys.

    Args:
        x: int64 [B], the elements.
        sizes: int64 [B], size n of each element's domain.
        a: int64 [B], first factor of each domain.
        b: int64 [B], second factor.
        keys: uint64 [B, ROUNDS], round keys.

    Returns:
        int64 [B], the images, each in {0 … sizes[j]-1}.
    """
    unsigned_sizes, ua, ub = sizes.astype(np.uint64), a.astype(np.uint64), b.astype(np.uint64)
    result = _encipher(x.astype(np.uint64), ua, ub, keys)
    outside = np.flatnonzero(result >= unsigned_sizes)
    while outside.size:
        result[outside] = _encipher(result[outside], ua[outside], ub[outside], keys[outside])
        outside = outside[result[outside] >= unsigned_sizes[outside]]
    return result.astype(np.int64)


def permutation(n: int, key: int) -> Int64Array:
    """Return the whole keyed bijection of {0 … n-1} as int64 [n]."""
    a, b = _factors(n)
    full = np.full(n, n, dtype=np.int64)
    keys = np.broadcast_to(round_keys(np.array([key], dtype=np.uint64)), (n, ROUNDS))
    return permute(np.arange(n, dtype=np.int64), full, np.full_like(full, a), np.full_like(full, b), keys)


def rank_slice(global_batch: int, rank: int, world: int) -> slice:
    """Return which part of a global batch a rank computes.

    The slices of all ranks partition {0 … global_batch-1} in rank order; sizes differ by at most one
    and lower ranks get the extra. A rank's slice may be empty when the world is larger than the batch.
    """
    assert 0 <= rank < world, f"rank {rank} of {world}"
    assert global_batch >= 0
    base, extra = divmod(global_batch, world)
    start = rank * base + min(rank, extra)
    return slice(start, start + base + (1 if rank < extra else 0))


@dataclass(frozen=True)
class _EpochTable:
    """One epoch's order in O(shards): everything indexed by permuted shard or by window."""

    shards: Int64Array  # [S] which shard stands at each place
    starts: Int64Array  # [S+1] samples before each place
    window_starts: Int64Array  # [W+1] samples before each window
    a: Int64Array  # [W] first factor of the window's domain
    b: Int64Array  # [W] second factor
    keys: UInt64Array  # [W, ROUNDS]


class Order:
    """The order of one split: stream position n -> (shard, member), with random access.

    Positions run for ever: epoch n // epoch_size has a permutation of its own.

    Args:
        samples_per_shard: Samples in each shard, in the order of the index; empty shards are allowed.
        seed: The stream's seed, in [0, 2^64).
        window_shards: How many shards are mixed with each other; more mixes better and reads more at once.

    Raises:
        UserError: No samples at all, or a seed or window out of range.
    """

    def __init__(self, samples_per_shard: Sequence[int], seed: int, window_shards: int) -> None:
        if not 0 <= seed < 1 << 64:
            raise UserError(f"seed: {seed} is outside [0, 2^64)")
        if window_shards < 1:
            raise UserError(f"window_shards: {window_shards} is not a positive number of shards")
        self._sizes = np.array(samples_per_shard, dtype=np.int64).reshape(-1)
        assert (self._sizes >= 0).all()
        self.epoch_size = int(self._sizes.sum())
        """Samples in one epoch."""
        if self.epoch_size == 0:
            raise UserError("the split holds no samples; build the data set with at least one picture in it")
        self._seed, self._window_shards = seed, window_shards
        self._table = functools.lru_cache(maxsize=_CACHED_EPOCHS)(self._build_table)

    def locate(self, positions: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Return the shard and the member within it at each stream position.

        Args:
            positions: int64 [B], each >= 0, in any order.

        Returns:
            Two int64 arrays [B]: shard number within the split's list, member number within the shard.
        """
        positions = np.asarray(positions, dtype=np.int64)
        assert positions.ndim == 1
        assert (positions >= 0).all(), "stream positions start at 0"
        shards, members = np.empty_like(positions), np.empty_like(positions)
        epochs = positions // self.epoch_size
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            within = positions[chosen] - epoch * self.epoch_size
            shards[chosen], members[chosen] = self._locate_within(self._table(int(epoch)), within)
        return shards, members

    def window_end(self, position: int) -> int:
        """Return the first stream position after the window that holds `position`.

        The members of one window lie in `window_shards` shards, so they are worth reading together.
        """
        epoch, within = divmod(position, self.epoch_size)
        starts = self._table(epoch).window_starts
        window = int(np.searchsorted(starts, within, side="right")) - 1
        return epoch * self.epoch_size + int(starts[window + 1])

    def _locate_within(self, table: _EpochTable, r: Int64Array) -> tuple[Int64Array, Int64Array]:
        # side="right" steps over empty windows and shards: of equal starts it takes the last.
        window = np.searchsorted(table.window_starts, r, side="right") - 1
        first = table.window_starts[window]
        size = table.window_starts[window + 1] - first
        g = first + permute(r - first, size, table.a[window], table.b[window], table.keys[window])
        place = np.searchsorted(table.starts, g, side="right") - 1
        return table.shards[place], g - table.starts[place]

    def _build_table(self, epoch: int) -> _EpochTable:
        shards = permutation(len(self._sizes), derive(self._seed, _SHARDS, epoch))
        starts = np.concatenate([[0], np.cumsum(self._sizes[shards])]).astype(np.int64)
        window_starts = np.append(starts[:-1][:: self._window_shards], starts[-1])
        factors = np.array([_factors(int(n)) for n in np.diff(window_starts)], dtype=np.int64)
        of_epoch = np.array([derive(self._seed, _MEMBERS, epoch)], dtype=np.uint64)
        keys = round_keys(_derive_further(of_epoch, np.arange(len(factors), dtype=np.uint64)))
        return _EpochTable(shards, starts, window_starts, factors[:, 0], factors[:, 1], keys)
