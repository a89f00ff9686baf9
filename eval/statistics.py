"""From pictures to the statistics every metric is made of, over one or several processes.

Pictures come in numbered chunks. Chunk c belongs to process c mod P; features are gathered and merged in
chunk order everywhere, so every process ends with the same statistics, and with the same bits as one
process alone.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eval.features import FEATURE_BATCH, FeatureNetwork
from eval.metrics.classifier_score import ClassifierScore, Score
from eval.moments import Moments, MomentSums
from eval.team import Team


@dataclass(frozen=True)
class Pictures:
    """One chunk of pictures.

    Attributes:
        images: [n, H, W, C] uint8.
        finite: [n] bool; False marks a picture whose network output was NaN or infinite.
    """

    images: NDArray[np.uint8]
    finite: NDArray[np.bool_]


class PictureSource(Protocol):
    """Numbered chunks of pictures, all of `chunk` pictures but the last."""

    def __call__(self, index: int) -> Pictures:
        """Return chunk `index`; asked for in increasing order, not for every number."""


@dataclass
class Stopwatch:
    """Seconds this process spent on making pictures and on their features."""

    pictures: float = 0.0
    features: float = 0.0


@dataclass(frozen=True)
class Statistics:
    """Statistics of N pictures.

    Attributes:
        moments: Of the pooled features.
        score: Classifier score.
        first: The first pictures, [keep, H, W, C] uint8.
        not_finite: How many pictures were not finite.
        seconds: Where this process's time went.
    """

    moments: Moments
    score: Score
    first: NDArray[np.uint8]
    not_finite: int
    seconds: Stopwatch = field(default_factory=Stopwatch)


@dataclass(frozen=True)
class _Block:
    """One chunk's numbers, padded to the chunk size so that processes can gather them."""

    pooled: Tensor
    probabilities: Tensor
    images: Tensor
    finite: Tensor


@dataclass(frozen=True)
class Job:
    """What to accumulate.

    Attributes:
        total: N, number of pictures.
        chunk: Pictures per chunk.
        shape: (H, W, C) of a picture.
        splits: Parts of the classifier score.
        keep: How many of the first pictures to return.
    """

    total: int
    chunk: int
    shape: tuple[int, int, int]
    splits: int = 1
    keep: int = 0

    def size_of(self, index: int) -> int:
        """Number of pictures in chunk `index`; 0 past the end."""
        return max(0, min(self.chunk, self.total - index * self.chunk))


def accumulate(
    team: Team,
    network: FeatureNetwork,
    source: PictureSource,
    job: Job,
    progress: Callable[[int], None] = lambda done: None,
) -> Statistics:
    """Run N pictures through a feature network; every process calls this alike.

    Args:
        team: The processes.
        network: Feature network, on this process's device.
        source: The pictures.
        job: How many, of which shape, and what to keep.
        progress: Told after each round how many pictures are done.

    Returns:
        The statistics, the same in every process.

    Raises:
        Stopped: The team was asked to stop.
    """
    moments = MomentSums(network.identity.dim)
    score = ClassifierScore(job.total, network.identity.classes, job.splits)
    first = np.empty((min(job.keep, job.total), *job.shape), dtype=np.uint8)
    not_finite, seconds = 0, Stopwatch()
    for base in range(0, -(-job.total // job.chunk), team.size):
        block = team.together(partial(_work, team, network, source, job, base + team.rank, seconds))
        pooled, probabilities = team.gather(block.pooled), team.gather(block.probabilities)
        finite = team.gather(block.finite)
        images = team.gather(block.images) if base * job.chunk < len(first) else None
        for member in range(team.size):
            index, start = base + member, member * job.chunk
            rows = slice(start, start + job.size_of(index))
            if rows.stop == rows.start:
                continue
            moments.add(pooled[rows])
            score.add(probabilities[rows])
            not_finite += int((~finite[rows]).sum())
            wanted = first[index * job.chunk : (index + 1) * job.chunk]
            if images is not None:
                wanted[:] = images[rows][: len(wanted)].numpy()
        progress(min((base + team.size) * job.chunk, job.total))
    return Statistics(moments.result(), score.result(), first, not_finite, seconds)


def _work(
    team: Team, network: FeatureNetwork, source: PictureSource, job: Job, index: int, seconds: Stopwatch
) -> _Block:
    """Get chunk `index` and its features; an empty block past the end."""
    block = _Block(
        pooled=torch.zeros(job.chunk, network.identity.dim),
        probabilities=torch.zeros(job.chunk, network.identity.classes),
        images=torch.zeros(job.chunk, *job.shape, dtype=torch.uint8),
        finite=torch.ones(job.chunk, dtype=torch.bool),
    )
    team.check_stop()
    count = job.size_of(index)
    if count == 0:
        return block
    began = time.monotonic()
    pictures = source(index)
    assert pictures.images.shape[1:] == job.shape, (pictures.images.shape, job.shape)
    assert len(pictures.images) >= count, (index, len(pictures.images), count)
    seconds.pictures += time.monotonic() - began
    began = time.monotonic()
    block.images[:count] = torch.from_numpy(pictures.images[:count])
    block.finite[:count] = torch.from_numpy(pictures.finite[:count])
    for start in range(0, count, FEATURE_BATCH):
        team.check_stop()
        rows = slice(start, min(start + FEATURE_BATCH, count))
        features = network(pictures.images[rows])
        block.pooled[rows], block.probabilities[rows] = features.pooled, features.probabilities
    seconds.features += time.monotonic() - began
    return block
