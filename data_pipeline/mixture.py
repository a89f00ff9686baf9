"""Stream position -> (source, position within that source): several data sets mixed by weight.

Like the order of one data set (`order.py`) this is a pure function with random access, and a format: no
line that moves a number may change, and known-answer tests hold it. A better mixture gets another name.

The construction:

* The stream is divided into blocks of 1024 positions: block b holds [1024 b, 1024 (b+1)).
* Every block has the same number of places for a source, its share: 1024 divided in proportion to the
  weights by largest remainders. With q = 1024 * weight / sum of weights, in exact arithmetic on the
  weights' float64 values, a source gets floor(q); the places that are left go one each to the sources of
  largest q - floor(q), of equal ones to the earlier. So proportions are kept to 1/1024, exactly, in
  every block.
* Which source stands where in block b: the list that names each source as often as its share says, in
  order of the sources, read through the permutation of {0 … 1023} with key derive(seed, 3, b): at place
  i stands list[permutation(i)].
* A source's own stream is consumed in its own order without a gap: its position at a place of block b is
  b * share + the number of its places before this one in the block.
* Each source's order has a seed of its own, derive(seed, 4, source). A source that stands alone keeps the
  plain seed, and its positions are the stream's: a mixture of one equals no mixture.
"""

import functools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Final

import numpy as np
import numpy.typing as npt

from data_pipeline.errors import UserError
from data_pipeline.order import Int64Array, derive, permutation

BLOCK: Final = 1024
"""Positions of one block: within each, every source has exactly its share."""

_BLOCKS, _SEEDS = 3, 4  # what a key is for; `order` has 1 and 2
_CACHED_BLOCKS: Final = 1024  # 4 kB each; a rank of many meets a new one in every batch, for each source


def source_seed(seed: int, source: int, sources: int) -> int:
    """Return the seed of one source's order.

    Args:
        seed: The stream's, in [0, 2^64).
        source: Number of the source.
        sources: How many there are; one that stands alone keeps the stream's seed.
    """
    assert 0 <= source < sources, f"source {source} of {sources}"
    return seed if sources == 1 else derive(seed, _SEEDS, source)


class Mixture:
    """Which source each stream position takes from, and which position of that source's own endless stream.

    Args:
        weights: One for each source, positive; only their proportions matter.
        seed: The stream's seed, in [0, 2^64).

    Raises:
        UserError: No sources or more than `BLOCK`, a weight that is not positive and finite, or so small
            beside the others that its source would never come; or a seed out of range.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        if not 0 <= seed < 1 << 64:
            raise UserError(f"seed: {seed} is outside [0, 2^64)")
        self.shares = _shares(weights)
        """Places of each source in every block, by largest remainders; their sum is `BLOCK`."""
        self._seed = seed
        self._share_of = np.array(self.shares, dtype=np.int64)
        self._block = functools.lru_cache(maxsize=_CACHED_BLOCKS)(self._build_block)

    def split(self, positions: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Return the source at each stream position, and the position within its own stream.

        Args:
            positions: int64 [B], each >= 0, in any order.

        Returns:
            Two int64 arrays [B]: number of the source, position within that source.
        """
        positions = np.asarray(positions, dtype=np.int64)
        assert positions.ndim == 1
        assert (positions >= 0).all(), "stream positions start at 0"
        sources = np.zeros_like(positions)
        if len(self.shares) == 1:
            return sources, positions.copy()
        before = np.empty_like(positions)
        blocks, places = np.divmod(positions, BLOCK)
        distinct, numbers = np.unique(blocks, return_inverse=True)
        order = np.argsort(numbers, kind="stable")  # brings the positions of one block together
        bounds = np.searchsorted(numbers[order], np.arange(len(distinct) + 1))
        for i, block in enumerate(distinct.tolist()):
            chosen = order[bounds[i] : bounds[i + 1]]
            sources[chosen], before[chosen] = self._block(block)[:, places[chosen]]
        return sources, blocks * self._share_of[sources] + before

    def consumed(self, position: int) -> tuple[int, ...]:
        """Return how many positions of each source lie before a stream position: each source's own cursor."""
        assert position >= 0, "stream positions start at 0"
        if len(self.shares) == 1:
            return (position,)
        block, place = divmod(position, BLOCK)
        within = np.bincount(self._block(block)[0, :place], minlength=len(self.shares))
        return tuple(block * share + count for share, count in zip(self.shares, within.tolist(), strict=True))

    def _build_block(self, block: int) -> npt.NDArray[np.int16]:
        """Return int16 [2, BLOCK]: the source at each place, and how many of its places lie before."""
        named = np.repeat(np.arange(len(self.shares)), self._share_of)
        sources = named[permutation(BLOCK, derive(self._seed, _BLOCKS, block))]
        # Sorted by source, in order within each, the places are numbered like `named` from its runs' starts.
        starts = np.cumsum(self._share_of) - self._share_of
        before = np.empty(BLOCK, dtype=np.int64)
        before[np.argsort(sources, kind="stable")] = np.arange(BLOCK) - starts[named]
        return np.stack([sources, before]).astype(np.int16)


def _shares(weights: Sequence[float]) -> tuple[int, ...]:
    """Divide a block's places among the sources by largest remainders, ties to the earlier source."""
    if not 1 <= len(weights) <= BLOCK:
        raise UserError(f"weights: {len(weights)} sources; a mixture takes 1 to {BLOCK}")
    for source, weight in enumerate(weights):
        if not (math.isfinite(weight) and weight > 0):
            raise UserError(f"weights: {weight} of source {source} is not a positive, finite number")
    exact = [Fraction(weight) for weight in weights]
    total = sum(exact)
    quotas = [BLOCK * weight / total for weight in exact]
    shares = [math.floor(quota) for quota in quotas]
    remainders = [quota - share for quota, share in zip(quotas, shares, strict=True)]
    by_remainder = sorted(range(len(quotas)), key=lambda source: -remainders[source])  # stable: ties in order
    for source in by_remainder[: BLOCK - sum(shares)]:
        shares[source] += 1
    if 0 in shares:
        source = shares.index(0)
        raise UserError(
            f"weights: {weights[source]} of source {source} is too small beside the others for one place in "
            f"{BLOCK}; raise it or leave the source out"
        )
    return tuple(shares)
