"""How training chooses timesteps: uniformly, stratified over the batch, or by the losses seen so far.

All draws turn a sample's own 32-bit random word into its timestep in integer arithmetic, so that every
device and every number of processes gives a sample the same one. Nothing here communicates.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import torch
from torch import Tensor

_WORDS: Final = 2**32
_CUMULATIVE: Final = "proposal.cumulative"
_COUNTS: Final = "histogram.counts"
_SQUARES: Final = "histogram.squares"


class TimestepKind(StrEnum):
    """How a training sample gets its timestep."""

    UNIFORM = "uniform"  # independently (Ho et al. 2020, algorithm 1)
    STRATIFIED = "stratified"  # the samples of a batch share [0, T) evenly
    LOSS_AWARE = "loss-aware"  # p(t) ~ sqrt(E[L_t^2]) (Nichol & Dhariwal 2021, eq. 18)


def stratified(words: Tensor, n: Tensor, batch: int, num_timesteps: int) -> Tensor:
    """Timesteps of which each batch has one in every stratum.

    Sample n falls into stratum n mod B of B equal parts of [0, T): t = floor((n mod B + u) T / B) with
    u = word / 2^32. Over a batch of B consecutive samples each timestep is expected B / T times.

    Args:
        words: int64 [b] random words of the samples, in [0, 2^32).
        n: int64 [b] stream positions of the samples, not negative.
        batch: B, the size of the global batch.
        num_timesteps: T.

    Returns:
        int64 [b] on words' device, in [0, T).

    Raises:
        ValueError: If B or T is below 1, their product is 2^31 or more, or the shapes differ.
    """
    if batch < 1 or num_timesteps < 1 or batch * num_timesteps >= 2**31:
        raise ValueError(
            f"batch and num_timesteps must be at least 1 and their product below 2^31, got {batch} and "
            f"{num_timesteps}"
        )
    _check_int64("words", words)
    if n.dtype != torch.int64 or n.shape != words.shape:
        raise ValueError(f"n must be int64 {list(words.shape)} like words, got {n.dtype} {list(n.shape)}")
    # (n mod B) 2^32 + word < B 2^32, times T < 2^63.
    return ((n % batch) * _WORDS + words) * num_timesteps // (batch * _WORDS)


@dataclass(frozen=True, eq=False)
class Proposal:
    """A distribution p over the timesteps, in units of 2^-32.

    Attributes:
        cumulative: int64 [T], strictly increasing from above 0 to 2^32: how many of the 2^32 words lead to
            timesteps up to and including t.

    Raises:
        ValueError: At construction, if the table is no such distribution.
    """

    cumulative: Tensor

    def __post_init__(self) -> None:
        table = self.cumulative
        if table.dtype != torch.int64 or table.ndim != 1 or len(table) == 0:
            raise ValueError(f"cumulative must be int64 [T], got {table.dtype} {list(table.shape)}")
        if int(table[-1]) != _WORDS or not bool((self._shares() > 0).all()):
            raise ValueError("cumulative must increase strictly from above 0 to 2^32")

    @classmethod
    def uniform(cls, num_timesteps: int, device: torch.device | str = "cpu") -> "Proposal":
        """All timesteps alike: the words lead to floor(word T / 2^32).

        Args:
            num_timesteps: T, in [1, 2^31).
            device: Where the table is kept.

        Returns:
            The distribution.

        Raises:
            ValueError: If T is out of range.
        """
        if not 1 <= num_timesteps < 2**31:
            raise ValueError(f"num_timesteps must lie in [1, 2^31), got {num_timesteps}")
        upper = torch.arange(1, num_timesteps + 1, dtype=torch.int64, device=device)
        return cls((upper * _WORDS + num_timesteps - 1) // num_timesteps)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], device: torch.device | str = "cpu") -> "Proposal":
        """Reads what `tensors` gave; other entries are let be.

        Args:
            tensors: Named tensors.
            device: Where the table is kept.

        Returns:
            The distribution.

        Raises:
            ValueError: If the entry is missing or no distribution.
        """
        return cls(_entry(tensors, _CUMULATIVE).to(device))

    def tensors(self) -> dict[str, Tensor]:
        """The distribution as named tensors for a checkpoint."""
        return {_CUMULATIVE: self.cumulative}

    @property
    def num_timesteps(self) -> int:
        """T, the number of timesteps."""
        return len(self.cumulative)

    def draw(self, words: Tensor) -> Tensor:
        """F^-1: the timestep each random word leads to.

        Args:
            words: int64 [b] in [0, 2^32), on the table's device.

        Returns:
            int64 [b] in [0, T).

        Raises:
            ValueError: If the words are not int64 [b].
        """
        _check_int64("words", words)
        return torch.searchsorted(self.cumulative, words, right=True)

    def weights(self, t: Tensor) -> Tensor:
        """Importance weights 1 / (T p(t)): the weighted losses have the mean of uniform timesteps.

        Args:
            t: int64 [b] timesteps drawn from this distribution.

        Returns:
            float32 [b].
        """
        share = self._shares().index_select(0, t).double()
        return (_WORDS / (self.num_timesteps * share)).float()

    def _shares(self) -> Tensor:
        """p(t) 2^32: int64 [T]."""
        return torch.diff(self.cumulative, prepend=torch.zeros_like(self.cumulative[:1]))


class LossHistogram:
    """Sums of squared losses by timestep, in fixed point.

    Integer sums do not depend on the order of their terms, so neither on the order of samples nor on how
    they are spread over ranks. A loss above 32 counts as 32 (or one diverging sample would own the
    distribution), one below 1e-5 as nothing, one that is not finite is passed over. A timestep has room for
    2 million losses of 32, or 2 billion of 1; sums that would grow beyond that stay there.

    Args:
        num_timesteps: T.
        device: Where the sums are kept.

    Attributes:
        counts: int64 [T], samples seen, in units of 2^-20.
        squares: int64 [T], sums of their squared losses, in units of 2^-32.
    """

    _COUNT_BITS: Final = 20
    _SQUARE_BITS: Final = 32
    _LARGEST: Final = 32.0

    def __init__(self, num_timesteps: int, device: torch.device | str = "cpu") -> None:
        self.counts = torch.zeros(num_timesteps, dtype=torch.int64, device=device)
        self.squares = torch.zeros(num_timesteps, dtype=torch.int64, device=device)

    def add(self, t: Tensor, losses: Tensor) -> None:
        """Counts the losses of samples.

        Args:
            t: int64 [b] timesteps.
            losses: float32 [b] losses, not weighted by `Proposal.weights`.

        Raises:
            ValueError: If the shapes differ.
        """
        _check_int64("t", t)
        if losses.shape != t.shape:
            raise ValueError(f"losses have shape {list(losses.shape)}, t {list(t.shape)}")
        values = losses.detach().double()
        finite = torch.isfinite(values)
        values = torch.where(finite, values, torch.zeros_like(values)).clamp(-self._LARGEST, self._LARGEST)
        # The square of a float32 is exact in float64, and so rounded once, the same way everywhere.
        squares = (values.square() * 2.0**self._SQUARE_BITS).round().long()
        self.counts.index_add_(0, t, finite.long() << self._COUNT_BITS)
        self.squares.index_add_(0, t, squares)

    def tensors(self) -> dict[str, Tensor]:
        """The sums as named tensors, for a checkpoint or to be summed over ranks; they go on changing."""
        return {_COUNTS: self.counts, _SQUARES: self.squares}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts sums in the place of these; other entries are let be.

        Args:
            tensors: As `tensors` gave them, on any device.

        Raises:
            ValueError: If an entry is missing or of another kind or length.
        """
        self.reset()
        self.add_counts(tensors)

    def add_counts(self, tensors: Mapping[str, Tensor]) -> None:
        """Adds the sums of another histogram.

        Args:
            tensors: As its `tensors` gave them, on any device.

        Raises:
            ValueError: If an entry is missing or of another kind or length.
        """
        for name, mine in self.tensors().items():
            theirs = _entry(tensors, name)
            if theirs.dtype != torch.int64 or theirs.shape != mine.shape:
                raise ValueError(
                    f"{name} must be int64 {list(mine.shape)}, got {theirs.dtype} {list(theirs.shape)}"
                )
            mine += theirs.to(mine.device)
            # Two sums, neither negative, that overflow give a negative one.
            mine.masked_fill_(mine < 0, torch.iinfo(torch.int64).max)

    def reset(self) -> None:
        """Forgets everything."""
        self.counts.zero_()
        self.squares.zero_()

    def halve(self) -> None:
        """Halves the weight of all that was seen so far.

        Done on the sums over all ranks: halves of odd numbers are rounded, so that the sum of halves may
        differ from half the sum.
        """
        self.counts >>= 1
        self.squares >>= 1

    def proposal(self, uniform_share: float = 0.001) -> Proposal:
        """p(t) ~ sqrt(E[L_t^2]) (Nichol & Dhariwal 2021, eq. 18), mixed with a little of the uniform one.

        A timestep not seen yet is given the mean of the others. The table is the same on every machine:
        nothing but correctly rounded operations goes into it.

        Args:
            uniform_share: Share of the uniform distribution, in (0, 1]; keeps each weight below
                1 / uniform_share.

        Returns:
            The distribution, on this histogram's device.

        Raises:
            ValueError: If the share is out of range, or the sums have overflowed.
        """
        if not 0.0 < uniform_share <= 1.0:
            raise ValueError(f"uniform_share must lie in (0, 1], got {uniform_share}")
        counts, squares = self.counts.tolist(), self.squares.tolist()
        if min(squares) < 0 or min(counts) < 0:
            raise ValueError("the sums of squared losses have overflowed: freeze a distribution more often")
        total = len(counts)
        pairs = zip(squares, counts, strict=True)
        seen = [math.sqrt(square / count) if count else None for square, count in pairs]
        known = [root for root in seen if root is not None]
        mean = math.fsum(known) / len(known) if known else 1.0
        roots = [mean if root is None else root for root in seen]
        norm = math.fsum(roots)
        if norm == 0.0:
            roots, norm = [1.0] * total, float(total)
        # Each timestep gets a word of its own first, the rest is shared out in proportion; what rounding
        # down leaves over, fewer than T words, goes one each to the first ones.
        free = _WORDS - total
        shares = [
            1 + int(free * ((1.0 - uniform_share) * root / norm + uniform_share / total)) for root in roots
        ]
        left = _WORDS - sum(shares)
        assert 0 <= left <= total, left
        shares = [share + (index < left) for index, share in enumerate(shares)]
        table = torch.tensor(shares, dtype=torch.int64).cumsum(0)
        return Proposal(table.to(self.counts.device))


def _check_int64(name: str, x: Tensor) -> None:
    if x.dtype != torch.int64 or x.ndim != 1:
        raise ValueError(f"{name} must be int64 of shape [b], got {x.dtype} {list(x.shape)}")


def _entry(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise ValueError(f"{name} is missing; there are {', '.join(sorted(tensors)) or 'no entries'}")
    return tensors[name]
