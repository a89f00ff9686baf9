"""From a recipe's specification to the protocol that its numbers bear, and the files it needs."""

from dataclasses import asdict, dataclass
from typing import Any

from data_pipeline.errors import UserError
from eval.features import FEATURE_BATCH, FeatureChoice, NetworkKind, ResizeMode, parse_choice
from eval.imported import FileChoice, StatisticsKind, parse_reference_file
from eval.measure import CONSTANTS, LEAST_PICTURES
from eval.metrics.classifier_score import splits_for
from eval.protocol import BASIC_METRICS, ImageShape, PictureSet, Protocol
from trainer.recipe import Recipe
from trainer.recipe_evaluation import EvaluationSpec, MetricName


@dataclass(frozen=True)
class Plan:
    """A protocol, and where the files it names by hash lie.

    Attributes:
        protocol: What the numbers mean.
        features: The feature network.
        reference_file: Published reference statistics, if the specification names any.
    """

    protocol: Protocol
    features: FeatureChoice
    reference_file: FileChoice | None = None


def make_plan(recipe: Recipe, spec_name: str, index_sha256: str, features: str | None = None) -> Plan:
    """Build the protocol of a specification in the recipe's section `evaluation`.

    Args:
        recipe: The run's recipe.
        spec_name: Name of the specification.
        index_sha256: Hash of the data set's `index.json`.
        features: Feature network in place of the specification's, as `eval.features.parse_choice` reads it.

    Raises:
        UserError: No such specification, more steps than timesteps, a metric that the network cannot give, or
            a file that is not named as it must be.
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
    choice = parse_choice(features or spec.features, ResizeMode(spec.resize))
    if features is not None and not choice.identity.classes:
        # Named for this evaluation only: what the network cannot give is not the specification's mistake.
        spec = spec.model_copy(update={"metrics": tuple(set(spec.metrics) - {MetricName.SCORE})})
    metrics = _metrics(spec_name, spec, choice)
    file = parse_reference_file(spec.reference_file, spec.resize) if spec.reference_file else None
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
        metrics=None if metrics == BASIC_METRICS else metrics,
        constants={name: asdict(CONSTANTS[name]) for name in metrics if name in CONSTANTS} or None,
        bits=spec.bits if MetricName.BITS in metrics else None,
        reference_file=file.identity if file else None,
    )
    return Plan(protocol, choice, file)


def _metrics(name: str, spec: EvaluationSpec, choice: FeatureChoice) -> tuple[MetricName, ...]:
    """The specification's metrics in their canonical order; refuses what the network cannot give."""
    key, network = f"evaluation.{name}.metrics", choice.identity
    if MetricName.DISTANCE not in spec.metrics:
        raise UserError(f"{key}: needs `distance`, by which checkpoints are compared; add it")
    if MetricName.SCORE in spec.metrics and not network.classes:
        raise UserError(f"{key}: {network.name} has no classes and gives no `score`; leave it out")
    if MetricName.SPATIAL in spec.metrics and not network.spatial:
        raise UserError(
            f"{key}: {network.name} gives no spatial features; use features: inception-state=PATH_OR_URL "
            "(the state-dict Inception) or leave `spatial` out"
        )
    for metric in spec.metrics:
        if spec.samples < LEAST_PICTURES.get(metric, 2):
            raise UserError(
                f"evaluation.{name}.samples={spec.samples}: `{metric}` needs {LEAST_PICTURES[metric]}; "
                "raise it or leave the metric out"
            )
    if spec.reference_file:
        _check_file(key, spec, choice)
    return tuple(metric for metric in MetricName if metric in spec.metrics)


def _check_file(key: str, spec: EvaluationSpec, choice: FeatureChoice) -> None:
    """Refuse published statistics where they are of another network, or of too little."""
    if choice.kind not in (NetworkKind.INCEPTION, NetworkKind.INCEPTION_STATE):
        raise UserError(
            f"{key}: reference_file is of the Inception, {choice.identity.name} is another network; use "
            "features: inception=… or inception-state=…"
        )
    if MetricName.SPATIAL in spec.metrics and f"kind={StatisticsKind.ADM}" not in (spec.reference_file or ""):
        raise UserError(f"{key}: only files of kind adm hold spatial statistics; leave `spatial` out")
    taken = {MetricName.KERNEL, MetricName.MANIFOLD, MetricName.NEIGHBOURS} & set(spec.metrics)
    if taken:
        raise UserError(
            f"{key}: {', '.join(sorted(taken))} need the reference pictures themselves, reference_file "
            "has only their mean and covariance; leave one of both out"
        )
