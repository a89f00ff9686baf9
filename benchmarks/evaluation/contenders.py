"""Everyone who makes features and moments of pictures, by the same network and the same resize."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.evaluation.clock import NetworkClock
from benchmarks.evaluation.pictures import PictureSet
from benchmarks.harness import OURS
from benchmarks.peers import clean_fid, torch_fidelity
from benchmarks.peers.clean_fid import CLEAN_FID
from benchmarks.peers.distribution import LibraryPeer
from benchmarks.peers.torch_fidelity import TORCH_FIDELITY, Fidelity
from eval.features import FEATURE_BATCH
from eval.metrics.frechet import frechet_distance
from eval.moments import moments_of
from eval.statistics import Job, accumulate
from eval.team import Team

PEERS: Final = (CLEAN_FID, TORCH_FIDELITY)
CHUNK: Final = 64
"""Pictures of a chunk of ours, the recipes' own number."""
_WORKERS: Final = (0, 1, 2)
_CLEAN_FID_BATCHES: Final = (FEATURE_BATCH, 32)  # ours, and its `compute_fid`'s default
_TORCH_FIDELITY_BATCHES: Final = (FEATURE_BATCH, 64)  # ours, and its default


@dataclass(frozen=True)
class Found:
    """What somebody made of a set of pictures.

    Attributes:
        features: [N, d] float32, in the pictures' order; None: not kept.
        mean: [d].
        covariance: [d, d] float64, divided by N - 1.
    """

    features: NDArray[np.float32] | None
    mean: NDArray[Any]
    covariance: NDArray[np.float64]


@dataclass(frozen=True)
class Contender:
    """Somebody in one configuration.

    Attributes:
        name: Who, and how it runs.
        peer: Whose code it is; None: ours.
        workers: Whether it starts worker processes.
        in_process: Whether the resize happens in this process, so that it is on the clock.
        moments: Makes features and moments of pictures: what is timed.
        features: Makes features and moments and keeps the features: for the comparison before.
        distance: The Fréchet distance of two sets of pictures, asked for as one asks for it.
    """

    name: str
    peer: LibraryPeer | None
    workers: bool
    in_process: bool
    moments: Callable[[PictureSet], Found]
    features: Callable[[PictureSet], Found]
    distance: Callable[[PictureSet, PictureSet], float]


def ours(clock: NetworkClock) -> Contender:
    """Our `accumulate`; class probabilities, their score and the count of one-coloured pictures included."""
    team = Team()

    def found(store: bool, pictures: PictureSet) -> Found:
        statistics = _accumulate(team, clock, pictures, store=store)
        moments = statistics.moments
        return Found(statistics.features, moments.mean.numpy(), moments.covariance.numpy())

    def distance(first: PictureSet, second: PictureSet) -> float:
        sets = [_accumulate(team, clock, pictures, store=False).moments for pictures in (first, second)]
        return frechet_distance(*sets)

    return Contender(OURS, None, False, True, partial(found, False), partial(found, True), distance)


def _accumulate(team: Team, clock: NetworkClock, pictures: PictureSet, *, store: bool) -> Any:
    job = Job(total=len(pictures.images), chunk=CHUNK, shape=pictures.images.shape[1:], store=store)
    return accumulate(team, clock.ours, pictures.chunks(CHUNK), job)


def candidates(clock: NetworkClock, peers: Sequence[LibraryPeer], *, few: bool) -> list[Contender]:
    """Return the peers in every configuration that could be their best.

    Args:
        clock: Has the network and the resize.
        peers: Those that are installed.
        few: With our batch only, and half of the ways.
    """
    found: list[Contender] = []
    if CLEAN_FID in peers:
        ways = [None, _WORKERS[-1]] if few else [None, *_WORKERS]
        for batch in _CLEAN_FID_BATCHES[: 1 if few else None]:
            found += [_clean_fid(clock, workers, batch) for workers in ways]
    if TORCH_FIDELITY in peers:
        for batch in _TORCH_FIDELITY_BATCHES[: 1 if few else None]:
            for in_dataset, workers in ((False, False), (False, True), (True, False), (True, True)):
                if not few or in_dataset is workers:
                    found.append(_torch_fidelity(clock, in_dataset, workers, batch))
    return found


def _clean_fid(clock: NetworkClock, workers: int | None, batch: int) -> Contender:
    """One of its configurations: a folder and so many workers, or a generator."""
    network, resize = clock.network, clock.resize

    def features(pictures: PictureSet) -> Found:
        if workers is None:
            found = clean_fid.generator_features(pictures.images, network, resize, batch=batch)
        else:
            found = clean_fid.folder_features(pictures.folder, network, resize, workers=workers, batch=batch)
        return Found(found, *clean_fid.moments(found))

    def distance(first: PictureSet, second: PictureSet) -> float:
        options: dict[str, Any] = {"workers": workers or 0, "batch": batch}
        return clean_fid.whole_call(first.folder, second.folder, network, resize, **options)

    how = "generator" if workers is None else f"folder, {workers} workers"
    name = f"{CLEAN_FID.name}, {how}, batch {batch}"
    return Contender(name, CLEAN_FID, bool(workers), not workers, features, features, distance)


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

    def features(pictures: PictureSet) -> Found:
        found = fidelity.features(pictures.images)
        return Found(found.numpy(), *torch_fidelity.moments(found))

    def distance(first: PictureSet, second: PictureSet) -> float:
        return fidelity.whole_call(first.images, second.images)

    in_process = not (workers and in_dataset)
    return Contender(name, TORCH_FIDELITY, workers, in_process, features, features, distance)


def our_distance(first: Found, second: Found) -> float:
    """Our Fréchet distance of two sets of features, whoever made them."""
    assert first.features is not None, "it was asked for them"
    assert second.features is not None, "it was asked for them"
    a, b = (moments_of(torch.from_numpy(each.features)) for each in (first, second))
    return frechet_distance(a, b)
