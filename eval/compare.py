"""Two checkpoints under common noise: which is better, and how sure is that?

Sample i of both is drawn from the same noise, so both move together from one choice of noise to the next, and
their difference varies less than either distance. The interval resamples the pairs.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Final

from pydantic import BaseModel, ConfigDict

from data_pipeline.documents import Document
from data_pipeline.errors import UserError
from data_pipeline.index import load_index
from eval.baseline import take_reference
from eval.evaluate import draw_statistics
from eval.features import open_network
from eval.measure import INTERVAL
from eval.metrics.bootstrap import BootstrapOptions, paired_difference
from eval.moments import Moments
from eval.plan import make_plan
from eval.protocol import Protocol
from eval.reference_cache import ReferenceCache
from eval.spill import Float32Array
from eval.team import Team
from trainer.recipe import Recipe
from trainer.recipe_evaluation import MetricName
from trainer.run import Run, worker_name
from trainer.weights import Loaded, load_for_inference

_MAY_DIFFER: Final = {"ema", "ema_profile"}
"""What two runs' protocols of one name may differ in: whose weights are compared is the question itself."""


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
        standard_error: Of the difference, from resampled pairs.
        low: Lower end of its 95 % interval.
        high: Upper end.
        replicates: How often the pairs were resampled.
        probability_a_better: That a has the lower distance: Phi(-difference / standard error).
        correlation: Of both distances over the replicates: what common noise brought.
    """

    SCHEMA: ClassVar[str] = "comparison/1"

    metric: str
    protocol: str
    samples: int
    a: Side
    b: Side
    difference: float
    standard_error: float
    low: float
    high: float
    replicates: int
    probability_a_better: float
    correlation: float


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
    options: BootstrapOptions = INTERVAL,
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
    plans = [
        make_plan(recipe, name, team.on_main(partial(_index_of, recipe)), features) for recipe in recipes
    ]
    plan = plans[0]
    _check_equal(plan.protocol, plans[1].protocol, b.run)
    # Both before anything is drawn: a mistake shows at once, and retention may do as it likes afterwards.
    sides = [_take(contender, own.protocol.ema, team) for contender, own in zip((a, b), plans, strict=True)]
    if sides[0].identity == sides[1].identity:
        raise UserError(
            f"{a.run.url}: both sides are {sides[0].name} with weights {sides[0].ema}; "
            "name OTHER, --other-run or --other-ema"
        )
    network = team.together(lambda: open_network(plan.features, team.device))
    # Its samples' features are kept; nothing is published under this protocol.
    protocol = plan.protocol.model_copy(update={"metrics": (MetricName.DISTANCE, MetricName.INTERVAL)})
    data_url = recipes[0].data.url
    reference = take_reference(protocol, data_url, network, team, ReferenceCache(), plan.reference_file)
    drawn = [
        draw_statistics(side.loaded, protocol, network, team, f"draw {side.name} ({side.ema})").features
        for side in sides
    ]
    return team.on_main(lambda: _compared(plan.protocol, sides, drawn, reference.moments, options))


@dataclass(frozen=True)
class _Side:
    """A contender, read and protected."""

    run: str
    name: str
    manifest_sha256: str
    ema: str
    loaded: Loaded

    @property
    def identity(self) -> tuple[str, str]:
        """Which weights these are."""
        return self.manifest_sha256, self.ema


def _index_of(recipe: Recipe) -> str:
    return load_index(recipe.data.url).sha256


def _take(contender: Contender, ema: str, team: Team) -> _Side:
    """Choose and load a contender's checkpoint, pinned meanwhile."""
    run, ema = contender.run, contender.ema or ema
    name = team.on_main(lambda: run.select(contender.checkpoint))
    with ExitStack() as claim:

        def protect() -> None:
            claim.enter_context(run.pin(name, worker_name()))

        team.on_main(protect)
        loaded = team.together(lambda: load_for_inference(run, name, ema=ema, device=team.device))
        manifest_sha256 = team.on_main(lambda: run.manifest_sha256(name))
    return _Side(run.url, name, manifest_sha256, ema, loaded)


def _compared(
    protocol: Protocol,
    sides: Sequence[_Side],
    drawn: Sequence[Float32Array | None],
    reference: Moments,
    options: BootstrapOptions,
) -> Comparison:
    a, b = drawn
    assert a is not None
    assert b is not None
    found = paired_difference(a, b, reference, options)
    first, second = (
        Side(
            run=side.run,
            checkpoint=side.name,
            manifest_sha256=side.manifest_sha256,
            ema=side.ema,
            distance=distance,
        )
        for side, distance in zip(sides, (found.a, found.b), strict=True)
    )
    return Comparison(
        metric=protocol.features.distance_name,
        protocol=protocol.directory,
        samples=protocol.samples,
        a=first,
        b=second,
        difference=found.difference,
        standard_error=found.standard_error,
        low=found.low,
        high=found.high,
        replicates=options.replicates,
        probability_a_better=found.probability_a_better,
        correlation=found.correlation,
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
