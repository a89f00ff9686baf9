"""One checkpoint under one protocol -> one result."""

import time
from dataclasses import dataclass
from typing import Any, Final

import torch

from data_pipeline.errors import UserError
from data_pipeline.index import load_index
from data_pipeline.progress import Progress
from eval.features import FEATURE_BATCH, FeatureChoice, FeatureNetwork, parse_choice
from eval.metrics.classifier_score import splits_for
from eval.metrics.frechet import frechet_distance
from eval.moments import Moments
from eval.protocol import ImageShape, PictureSet, Protocol
from eval.reference import RealJob, real_statistics, reference_moments
from eval.report.grid import png_bytes, sample_grid
from eval.results import HELD_OUT_FILE, Environment, HeldOut, Metric, Result, ResultBook
from eval.sampling import SamplerSettings, sample_chunk
from eval.statistics import Job, Pictures, Statistics, accumulate
from eval.team import Team
from trainer.recipe import Recipe
from trainer.run import CheckpointGoneError, Run
from trainer.weights import Loaded, load_for_inference

GRID_PICTURES: Final = 64
"""How many pictures the sample grid of a result shows: 8 x 8."""


@dataclass(frozen=True)
class Baseline:
    """What every checkpoint of a protocol is compared with."""

    reference: Moments
    held_out: HeldOut


def make_protocol(
    recipe: Recipe, spec_name: str, index_sha256: str, choice: FeatureChoice | None = None
) -> tuple[Protocol, FeatureChoice]:
    """Build the protocol of a specification in the recipe's `evaluation` section.

    Args:
        recipe: The run's recipe.
        spec_name: Name of the specification.
        index_sha256: Hash of the data set's `index.json`.
        choice: Feature network to use in place of the specification's.

    Returns:
        The protocol and the feature network it needs.

    Raises:
        UserError: No such specification, more steps than timesteps, or Inception without its file.
    """
    if spec_name not in recipe.evaluation:
        known = ", ".join(recipe.evaluation) or "none; add a section `evaluation` to the recipe"
        raise UserError(f"evaluation.{spec_name}: no such specification; known: {known}")
    spec = recipe.evaluation[spec_name]
    most = spec.sampler.most_steps(recipe.diffusion.num_timesteps)
    if spec.steps > most:
        raise UserError(
            f"evaluation.{spec_name}.steps={spec.steps}: with diffusion.num_timesteps="
            f"{recipe.diffusion.num_timesteps} {spec.sampler} can take {most}; lower it"
        )
    choice = choice or parse_choice(spec.features)
    profile: dict[str, Any] = {} if spec.ema == "raw" else recipe.ema[spec.ema].model_dump(mode="json")
    protocol = Protocol(
        spec=spec_name,
        features=choice.identity,
        reference=PictureSet(index_sha256=index_sha256, split=spec.reference_split),
        held_out=PictureSet(index_sha256=index_sha256, split=spec.held_out_split),
        samples=spec.samples,
        sampler=spec.sampler,
        steps=spec.steps,
        eta=spec.eta,
        ema=spec.ema,
        ema_profile=profile,
        seed=spec.seed,
        image=ImageShape(size=recipe.image.size, channels=recipe.image.channels),
        chunk=spec.chunk,
        feature_batch=FEATURE_BATCH,
        splits=splits_for(spec.samples),
    )
    return protocol, choice


def prepare(book: ResultBook, data_url: str, network: FeatureNetwork, team: Team) -> Baseline:
    """Get reference statistics and the held-out row: stored ones, or computed now and stored.

    Args:
        book: Results of the protocol.
        data_url: The run's data set.
        network: The protocol's feature network.
        team: The processes; all call this alike.

    Raises:
        UserError: The data set is missing, has changed, or lacks a split.
    """
    protocol = book.protocol
    team.on_main(lambda: _check_data(data_url, protocol))
    team.on_main(book.open)

    def reference() -> Moments:
        wanted = RealJob(data_url, protocol.reference.split)
        return real_statistics(team, network, wanted, chunk=protocol.chunk, shape=protocol.shape).moments

    moments = reference_moments(book, reference, team)
    held_out = team.on_main(book.held_out)
    if held_out is None:
        held_out = _held_out(protocol, data_url, moments, network, team)
        published = held_out
        team.on_main(lambda: book.storage.create(HELD_OUT_FILE, published.to_json()))
    return Baseline(moments, held_out)


def evaluate(
    run: Run, checkpoint: str, protocol: Protocol, network: FeatureNetwork, baseline: Baseline, team: Team
) -> tuple[Result, bytes]:
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

    Returns:
        The result, and its sample grid as PNG.

    Raises:
        Stopped: The team was asked to stop.
        CheckpointGoneError: Retention removed the checkpoint.
        StorageFault: Storage kept failing.
        UserError: The checkpoint lacks the protocol's weights.
    """
    began, retries = time.monotonic(), run.storage.retries
    loaded, manifest_sha256 = team.together(lambda: _load(run, checkpoint, protocol.ema, team.device))
    settings = SamplerSettings(protocol.sampler, protocol.steps, protocol.eta, protocol.seed, protocol.chunk)

    def draw(index: int) -> Pictures:
        return sample_chunk(loaded, index, settings, team.device, team.check_stop)

    job = Job(protocol.samples, protocol.chunk, protocol.shape, protocol.splits, GRID_PICTURES)
    if team.is_main:
        with Progress(f"evaluate {checkpoint}", protocol.samples, "img") as progress:
            statistics = accumulate(team, network, draw, job, progress.update)
    else:
        statistics = accumulate(team, network, draw, job)
    result = Result(
        checkpoint=checkpoint,
        images=loaded.manifest.images,
        attempt=loaded.manifest.attempt,
        manifest_sha256=manifest_sha256,
        protocol=protocol.directory,
        protocol_sha256=protocol.sha256,
        samples=protocol.samples,
        metrics=_metrics(protocol, statistics, baseline.reference),
        held_out=baseline.held_out.metrics,
        held_out_samples=baseline.held_out.samples,
        warnings=_warnings(statistics, baseline.reference),
        seconds=round(time.monotonic() - began, 3),
        seconds_sampling=round(statistics.seconds.pictures, 3),
        seconds_features=round(statistics.seconds.features, 3),
        storage_retries=run.storage.retries - retries,
        grid=f"{checkpoint}-samples.png",
        environment=Environment(
            torch=torch.__version__,
            device=str(team.device),
            processes=team.size,
            threads=torch.get_num_threads(),
        ),
    )
    return result, png_bytes(sample_grid(statistics.first))


def _load(run: Run, checkpoint: str, ema: str, device: torch.device) -> tuple[Loaded, str]:
    """Load the network and the hash of its manifest."""
    loaded = load_for_inference(run, checkpoint, ema=ema, device=device)
    try:
        return loaded, run.manifest_sha256(checkpoint)
    except FileNotFoundError as error:
        raise CheckpointGoneError(f"{run.url}: checkpoint {checkpoint} was removed meanwhile") from error


def _held_out(
    protocol: Protocol, data_url: str, reference: Moments, network: FeatureNetwork, team: Team
) -> HeldOut:
    """Score real held-out pictures as if they were samples."""
    began = time.monotonic()
    wanted = RealJob(data_url, protocol.held_out.split, protocol.samples, protocol.splits)
    statistics = real_statistics(team, network, wanted, chunk=protocol.chunk, shape=protocol.shape)
    count = statistics.moments.count
    warnings = _warnings(statistics, reference)
    if count < protocol.samples:
        warnings.append(
            f"only {count} held-out pictures exist for {protocol.samples} samples: "
            "the fewer pictures, the higher the distance"
        )
    return HeldOut(
        protocol_sha256=protocol.sha256,
        pictures=protocol.held_out,
        samples=count,
        requested=protocol.samples,
        metrics=_metrics(protocol, statistics, reference),
        warnings=warnings,
        seconds=round(time.monotonic() - began, 3),
    )


def _metrics(protocol: Protocol, statistics: Statistics, reference: Moments) -> dict[str, Metric]:
    score = statistics.score
    return {
        protocol.features.distance_name: Metric(value=frechet_distance(statistics.moments, reference)),
        protocol.features.score_name: Metric(
            value=score.mean, sd=score.sd if score.splits > 1 else None, splits=score.splits
        ),
    }


def _warnings(statistics: Statistics, reference: Moments) -> list[str]:
    dim = len(reference.mean)
    found = [
        f"{name}: {count} pictures for {dim} features: the covariance is rank-deficient and the distance "
        "biased high; compare equal counts only"
        for name, count in (("samples", statistics.moments.count), ("reference", reference.count))
        if count <= dim
    ]
    if statistics.not_finite:
        found.append(
            f"{statistics.not_finite} of {statistics.moments.count} samples are not finite "
            "(NaN or infinity); such pixels count as black or white"
        )
    return found


def _check_data(data_url: str, protocol: Protocol) -> None:
    found = load_index(data_url).sha256
    if found != protocol.reference.index_sha256:
        raise UserError(
            f"{data_url}: index.json has sha256 {found}, the run was evaluated against "
            f"{protocol.reference.index_sha256}; a data set must not change under its URL"
        )
