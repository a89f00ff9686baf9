"""Two checkpoints under common noise: which is better, and how sure is that?

Sample i of both is drawn from the same noise, so both move together from one choice of noise to the next, and
their difference varies less than either distance. The interval resamples the pairs.
"""

import os
import socket
from contextlib import ExitStack
from dataclasses import dataclass
from typing import ClassVar, Final

from pydantic import BaseModel, ConfigDict

from data_pipeline.documents import Document
from data_pipeline.errors import UserError
from data_pipeline.index import load_index
from eval.baseline import prepare
from eval.evaluate import draw_statistics
from eval.features import FeatureNetwork, open_network
from eval.metrics.bootstrap import BootstrapOptions, paired_difference
from eval.moments import Moments
from eval.plan import make_plan
from eval.protocol import Protocol
from eval.reference_cache import ReferenceCache
from eval.results import ResultBook
from eval.spill import Float32Array
from eval.team import Team
from trainer.recipe_evaluation import MetricName
from trainer.run import Run
from trainer.weights import load_for_inference

_MAY_DIFFER: Final = {"ema", "ema_profile"}
"""What two runs' protocols of one name may differ in: whose weights are compared is the question itself."""


DEFAULT_OPTIONS: Final = BootstrapOptions()


class Side(BaseModel):
    """One of the two.

    Attributes:
        run: The run directory.
        checkpoint: Name of the checkpoint.
        manifest_sha256: Its identity.
        ema: Which of its weights.
        distance: Its distance to the reference.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    run: str
    checkpoint: str
    manifest_sha256: str
    ema: str
    distance: float


class Comparison(Document):
    """Two checkpoints' distances from the same noise.

    Attributes:
        metric: Name of the distance.
        protocol: Folder name of the protocol, as the first run has it.
        samples: N.
        a: The first.
        b: The second.
        difference: Distance of a less that of b: negative if a is better.
        low: Lower end of its 95 % interval.
        high: Upper end.
        replicates: How often the pairs were resampled.
        probability_a_better: Share of the replicates in which a has the lower distance.
    """

    SCHEMA: ClassVar[str] = "comparison/1"

    metric: str
    protocol: str
    samples: int
    a: Side
    b: Side
    difference: float
    low: float
    high: float
    replicates: int
    probability_a_better: float


@dataclass(frozen=True)
class Contender:
    """A checkpoint to compare.

    Attributes:
        run: Its run.
        checkpoint: Its name; None for the newest live one.
        ema: Weights in place of the specification's: a profile, or `raw`.
    """

    run: Run
    checkpoint: str | None = None
    ema: str | None = None


def compare(
    a: Contender,
    b: Contender,
    spec: str | None,
    features: str | None,
    team: Team,
    options: BootstrapOptions = DEFAULT_OPTIONS,
) -> Comparison:
    """Draw both checkpoints' samples from the same noise and compare their distances.

    Args:
        a: The first.
        b: The second; of the same run or of another one with the same specification.
        spec: Specification of the first run's recipe; None for its only or first one.
        features: Feature network in place of the specification's.
        team: The processes; all call this alike.
        options: How the pairs are resampled.

    Raises:
        UserError: No such run, checkpoint, specification or weights, or specifications that differ.
        StorageFault: Storage kept failing.
        Stopped: The team was asked to stop.
    """
    recipes = [team.on_main(contender.run.latest_recipe) for contender in (a, b)]
    name = spec or next(iter(recipes[0].evaluation), "")
    index_sha256 = team.on_main(lambda: load_index(recipes[0].data.url).sha256)
    plan = make_plan(recipes[0], name, index_sha256, features)
    other = make_plan(recipes[1], name, index_sha256, features)
    _check_equal(plan.protocol, other.protocol, b.run)
    network = team.together(lambda: open_network(plan.features, team.device))
    book = ResultBook(a.run, plan.protocol)
    baseline = prepare(book, recipes[0].data.url, network, team, ReferenceCache(), plan.reference_file)
    drawn = [
        _draw(contender, _storing(own.protocol, contender), network, team)
        for contender, own in ((a, plan), (b, other))
    ]
    return team.on_main(
        lambda: _compared(plan.protocol, drawn[0], drawn[1], baseline.reference.moments, options)
    )


@dataclass(frozen=True)
class _Drawn:
    """A side, and its samples' features in the main process."""

    run: str
    checkpoint: str
    manifest_sha256: str
    ema: str
    features: Float32Array | None


def _storing(protocol: Protocol, contender: Contender) -> Protocol:
    """The protocol with the contender's weights and each sample's features kept, never published as such."""
    wanted: dict[str, object] = {"metrics": (MetricName.DISTANCE, MetricName.INTERVAL)}
    if contender.ema is not None:
        wanted["ema"] = contender.ema
    return protocol.model_copy(update=wanted)


def _draw(contender: Contender, protocol: Protocol, network: FeatureNetwork, team: Team) -> _Drawn:
    run = contender.run
    name = team.on_main(lambda: run.select(contender.checkpoint))
    with ExitStack() as claim:
        if team.is_main:
            claim.enter_context(run.pin(name, f"{socket.gethostname()}-{os.getpid()}"))
        loaded = team.together(lambda: load_for_inference(run, name, ema=protocol.ema, device=team.device))
        identity = team.on_main(lambda: run.manifest_sha256(name))
    drawn = draw_statistics(loaded, protocol, network, team, f"draw {name} ({protocol.ema})")
    return _Drawn(run.url, name, identity, protocol.ema, drawn.features)


def _compared(
    protocol: Protocol, a: _Drawn, b: _Drawn, reference: Moments, options: BootstrapOptions
) -> Comparison:
    assert a.features is not None
    assert b.features is not None
    found = paired_difference(a.features, b.features, reference, options)
    sides = [
        Side(
            run=side.run,
            checkpoint=side.checkpoint,
            manifest_sha256=side.manifest_sha256,
            ema=side.ema,
            distance=distance,
        )
        for side, distance in ((a, found.a), (b, found.b))
    ]
    return Comparison(
        metric=protocol.features.distance_name,
        protocol=protocol.directory,
        samples=protocol.samples,
        a=sides[0],
        b=sides[1],
        difference=found.difference,
        low=found.low,
        high=found.high,
        replicates=options.replicates,
        probability_a_better=found.probability_a_better,
    )


def _check_equal(a: Protocol, b: Protocol, run: Run) -> None:
    """Refuse two protocols under one name that differ in more than the weights."""
    fields = [
        key for key in Protocol.model_fields if key not in _MAY_DIFFER and getattr(a, key) != getattr(b, key)
    ]
    if fields:
        raise UserError(
            f"{run.url}/recipe.yaml: evaluation.{a.spec} differs from the other run's in "
            f"{', '.join(fields)}; distances of different protocols cannot be compared"
        )
