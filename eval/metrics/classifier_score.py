"""Inception-style score of class probabilities, streamed: exp(E_x KL(p(y|x) || p(y))).

Salimans et al. 2016, section 4. The pictures are split by index into equal parts (OpenAI's code: 10 parts of
50,000), the score is taken in each, and their mean and standard deviation are reported. A part's estimate is
biased low when it holds few pictures, so the number of parts is stated with the result.
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

OPENAI_SPLITS: Final = 10
"""Parts of the original score."""
_MIN_PER_SPLIT: Final = 500


def splits_for(samples: int) -> int:
    """Number of parts used for N pictures: OpenAI's 10 if each holds at least 500, else one."""
    return OPENAI_SPLITS if samples >= OPENAI_SPLITS * _MIN_PER_SPLIT else 1


@dataclass(frozen=True)
class Score:
    """Mean and standard deviation of the score over `splits` parts (sd over parts, 0 for one part)."""

    mean: float
    sd: float
    splits: int


class ClassifierScore:
    """Running sums for the score of exactly N pictures, added in index order.

    Args:
        samples: N, the number of pictures that will be added.
        classes: k.
        splits: Number of parts; part j holds pictures floor(j N / splits) up to, not including,
            floor((j + 1) N / splits), as in OpenAI's code and torch-fidelity's.
    """

    def __init__(self, samples: int, classes: int, splits: int) -> None:
        assert 1 <= splits <= samples, (samples, splits)
        self._samples, self._splits, self._added = samples, splits, 0
        self._p = torch.zeros(splits, classes, dtype=torch.float64)
        self._p_log_p = torch.zeros(splits, dtype=torch.float64)
        self._count = torch.zeros(splits, dtype=torch.float64)

    def add(self, probabilities: Tensor) -> None:
        """Add the next b pictures' p(y|x): [b, k], rows sum to 1."""
        p = probabilities.to(torch.float64)
        index = torch.arange(self._added, self._added + len(p))
        assert self._added + len(p) <= self._samples, "more pictures than announced"
        # The largest j with floor(j N / splits) <= i.
        part = ((index + 1) * self._splits - 1) // self._samples
        belongs = (part == torch.arange(self._splits)[:, None]).to(torch.float64)
        self._p += belongs @ p
        self._p_log_p += belongs @ torch.special.xlogy(p, p).sum(dim=1)
        self._count += belongs.sum(dim=1)
        self._added += len(p)

    def result(self) -> Score:
        """Score of the pictures; all N must have been added.

        Uses E KL(p(y|x) || p(y)) = E sum p(y|x) log p(y|x) - sum p(y) log p(y).
        """
        assert self._added == self._samples, f"{self._added} of {self._samples} pictures added"
        marginal = self._p / self._count[:, None]
        divergence = self._p_log_p / self._count - torch.special.xlogy(marginal, marginal).sum(dim=1)
        scores = divergence.exp()
        return Score(float(scores.mean()), float(scores.std(correction=0)), self._splits)
