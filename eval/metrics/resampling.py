"""Rows drawn by counter, and moments of what was drawn, by weights instead of copies."""

import math
from enum import IntEnum

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eval.metrics.blocks import Features, spans, widened
from eval.moments import Moments
from trainer.randomness import Purpose, bits


class Draws(IntEnum):
    """What rows are drawn for, so that no two uses share their numbers. Frozen: add, never renumber."""

    KERNEL_SAMPLES = 0
    KERNEL_REFERENCE = 1
    INFINITY = 2
    BOOTSTRAP = 3


_REPETITIONS = 2**24


def _words(seed: int, use: Draws, repetition: int, count: int) -> Tensor:
    """One 32-bit word for each of `count` places: int64 [count]."""
    assert 0 <= repetition < _REPETITIONS, repetition
    draw = int(use) * _REPETITIONS + repetition
    return bits(seed, Purpose.RESAMPLING, torch.arange(count), 1, draw)[:, 0]


def subset(seed: int, use: Draws, repetition: int, count: int, size: int) -> NDArray[np.int64]:
    """Draw `size` of `count` rows without replacement: those with the smallest random words.

    Args:
        seed: In [0, 2^64).
        use: What for.
        repetition: Number of the draw.
        count: Rows there are.
        size: Rows wanted, at most `count`.

    Returns:
        [size] increasing row numbers.
    """
    assert 0 <= size <= count, (size, count)
    if size == count:
        return np.arange(count)
    order = torch.sort(_words(seed, use, repetition, count), stable=True).indices
    rows: NDArray[np.int64] = np.sort(order[:size].numpy())
    return rows


def multiplicities(seed: int, use: Draws, repetition: int, count: int) -> NDArray[np.int64]:
    """Draw `count` of `count` rows with replacement (Efron 1979): how often each one came, [count].

    Draw i takes row floor(w_i * count / 2^32) of a random word w_i.
    """
    rows = (_words(seed, use, repetition, count) * count) >> 32
    return torch.bincount(rows, minlength=count).numpy()


def weighted_moments(features: Features, weights: NDArray[np.int64], centre: Tensor) -> Moments:
    """Moments of the set that holds row i of the features weights[i] times.

    Costs sum(weights > 0) d^2 operations and O(d^2) memory; rows of weight zero are not read.

    Args:
        features: [N, d].
        weights: [N], none negative, at least one positive.
        centre: [d] float64, a point near the mean, so that the scatter about it needs little correction.

    Returns:
        As `moments_of` of the copied rows, up to rounding.
    """
    count, dim = int(weights.sum()), features.shape[1]
    total = np.zeros(dim)
    scatter = np.zeros((dim, dim))
    chosen = np.flatnonzero(weights)
    for place in spans(len(chosen)):
        rows = chosen[place]
        root = np.sqrt(weights[rows].astype(np.float64))[:, None]
        x = root * (widened(features, rows) - centre).numpy()
        total += (root * x).sum(axis=0)
        scatter += x.T @ x  # numpy computes one triangle only
    step = total / math.sqrt(count)
    scatter -= np.outer(step, step)
    return Moments(count, centre + torch.from_numpy(total / count), torch.from_numpy(scatter))
