"""Everyone who makes features and moments of pictures, by the same network and the same resize."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.evaluation.clock import NetworkClock
from benchmarks.evaluation.job import Configuration
from benchmarks.evaluation.pictures import PictureSet
from benchmarks.harness import OURS
from benchmarks.peers import clean_fid, torch_fidelity
from benchmarks.peers.clean_fid import CLEAN_FID
from benchmarks.peers.torch_fidelity import TORCH_FIDELITY, Fidelity
from eval.features import FEATURE_BATCH
from eval.metrics.frechet import frechet_distance
from eval.moments import moments_of
from eval.statistics import Job, Statistics, accumulate
from eval.team import Team

PEERS: Final = (CLEAN_FID, TORCH_FIDELITY)
CHUNK: Final = 64
"""Pictures of a chunk of ours, the recipes' own number."""
_WORKERS: Final = (0, 1, 2)
_CLEAN_FID_BATCHES: Final = (FEATURE_BATCH, 32)  # ours, and its `compute_fid`'s default
_TORCH_FIDELITY_BATCHES: Final = (FEATURE_BATCH, 64)  # ours, and its default
OUR_CONFIGURATION: Final = Configuration(contender=OURS, name=OURS, workers=False, in_process=True)

Features = NDArray[np.float32]
"""[N, d], in the pictures' order."""


@dataclass(frozen=True)
class Contender:
    """Somebody in one configuration.

    Attributes:
        configuration: Who, and how it runs.
        moments: Makes features of pictures, and of them mean and covariance: what is timed.
        features: Makes the features alone: for the comparison before.
        distance: The Fréchet distance of two sets of pictures, asked for as one asks for it.
    """

    configuration: Configuration
    moments: Callable[[PictureSet], object]
    features: Callable[[PictureSet], Features]
    distance: Callable[[PictureSet, PictureSet], float]


def contenders(clock: NetworkClock, name: str, *, few: bool) -> list[Contender]:
    """Return ours, or a peer in every configuration that could be its best.

    Args:
        clock: Has the network and the resize.
        name: `OURS` or a peer's.
        few: With our batch only, and half of the ways.
    """
    if name == OURS:
        return [_ours(clock)]
    if name == CLEAN_FID.name:
        ways = [None, _WORKERS[-1]] if few else [None, *_WORKERS]
        batches = _CLEAN_FID_BATCHES[: 1 if few else None]
        return [_clean_fid(clock, workers, batch) for batch in batches for workers in ways]
    assert name == TORCH_FIDELITY.name, f"nobody is called {name}"
    return [
        _torch_fidelity(clock, in_dataset, workers, batch)
        for batch in _TORCH_FIDELITY_BATCHES[: 1 if few else None]
        for in_dataset, workers in ((False, False), (False, True), (True, False), (True, True))
        if not few or in_dataset is workers
    ]


def _ours(clock: NetworkClock) -> Contender:
    """Our `accumulate`; class probabilities, their score and the count of one-coloured pictures included."""
    team = Team()

    def made(pictures: PictureSet, *, store: bool = False) -> Statistics:
        job = Job(total=len(pictures.images), chunk=CHUNK, shape=pictures.images.shape[1:], store=store)
        return accumulate(team, clock.ours, pictures.chunks(CHUNK), job)

    def moments(pictures: PictureSet) -> object:
        found = made(pictures).moments
        return found.mean, found.covariance

    def features(pictures: PictureSet) -> Features:
        found = made(pictures, store=True).features
        assert found is not None, "it was asked for them"
        return found

    def distance(first: PictureSet, second: PictureSet) -> float:
        return frechet_distance(made(first).moments, made(second).moments)

    return Contender(OUR_CONFIGURATION, moments, features, distance)


def _clean_fid(clock: NetworkClock, workers: int | None, batch: int) -> Contender:
    """One of its configurations: a folder and so many workers, or a generator."""
    network, resize = clock.network, clock.resize

    def features(pictures: PictureSet) -> Features:
        if workers is None:
            return clean_fid.generator_features(pictures.images, network, resize, batch=batch)
        return clean_fid.folder_features(pictures.folder, network, resize, workers=workers, batch=batch)

    def moments(pictures: PictureSet) -> object:
        return clean_fid.moments(features(pictures))

    def distance(first: PictureSet, second: PictureSet) -> float:
        options: dict[str, Any] = {"workers": workers or 0, "batch": batch}
        return clean_fid.whole_call(first.folder, second.folder, network, resize, **options)

    how = "generator" if workers is None else f"folder, {workers} workers"
    name = f"{CLEAN_FID.name}, {how}, batch {batch}"
    configuration = Configuration(
        contender=CLEAN_FID.name, name=name, workers=bool(workers), in_process=not workers
    )
    return Contender(configuration, moments, features, distance)


def _torch_fidelity(clock: NetworkClock, in_dataset: bool, workers: bool, batch: int) -> Contender:
    """One of its configurations."""
    where, how = "data set" if in_dataset else "extractor", "4 workers" if workers else "0 workers"
    name = f"{TORCH_FIDELITY.name}, {where} resizes, {how}, batch {batch}"
    fidelity = Fidelity(
        f"{name}, {id(clock):x}",
        clock.network,
        in_extractor=None if in_dataset else clock.resize_batch,
        in_dataset=clock.resize if in_dataset else None,
        workers=workers,
        batch=batch,
    )

    def features(pictures: PictureSet) -> Features:
        found: Features = fidelity.features(pictures.images).numpy()
        return found

    def moments(pictures: PictureSet) -> object:
        return torch_fidelity.moments(fidelity.features(pictures.images))

    def distance(first: PictureSet, second: PictureSet) -> float:
        return fidelity.whole_call(first.images, second.images)

    configuration = Configuration(
        contender=TORCH_FIDELITY.name,
        name=name,
        workers=workers,
        in_process=not (workers and in_dataset),
    )
    return Contender(configuration, moments, features, distance)


def our_distance(first: Features, second: Features) -> float:
    """Our Fréchet distance of two sets of features, whoever made them."""
    a, b = (moments_of(torch.from_numpy(features)) for features in (first, second))
    return frechet_distance(a, b)
