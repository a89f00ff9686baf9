"""One checkpoint under one protocol -> one result."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from data_pipeline.progress import Progress
from data_pipeline.split_reader import read_rows
from eval.baseline import Baseline
from eval.bits import BitsJob, SplitBits, bits_of_split
from eval.features import FeatureNetwork
from eval.measure import measure, warnings_of
from eval.metrics.neighbours import nearest
from eval.protocol import PictureSet, Protocol
from eval.report.grid import png_bytes, sample_grid
from eval.results import Environment, Metric, Result
from eval.sampling import SamplerSettings, sample_chunk
from eval.statistics import Job, Pictures, Statistics, accumulate
from eval.team import Team
from trainer.recipe_evaluation import MetricName
from trainer.run import CheckpointGoneError, Run
from trainer.weights import Loaded, load_for_inference

GRID_PICTURES: Final = 64
"""How many pictures the sample grid of a result shows: 8 x 8."""
PAIRS: Final = 16
"""How many samples are shown beside their nearest training pictures."""


@dataclass(frozen=True)
class Outcome:
    """A result and the files that are published before it.

    Attributes:
        result: The numbers.
        files: Content by name: the sample grid as PNG, nearest training pictures likewise, bits per
            dimension as JSON.
    """

    result: Result
    files: dict[str, bytes]


def evaluate(
    run: Run,
    checkpoint: str,
    protocol: Protocol,
    network: FeatureNetwork,
    baseline: Baseline,
    team: Team,
    keep: Callable[[int, Pictures], None] = lambda first, pictures: None,
) -> Outcome:
    """Evaluate one checkpoint; every process calls this alike. Pin the checkpoint first.

    On pictures unlike ImageNet's (digits!) distances and scores of `effnetlite0` prove that the machinery
    works; they do not measure quality.

    Args:
        run: The run.
        checkpoint: Name of the checkpoint.
        protocol: What to compute.
        network: Its feature network, on this process's device.
        baseline: Reference statistics and held-out row.
        team: The processes.
        keep: Given the number of the first picture of every chunk that this process draws, and the chunk.

    Returns:
        The result and its files.

    Raises:
        Stopped: The team was asked to stop.
        CheckpointGoneError: Retention removed the checkpoint.
        StorageFault: Storage kept failing.
        UserError: The checkpoint lacks the protocol's weights.
    """
    began, retries = time.monotonic(), run.storage.retries
    loaded, manifest_sha256 = team.together(lambda: _load(run, checkpoint, protocol.ema, team.device))
    statistics = draw_statistics(loaded, protocol, network, team, f"evaluate {checkpoint}", keep)
    numbers = team.on_main(
        lambda: measure(
            protocol, statistics, baseline.reference, baseline.held_out_distances, team.check_stop
        )
    )
    bits = _bits(loaded, protocol, team) if protocol.bits else {}
    for split, found in bits.items():
        numbers |= _bits_metrics(split, found)
    grid = f"{checkpoint}-samples.png"
    result = Result(
        checkpoint=checkpoint,
        images=loaded.manifest.images,
        attempt=loaded.manifest.attempt,
        manifest_sha256=manifest_sha256,
        protocol=protocol.directory,
        protocol_sha256=protocol.sha256,
        samples=protocol.samples,
        metrics=numbers,
        held_out=baseline.held_out.metrics,
        held_out_samples=baseline.held_out.samples,
        warnings=warnings_of(protocol, statistics, baseline.reference),
        seconds=round(time.monotonic() - began, 3),
        seconds_sampling=round(statistics.seconds.pictures, 3),
        seconds_features=round(statistics.seconds.features, 3),
        storage_retries=run.storage.retries - retries,
        grid=grid,
        environment=_environment(team),
    )
    files = {grid: png_bytes(sample_grid(statistics.first))}
    if protocol.measures(MetricName.NEIGHBOURS):
        files[f"{checkpoint}-neighbours.png"] = team.on_main(
            lambda: _neighbours_png(loaded.recipe.data.url, protocol, statistics, baseline)
        )
    files |= {f"{checkpoint}-bits-{split}.json": found.to_json() for split, found in bits.items()}
    return Outcome(result, files)


def _environment(team: Team) -> Environment:
    return Environment(
        torch=torch.__version__,
        device=str(team.device),
        processes=team.size,
        threads=torch.get_num_threads(),
    )


def draw_statistics(
    loaded: Loaded,
    protocol: Protocol,
    network: FeatureNetwork,
    team: Team,
    title: str,
    keep: Callable[[int, Pictures], None] = lambda first, pictures: None,
) -> Statistics:
    """Draw a protocol's samples from a loaded checkpoint, straight into their statistics.

    Args:
        loaded: Network and diffusion, on this process's device.
        protocol: How many, how, and which statistics.
        network: Its feature network.
        team: The processes; all call this alike.
        title: For the progress line.
        keep: See `evaluate`.
    """
    settings = SamplerSettings(protocol.sampler, protocol.steps, protocol.eta, protocol.seed, protocol.chunk)

    def draw(index: int) -> Pictures:
        pictures = sample_chunk(loaded, index, settings, team.device, team.check_stop)
        keep(index * protocol.chunk, pictures)
        return pictures

    job = Job(
        total=protocol.samples,
        chunk=protocol.chunk,
        shape=protocol.shape,
        splits=protocol.splits,
        keep=GRID_PICTURES,
        spatial=protocol.measures(MetricName.SPATIAL),
        store=protocol.stores_features,
        overlap=True,
    )
    if not team.is_main:
        return accumulate(team, network, draw, job)
    with Progress(title, protocol.samples, "img") as progress:
        return accumulate(team, network, draw, job, progress.update)


def _load(run: Run, checkpoint: str, ema: str, device: torch.device) -> tuple[Loaded, str]:
    """Load the network and the hash of its manifest."""
    loaded = load_for_inference(run, checkpoint, ema=ema, device=device)
    try:
        return loaded, run.manifest_sha256(checkpoint)
    except FileNotFoundError as error:
        raise CheckpointGoneError(f"{run.url}: checkpoint {checkpoint} was removed meanwhile") from error


def _bits(loaded: Loaded, protocol: Protocol, team: Team) -> dict[str, SplitBits]:
    """Bits per dimension of training and held-out pictures, by split."""
    assert protocol.bits is not None
    found = {}
    for pictures in _splits(protocol):
        job = BitsJob(
            url=loaded.recipe.data.url,
            split=pictures.split,
            images=protocol.bits.images,
            draws=protocol.bits.draws,
            seed=protocol.seed,
            chunk=protocol.chunk,
        )
        if team.is_main:
            with Progress(f"bits/dim of {pictures.split}", None, "img") as progress:
                found[pictures.split] = bits_of_split(team, loaded, job, progress.update)
        else:
            found[pictures.split] = bits_of_split(team, loaded, job)
    return found


def _neighbours_png(data_url: str, protocol: Protocol, statistics: Statistics, baseline: Baseline) -> bytes:
    """Those of the first samples that are nearest to a training picture, each beside it: four pairs a row."""
    assert statistics.features is not None
    assert baseline.reference.features is not None
    found = nearest(statistics.features[: len(statistics.first)], baseline.reference.features)
    closest = np.argsort(found.distance, kind="stable")[:PAIRS]
    size, _, channels = protocol.shape
    training = read_rows(
        data_url, protocol.reference.split, found.index[closest], channels=channels, image_size=size
    )
    pairs = np.stack((statistics.first[closest], training), axis=1)
    return png_bytes(sample_grid(pairs.reshape(-1, *protocol.shape), columns=8))


def _splits(protocol: Protocol) -> list[PictureSet]:
    pictures = {entry.split: entry for entry in (protocol.reference, protocol.held_out)}
    return list(pictures.values())


def _bits_metrics(split: str, found: SplitBits) -> dict[str, Metric]:
    return {
        f"bits/dim-{split}": Metric(value=found.mean, standard_error=found.standard_error),
        f"rate-{split}": Metric(value=found.rate),
        f"distortion-{split}": Metric(value=found.distortion),
        f"rmse-{split}": Metric(value=found.rmse),
    }
