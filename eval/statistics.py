"""From pictures to the statistics every metric is made of, over one or several processes.

Pictures come in numbered chunks. Chunk c belongs to process c mod P; features are gathered and merged in
chunk order everywhere, so every process ends with the same statistics, and with the same bits as one
process alone.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
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
from eval.protocol import FeatureIdentity
from eval.spill import FeatureSpill, Float32Array
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
        score: Classifier score; None if the network has no classes.
        spatial: Moments of the spatial features; None unless the job asks for them.
        features: [N, d] float32, all pooled features; None unless the job asks for them, and outside the main
            process.
        first: The first pictures, [keep, H, W, C] uint8.
        not_finite: How many pictures were not finite.
        constant: How many pictures have one colour.
        seconds: Where this process's time went.
    """

    moments: Moments
    score: Score | None
    spatial: Moments | None
    features: Float32Array | None
    first: NDArray[np.uint8]
    not_finite: int
    constant: int
    seconds: Stopwatch = field(default_factory=Stopwatch)


@dataclass(frozen=True)
class Job:
    """What to accumulate.

    Attributes:
        total: N, number of pictures.
        chunk: Pictures per chunk.
        shape: (H, W, C) of a picture.
        splits: Parts of the classifier score.
        keep: How many of the first pictures to return.
        spatial: Whether to take moments of spatial features, which the network must have.
        store: Whether to keep the features of all pictures.
        overlap: Whether a thread computes the features of one chunk while the next one is made. The numbers
            are the same.
    """

    total: int
    chunk: int
    shape: tuple[int, int, int]
    splits: int = 1
    keep: int = 0
    spatial: bool = False
    store: bool = False
    overlap: bool = False

    def size_of(self, index: int) -> int:
        """Number of pictures in chunk `index`; 0 past the end."""
        return max(0, min(self.chunk, self.total - index * self.chunk))

    def rounds(self, processes: int) -> range:
        """Numbers of the first chunks of all rounds, in each of which every process takes one chunk."""
        return range(0, -(-self.total // self.chunk), processes)

    def members(self, base: int, processes: int) -> Iterator[tuple[int, slice]]:
        """Yield what of a round's gathered numbers is not padding: a process's place and its rows."""
        for member in range(processes):
            count = self.size_of(base + member)
            if count:
                yield member, slice(member * self.chunk, member * self.chunk + count)


@dataclass(frozen=True)
class _Block:
    """One chunk's numbers, padded to the chunk size so that processes can gather them."""

    images: Tensor
    finite: Tensor
    pooled: Tensor
    probabilities: Tensor
    spatial: Tensor


class _Sums:
    """What the chunks add up to, joined in chunk order."""

    def __init__(self, identity: FeatureIdentity, job: Job, *, store: bool) -> None:
        self._job = job
        self._moments = MomentSums(identity.dim)
        self._score = ClassifierScore(job.total, identity.classes, job.splits) if identity.classes else None
        self._spatial = MomentSums(identity.spatial or 0) if job.spatial else None
        self._spill = FeatureSpill(identity.dim) if store else None
        self._first = np.empty((min(job.keep, job.total), *job.shape), dtype=np.uint8)
        self._not_finite = self._constant = 0

    def add(self, team: Team, base: int, block: _Block) -> None:
        """Gather the chunks base, base + 1, … of all processes and add them."""
        images = team.gather(block.images) if base * self._job.chunk < len(self._first) else None
        finite, constant = team.gather(block.finite), team.gather(_one_colour(block.images))
        pooled = team.gather(block.pooled)
        probabilities = team.gather(block.probabilities) if self._score else None
        spatial = team.gather(block.spatial) if self._spatial else None
        for member, rows in self._job.members(base, team.size):
            index = base + member
            self._moments.add(pooled[rows])
            if self._score and probabilities is not None:
                self._score.add(probabilities[rows])
            if self._spatial and spatial is not None:
                self._spatial.add(spatial[rows])
            if self._spill:
                self._spill.add(pooled[rows])
            self._not_finite += int((~finite[rows]).sum())
            self._constant += int(constant[rows].sum())
            wanted = self._first[index * self._job.chunk : (index + 1) * self._job.chunk]
            if images is not None:
                wanted[:] = images[rows][: len(wanted)].numpy()

    def result(self, seconds: Stopwatch) -> Statistics:
        return Statistics(
            moments=self._moments.result(),
            score=self._score.result() if self._score else None,
            spatial=self._spatial.result() if self._spatial else None,
            features=self._spill.array() if self._spill else None,
            first=self._first,
            not_finite=self._not_finite,
            constant=self._constant,
            seconds=seconds,
        )


def accumulate(
    team: Team,
    network: FeatureNetwork,
    source: PictureSource,
    job: Job,
    progress: Callable[[int], None] = lambda done: None,
) -> Statistics:
    """Run N pictures through a feature network; every process calls this alike.

    Memory does not depend on N: features that are kept lie in a temporary file.

    Args:
        team: The processes.
        network: Feature network, on this process's device.
        source: The pictures.
        job: How many, of which shape, and what to keep.
        progress: Told after each round how many pictures are done.

    Returns:
        The statistics, the same in every process (but for `features`).

    Raises:
        Stopped: The team was asked to stop.
    """
    sums = _Sums(network.identity, job, store=job.store and team.is_main)
    seconds = Stopwatch()
    bases = job.rounds(team.size)
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(1, "features")) if job.overlap else None
        waiting: Callable[[], _Block] | None = None
        # A round draws its chunk, then finishes the one before: with a thread, both at once.
        for base in bases:
            drawn = team.together(partial(_draw, team, source, job, base + team.rank, seconds))
            if waiting is not None:
                sums.add(team, base - team.size, team.together(waiting))
                progress(min(base * job.chunk, job.total))
            work = partial(_extract, team, network, job, drawn, seconds)
            waiting = pool.submit(work).result if pool else work
        assert waiting is not None, "a job has at least one picture"
        sums.add(team, bases[-1], team.together(waiting))
        progress(job.total)
    return sums.result(seconds)


def _draw(team: Team, source: PictureSource, job: Job, index: int, seconds: Stopwatch) -> Pictures:
    """Get chunk `index`; no pictures past the end."""
    team.check_stop()
    count = job.size_of(index)
    if count == 0:
        return Pictures(np.empty((0, *job.shape), dtype=np.uint8), np.empty(0, dtype=np.bool_))
    began = time.monotonic()
    pictures = source(index)
    assert pictures.images.shape[1:] == job.shape, (pictures.images.shape, job.shape)
    assert len(pictures.images) >= count, (index, len(pictures.images), count)
    seconds.pictures += time.monotonic() - began
    return Pictures(pictures.images[:count], pictures.finite[:count])


def _extract(team: Team, network: FeatureNetwork, job: Job, pictures: Pictures, seconds: Stopwatch) -> _Block:
    """Compute the features of a chunk; of an empty one, nothing."""
    identity, count = network.identity, len(pictures.images)
    block = _Block(
        images=torch.empty(job.chunk, *job.shape, dtype=torch.uint8),
        finite=torch.ones(job.chunk, dtype=torch.bool),
        pooled=torch.empty(job.chunk, identity.dim),
        probabilities=torch.empty(job.chunk, identity.classes),
        spatial=torch.empty(job.chunk, (identity.spatial or 0) if job.spatial else 0),
    )
    for padded in (block.images, block.pooled, block.probabilities, block.spatial):
        padded[count:] = 0
    began = time.monotonic()
    block.images[:count] = torch.from_numpy(pictures.images)
    block.finite[:count] = torch.from_numpy(pictures.finite)
    for start in range(0, count, FEATURE_BATCH):
        team.check_stop()
        rows = slice(start, min(start + FEATURE_BATCH, count))
        features = network(pictures.images[rows])
        block.pooled[rows] = features.pooled
        if features.probabilities is not None:
            block.probabilities[rows] = features.probabilities
        if job.spatial:
            assert features.spatial is not None, (
                "the protocol asks for spatial features of such a network only"
            )
            block.spatial[rows] = features.spatial
    seconds.features += time.monotonic() - began
    return block


def _one_colour(images: Tensor) -> Tensor:
    """[n] bool: all pixels of the picture are equal."""
    return (images == images[:, :1, :1]).flatten(1).all(dim=1)
