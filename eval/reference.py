"""Statistics of real pictures: the reference set, computed once per protocol and kept beside its results."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Final

import numpy as np
import safetensors
import safetensors.torch
from numpy.typing import NDArray

from data_pipeline.errors import UserError
from data_pipeline.index import load_index
from data_pipeline.progress import Progress
from data_pipeline.split_reader import read_split
from eval.features import FeatureNetwork
from eval.moments import Moments
from eval.results import ResultBook
from eval.statistics import Job, Pictures, Statistics, accumulate
from eval.team import Team

REFERENCE_FILE: Final = "reference.safetensors"
_SCHEMA: Final = "reference/1"


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
        limit: At most so many pictures, the first of the index; None for all.
        splits: Parts of the classifier score.
    """

    url: str
    split: str
    limit: int | None = None
    splits: int = 1


def real_statistics(
    team: Team, network: FeatureNetwork, wanted: RealJob, *, chunk: int, shape: tuple[int, int, int]
) -> Statistics:
    """Take statistics of real pictures, by the same code path as those of generated ones.

    Args:
        team: The processes.
        network: Feature network.
        wanted: Which pictures.
        chunk: Pictures per chunk.
        shape: (H, W, C) of a picture.

    Raises:
        UserError: The split is missing, has fewer than two pictures, or pictures of another shape.
    """
    loaded = load_index(wanted.url)
    total = sum(entry.samples for entry in loaded.shards(wanted.split))
    total = total if wanted.limit is None else min(total, wanted.limit)
    if total < 2:
        raise UserError(
            f"{wanted.url}: split {wanted.split!r} has {total} picture(s), statistics need two or more; "
            "build the data set with a larger --val-fraction or name another split in the recipe"
        )
    job = Job(total, chunk, shape, splits=min(wanted.splits, total))
    source = RealPictures(wanted.url, wanted.split, job)
    if not team.is_main:
        return accumulate(team, network, source, job)
    with Progress(f"features of {wanted.split}", total, "img") as progress:
        return accumulate(team, network, source, job, progress.update)


def reference_moments(book: ResultBook, compute: Callable[[], Moments], team: Team) -> Moments:
    """Return the reference's moments, stored beside the protocol; computed by all if not there yet.

    Args:
        book: Results of the protocol.
        compute: Takes the moments, in every process.
        team: The processes.
    """
    if team.on_main(lambda: book.storage.exists(REFERENCE_FILE)):
        return team.together(lambda: _load(book))
    moments = compute()
    team.on_main(lambda: book.storage.create(REFERENCE_FILE, _dump(book, moments)))
    return moments


def _dump(book: ResultBook, moments: Moments) -> bytes:
    facts = {
        "schema": _SCHEMA,
        "features": book.protocol.features.sha256,
        "index": book.protocol.reference.index_sha256,
        "split": book.protocol.reference.split,
        "count": str(moments.count),
    }
    return safetensors.torch.save({"mean": moments.mean, "scatter": moments.scatter}, metadata=facts)


def _load(book: ResultBook) -> Moments:
    where = f"{book.url}/{REFERENCE_FILE}"
    data = book.storage.read(REFERENCE_FILE)
    try:
        tensors = safetensors.torch.load(data)
        # The header: its length as 8 bytes, then JSON.
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        facts = header["__metadata__"]
        moments = Moments(int(facts["count"]), tensors["mean"], tensors["scatter"])
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"{where}: damaged ({error}); delete it, it will be computed again") from error
    if facts.get("schema") != _SCHEMA:
        raise UserError(
            f"{where}: schema is {facts.get('schema')!r}, this version reads {_SCHEMA!r}; delete it"
        )
    return moments
