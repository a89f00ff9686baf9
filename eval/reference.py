"""Statistics of real pictures, by the same code path as those of generated ones."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.errors import StorageFault, UserError
from data_pipeline.index import LoadedIndex, load_index
from data_pipeline.progress import Progress
from data_pipeline.split_reader import read_split
from eval.features import FEATURE_BATCH, FeatureNetwork
from eval.protocol import ImageShape, PictureSet
from eval.reference_cache import PLACE_VARIABLE, ReferenceCache, ReferenceKey
from eval.statistics import Job, Pictures, Statistics, accumulate
from eval.team import Team

log = logging.getLogger(__name__)

REAL_CHUNK: Final = 128
"""Real pictures per chunk, whatever the protocol's own chunks: so equal sets have equal statistics."""


class RealPictures:
    """A split of a data set as a picture source: in index order, read once from front to back.

    Args:
        url: The data set.
        split: Name of the split.
        job: Shape, chunk size and number of the pictures wanted.
    """

    def __init__(self, url: str, split: str, job: Job) -> None:
        size, _, channels = job.shape
        self._batches: Iterator[NDArray[np.uint8]] = read_split(
            url, split, channels=channels, image_size=size, batch=job.chunk, limit=job.total
        )
        self._next = 0

    def __call__(self, index: int) -> Pictures:
        """Return chunk `index`; chunks before it are read and skipped."""
        assert index >= self._next, "real pictures are read from front to back"
        images = next(islice(self._batches, index - self._next, None))
        self._next = index + 1
        return Pictures(images, np.ones(len(images), dtype=np.bool_))


@dataclass(frozen=True)
class RealJob:
    """Real pictures to take statistics of.

    Attributes:
        url: The data set.
        split: Name of the split.
        shape: (H, W, C) that the pictures must have; None for whatever they have.
        limit: At most so many pictures, the first of the index; None for all.
        splits: Parts of the classifier score.
        spatial: Whether to take moments of spatial features, too.
        store: Whether to keep the features of all pictures.
    """

    url: str
    split: str
    shape: tuple[int, int, int] | None = None
    limit: int | None = None
    splits: int = 1
    spatial: bool = False
    store: bool = False


def real_statistics(
    team: Team, network: FeatureNetwork, wanted: RealJob, cache: ReferenceCache | None = None
) -> Statistics:
    """Take statistics of real pictures, or get them from the cache.

    Args:
        team: The processes; all call this alike.
        network: Feature network.
        wanted: Which pictures.
        cache: Where statistics that were taken before lie, and where these are left.

    Raises:
        UserError: The split is missing, has fewer than two pictures, or pictures of another shape.
        StorageFault: A shard or the cache cannot be read.
    """
    loaded = team.together(lambda: load_index(wanted.url))
    job = _job(wanted, loaded)
    key = ReferenceKey(
        features=network.identity,
        pictures=PictureSet(index_sha256=loaded.sha256, split=wanted.split),
        image=ImageShape(size=job.shape[0], channels=job.shape[2]),
        count=job.total,
        splits=job.splits,
        chunk=job.chunk,
        feature_batch=FEATURE_BATCH,
        spatial=job.spatial,
        store=job.store,
    )
    if cache is not None:
        there = team.together(lambda: cache.find(key))
        # Each node may have a cache of its own.
        if bool(team.gather(torch.tensor([there is not None])).all()) and there is not None:
            return team.together(lambda: cache.load(there, features=team.is_main and key.store))
    source = RealPictures(wanted.url, wanted.split, job)
    if team.is_main:
        with Progress(f"features of {wanted.split}", job.total, "img") as progress:
            found = accumulate(team, network, source, job, progress.update)
    else:
        found = accumulate(team, network, source, job)
    if cache is not None:
        team.on_main(lambda: _keep(cache, key, found))
    return found


def _keep(cache: ReferenceCache, key: ReferenceKey, found: Statistics) -> None:
    """Leave statistics in the cache; a place that cannot be written costs time the next time, no result."""
    try:
        cache.store(key, found)
    except (UserError, StorageFault) as error:
        log.warning("statistics not kept for the next time (set %s): %s", PLACE_VARIABLE, error)


def _job(wanted: RealJob, loaded: LoadedIndex) -> Job:
    available = loaded.samples(wanted.split)
    total = available if wanted.limit is None else min(available, wanted.limit)
    if total < 2:
        raise UserError(
            f"{wanted.url}: split {wanted.split!r} has {total} picture(s), statistics need two or more; "
            "build the data set with a larger --val-fraction or name another split in the recipe"
        )
    geometry = loaded.index.geometry
    return Job(
        total=total,
        chunk=REAL_CHUNK,
        shape=wanted.shape or (geometry.size, geometry.size, geometry.channels),
        splits=min(wanted.splits, total),
        spatial=wanted.spatial,
        store=wanted.store,
    )
