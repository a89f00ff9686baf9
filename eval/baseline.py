"""What every checkpoint of a protocol is compared with: the reference, and real held-out pictures."""

import time
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import UserError
from data_pipeline.index import load_index
from eval.features import FeatureNetwork
from eval.imported import FileChoice, load_statistics
from eval.measure import LEAST_PICTURES, MANIFOLD, Reference, measure, warnings_of
from eval.metrics.manifold import radii as neighbourhood_radii
from eval.metrics.neighbours import nearest
from eval.moments_file import dump_moments, load_moments
from eval.protocol import Protocol
from eval.reference import RealJob, real_statistics
from eval.reference_cache import ReferenceCache
from eval.results import HELD_OUT_FILE, HeldOut, ResultBook
from eval.statistics import Statistics
from eval.team import Team
from trainer.recipe_evaluation import MetricName

REFERENCE_FILE: Final = "reference.safetensors"


@dataclass(frozen=True)
class Baseline:
    """What every checkpoint of a protocol is compared with.

    Attributes:
        reference: Statistics of the reference pictures.
        held_out: The row of real held-out pictures.
        held_out_distances: [n] float64, from these to their nearest reference pictures in feature space; None
            unless a metric needs them, and outside the main process.
    """

    reference: Reference
    held_out: HeldOut
    held_out_distances: NDArray[np.float64] | None = None


def prepare(
    book: ResultBook,
    data_url: str,
    network: FeatureNetwork,
    team: Team,
    cache: ReferenceCache,
    file: FileChoice | None = None,
) -> Baseline:
    """Get reference statistics and the held-out row: stored ones, or computed now and stored.

    Args:
        book: Results of the protocol.
        data_url: The run's data set.
        network: The protocol's feature network.
        team: The processes; all call this alike.
        cache: Statistics of real pictures that were taken before.
        file: Published statistics that stand for the reference pictures.

    Raises:
        UserError: The data set or the file is missing, has changed, or lacks a split.
    """
    protocol = book.protocol
    team.on_main(lambda: _check_data(data_url, protocol))
    team.on_main(book.open)
    reference = _reference(book, data_url, network, team, cache, file)
    _check_counts(protocol, reference, data_url)
    held_out, radii = None, None
    if protocol.measures(MetricName.HELD_OUT):
        every = RealJob(data_url, protocol.held_out.split, protocol.shape)
        held_out = real_statistics(team, network, every, cache).moments
    if protocol.measures(MetricName.MANIFOLD) and reference.features is not None:
        radii = neighbourhood_radii(reference.features, MANIFOLD)
    reference = replace(reference, radii=radii)
    compared = replace(reference, held_out=held_out)
    row = team.on_main(book.held_out)
    if row is not None and not protocol.measures(MetricName.NEIGHBOURS):
        return Baseline(compared, row)
    began = time.monotonic()
    statistics = real_statistics(
        team,
        network,
        RealJob(
            data_url,
            protocol.held_out.split,
            protocol.shape,
            limit=protocol.samples,
            splits=protocol.splits,
            spatial=protocol.measures(MetricName.SPATIAL),
            store=protocol.stores_features,
        ),
        cache,
    )
    if row is None:
        row = team.on_main(lambda: _held_out(protocol, statistics, reference, time.monotonic() - began))
        published = row
        team.on_main(lambda: book.storage.create(HELD_OUT_FILE, published.to_json()))
    return Baseline(compared, row, _distances(protocol, statistics, reference))


def _reference(
    book: ResultBook,
    data_url: str,
    network: FeatureNetwork,
    team: Team,
    cache: ReferenceCache,
    file: FileChoice | None,
) -> Reference:
    """Read the statistics beside the protocol, or take them and leave them there."""
    protocol = book.protocol
    stored = team.on_main(lambda: book.storage.exists(REFERENCE_FILE))
    if stored and not protocol.stores_reference:
        where = f"{book.url}/{REFERENCE_FILE}"
        moments, spatial = team.together(lambda: load_moments(book.storage.read(REFERENCE_FILE), where))
        return Reference(moments, spatial)
    reference = take_reference(protocol, data_url, network, team, cache, file)
    facts = (
        {"file": file.identity.sha256, "kind": file.identity.kind}
        if file is not None
        else {"index": protocol.reference.index_sha256, "split": protocol.reference.split}
    )
    facts["features"] = protocol.features.sha256

    def publish() -> None:
        if not stored:
            book.storage.create(REFERENCE_FILE, dump_moments(reference.moments, reference.spatial, facts))

    team.on_main(publish)
    return reference


def take_reference(
    protocol: Protocol,
    data_url: str,
    network: FeatureNetwork,
    team: Team,
    cache: ReferenceCache,
    file: FileChoice | None,
) -> Reference:
    """Get a protocol's reference statistics from the file, the cache or the pictures.

    Raises:
        UserError: The data set or the file is missing or does not fit.
    """
    if file is not None:
        read = team.together(lambda: load_statistics(file, network.identity))
        return Reference(read.moments, read.spatial)
    wanted = RealJob(
        data_url,
        protocol.reference.split,
        protocol.shape,
        spatial=protocol.measures(MetricName.SPATIAL),
        store=protocol.stores_reference,
    )
    taken = real_statistics(team, network, wanted, cache)
    return Reference(taken.moments, taken.spatial, taken.features)


def _held_out(protocol: Protocol, statistics: Statistics, reference: Reference, seconds: float) -> HeldOut:
    """Score real held-out pictures as if they were samples."""
    count = statistics.moments.count
    warnings = warnings_of(protocol, statistics, reference)
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
        metrics=measure(protocol, statistics, reference),
        warnings=warnings,
        seconds=round(seconds, 3),
    )


def _distances(
    protocol: Protocol, statistics: Statistics, reference: Reference
) -> NDArray[np.float64] | None:
    if not protocol.measures(MetricName.NEIGHBOURS):
        return None
    if statistics.features is None or reference.features is None:  # not in this process
        return None
    return nearest(statistics.features, reference.features).distance


def _check_counts(protocol: Protocol, reference: Reference, data_url: str) -> None:
    """Refuse metrics that need more reference pictures than there are."""
    for metric in (MetricName.KERNEL, MetricName.MANIFOLD):
        least = LEAST_PICTURES[metric]
        if protocol.measures(metric) and reference.moments.count < least:
            raise UserError(
                f"{data_url}: split {protocol.reference.split!r} has {reference.moments.count} pictures, "
                f"`{metric}` needs {least}; leave it out of evaluation.{protocol.spec}.metrics"
            )
    if protocol.measures(MetricName.SPATIAL) and reference.spatial is None:
        raise UserError(
            f"evaluation.{protocol.spec}.reference_file: holds no mu_s and sigma_s; "
            "leave `spatial` out of its metrics"
        )


def _check_data(data_url: str, protocol: Protocol) -> None:
    found = load_index(data_url).sha256
    if found != protocol.reference.index_sha256:
        raise UserError(
            f"{data_url}: index.json has sha256 {found}, the run was evaluated against "
            f"{protocol.reference.index_sha256}; a data set must not change under its URL"
        )
