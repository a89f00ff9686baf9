"""Typed recipes: one YAML file per experiment, `section.key=value` overrides, mistakes named with a remedy.

The fields below are the whole configuration of a run; `trainer/recipes/*.yaml` hold the published
experiments. Lengths of time are images (the design's one clock); per-step constants of the paper are
given together with the batch they were meant for.
"""

import difflib
from collections.abc import Iterator, Sequence
from enum import StrEnum
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from data_pipeline.documents import canonical_json, describe_first, sha256_hex
from data_pipeline.errors import UserError
from trainer.diffusion.process import GaussianDiffusion, Prediction, Variance
from trainer.diffusion.schedule import linear
from trainer.unet import UNetConfig


class Section(BaseModel):
    """Base of all recipe sections: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _absolute(place: str) -> str:
    """Make a local path absolute, so that a run can be continued and evaluated from any folder."""
    return place if not place or "://" in place else str(Path(place).expanduser().absolute())


Place = Annotated[str, AfterValidator(_absolute)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class DataSection(Section):
    """Where the training pictures are."""

    url: Place = ""
    """Folder or URL that holds index.json, as made by `ddpm data build`."""
    split: str = "train"
    window_shards: int = Field(16, ge=1)
    """How many shards are mixed at a time; part of the order, see `data_pipeline.order`."""
    prefetch_batches: int = Field(4, ge=1)
    reader_threads: int = Field(2, ge=1)


class ImageSection(Section):
    """What one picture is."""

    size: int = Field(ge=4)
    channels: Literal[1, 3] = 3
    flip: bool
    """Random horizontal flips."""


class ModelSection(Section):
    """The U-Net (paper, appendix B)."""

    base_channels: int = Field(ge=1)
    channel_multipliers: tuple[int, ...]
    num_res_blocks: int = Field(2, ge=1)
    attention_resolutions: tuple[int, ...] = (16,)
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    norm_groups: int = Field(32, ge=1)


class DiffusionSection(Section):
    """The forward process and what the network predicts (paper, sections 2 to 4)."""

    num_timesteps: int = Field(1000, ge=2)
    schedule: Literal["linear"] = "linear"
    beta_start: float = Field(1e-4, gt=0, lt=1)
    beta_end: float = Field(0.02, gt=0, lt=1)
    prediction: Prediction = Prediction.EPS
    variance: Variance


class BatchSection(Section):
    """Batch arithmetic; ranks never appear in a recipe."""

    total: int = Field(ge=1)
    """Images per optimizer update over all ranks and accumulation steps."""
    micro: int | None = Field(None, ge=1)
    """Most images one device holds at a time; default: its whole share of `total`."""


class OptimizerSection(Section):
    """Adam (paper, appendix B)."""

    learning_rate: float = Field(gt=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    warmup_images: int = Field(ge=0)
    """Linear warm-up from 0; the paper's 5000 steps times its batch."""
    clip_norm: float = Field(1.0, gt=0)
    """Clipping of the averaged gradient's global norm."""


class Precision(StrEnum):
    """What the network computes in; parameters, gradients' reduction and losses stay float32."""

    FP32 = "fp32"
    BF16 = "bf16"


class EmaProfile(Section):
    """One exponential moving average of the weights: `decay` per `per_images`, or a half-life.

    `half_life_share` caps the half-life at that share of the images seen so far: a warm-up that keeps
    the average from dragging the random start along.
    """

    decay: float | None = Field(None, gt=0, lt=1)
    per_images: int | None = Field(None, ge=1)
    half_life_images: float | None = Field(None, gt=0)
    half_life_share: float | None = Field(None, gt=0, lt=1)

    @model_validator(mode="after")
    def _one_form(self) -> "EmaProfile":
        if (self.decay is None) != (self.per_images is None):
            raise ValueError("decay and per_images belong together, e.g. decay: 0.9999, per_images: 128")
        if (self.decay is None) == (self.half_life_images is None):
            raise ValueError("give either decay with per_images, or half_life_images")
        return self


class TrainSection(Section):
    """How long to train."""

    images: int = Field(ge=1)
    """Training ends when this many images have been applied."""
    max_minutes: float | None = Field(None, gt=0)
    """Wall-clock budget of the training loop of one attempt; reaching it also counts as finished."""


class CheckpointSection(Section):
    """When checkpoints are published and how many stay."""

    every_images: int = Field(ge=1)
    keep: int = Field(3, ge=2)
    """Newest checkpoints that keep their files."""


class LoggingSection(Section):
    """Metrics of the training loop."""

    every_images: int = Field(ge=1)
    tensorboard: bool = True


class EvaluationSpec(Section):
    """One named protocol of the evaluation service (design, law 7)."""

    samples: int = Field(ge=2)
    sampler: Literal["ddim", "ancestral"] = "ddim"
    steps: int = Field(ge=1)
    eta: float = Field(0.0, ge=0.0, le=1.0)
    ema: str
    """Name of an EMA profile, or "raw"."""
    features: Literal["effnetlite0", "inception"] = "effnetlite0"
    chunk: int = Field(64, ge=1)
    """Images generated together; part of the protocol because it fixes every rounding."""
    seed: int = Field(0, ge=0)
    reference_split: str = "train"
    held_out_split: str = "val"


class DeepSpeedSection(Section):
    """How state is partitioned over the ranks; has no influence on the trajectory."""

    zero_stage: Literal[1] = 1
    timeout_seconds: float = Field(600.0, gt=0)
    """After so long without an answer of another rank the process gives up."""


class Recipe(Section):
    """The full configuration of one run."""

    run: Place = ""
    """The run directory: a folder or URL."""
    seed: int = Field(0, ge=0, lt=2**63)
    data: DataSection = DataSection()
    image: ImageSection
    model: ModelSection
    diffusion: DiffusionSection
    batch: BatchSection
    optimizer: OptimizerSection
    precision: Precision
    ema: dict[str, EmaProfile]
    train: TrainSection
    checkpoint: CheckpointSection
    logging: LoggingSection
    evaluation: dict[str, EvaluationSpec] = Field(default_factory=dict)
    deepspeed: DeepSpeedSection = DeepSpeedSection()

    @model_validator(mode="after")
    def _names_agree(self) -> "Recipe":
        for name in (*self.ema, *self.evaluation):
            if not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
                raise ValueError(f"the name {name!r} may hold letters, digits, '-', '_' and '.' only")
        if "raw" in self.ema:
            raise ValueError('ema.raw: "raw" means the weights themselves; choose another name')
        if self.diffusion.beta_start > self.diffusion.beta_end:
            raise ValueError("diffusion.beta_start exceeds diffusion.beta_end; noise must grow with t")
        for name, spec in self.evaluation.items():
            if spec.ema != "raw" and spec.ema not in self.ema:
                known = ", ".join(("raw", *self.ema))
                raise ValueError(f"evaluation.{name}.ema is {spec.ema!r}; known: {known}")
        if self.batch.micro is not None and self.batch.micro > self.batch.total:
            raise ValueError(
                f"batch.micro={self.batch.micro} exceeds batch.total={self.batch.total}; lower batch.micro"
            )
        self.unet_config()
        return self

    def unet_config(self) -> UNetConfig:
        """Return the network's configuration.

        Raises:
            ValueError: The widths, resolutions or groups do not fit together.
        """
        return UNetConfig(
            image_size=self.image.size,
            in_channels=self.image.channels,
            out_channels=self.image.channels,
            **dict(self.model),
        )

    def build_diffusion(self) -> GaussianDiffusion:
        """Return the diffusion process of this recipe."""
        section = self.diffusion
        schedule = linear(section.num_timesteps, section.beta_start, section.beta_end)
        return GaussianDiffusion(schedule, section.prediction, section.variance)

    def to_yaml(self) -> str:
        """Serialise all fields, resolved, as YAML that `load_recipe` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def trajectory(self) -> dict[str, Any]:
        """Return the fields that shape the trajectory, without topology, storage, length and logging."""
        content = self.model_dump(mode="json")
        for path in _NOT_TRAJECTORY:
            holder = content
            for part in path[:-1]:
                holder = holder[part]
            del holder[path[-1]]
        return content

    @property
    def sha256(self) -> str:
        """Hash of `trajectory()`: two runs of equal hash train the same weights."""
        return sha256_hex(canonical_json(self.trajectory()))


_NOT_TRAJECTORY: Final = (
    ("run",),
    ("data", "url"),
    ("data", "prefetch_batches"),
    ("data", "reader_threads"),
    ("batch", "micro"),
    ("train",),
    ("checkpoint",),
    ("logging",),
    ("evaluation",),
    ("deepspeed",),
)


def recipe_names() -> list[str]:
    """Names of the recipes shipped with the package."""
    folder = resources.files("trainer") / "recipes"
    return sorted(
        entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml")
    )


def recipe_text(name_or_path: str) -> str:
    """Return the YAML of a shipped recipe or of a file.

    Raises:
        UserError: There is no such recipe or file.
    """
    if name_or_path in recipe_names():
        return (resources.files("trainer") / "recipes" / f"{name_or_path}.yaml").read_text()
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise UserError(f"{name_or_path}: no such recipe file")
        try:
            return path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{name_or_path}: cannot be read as text ({error})") from error
    nearest = difflib.get_close_matches(name_or_path, recipe_names(), n=1, cutoff=0.0)
    raise UserError(
        f"recipe {name_or_path!r} is unknown; nearest: {nearest[0]}; "
        f"shipped: {', '.join(recipe_names())}; or give a .yaml file"
    )


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Load a shipped recipe or a YAML file and apply `section.key=value` overrides.

    Raises:
        UserError: Unknown recipe or key (the nearest known key is named), or an impossible value.
    """
    return parse_recipe(recipe_text(name_or_path), name_or_path, overrides)


def parse_recipe(text: str, where: str, overrides: Sequence[str] = ()) -> Recipe:
    """Parse a recipe's YAML text; `where` names it in error messages.

    Raises:
        UserError: As `load_recipe`.
    """
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{where}: a recipe is a mapping of sections; see `ddpm recipe show quickstart`")
    for override in overrides:
        _apply_override(content, override)
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{where}: {_explain(error)}") from error


def differences(old: Recipe, new: Recipe) -> list[str]:
    """Name the trajectory keys in which two recipes differ, as "key: old -> new" lines."""
    before, after = dict(_flatten(old.trajectory())), dict(_flatten(new.trajectory()))
    return [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def _flatten(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _apply_override(content: dict[str, Any], override: str) -> None:
    key, equals, raw = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r}: write section.key=value, e.g. batch.total=64")
    *sections, last = key.split(".")
    holder = content
    for section in sections:
        inner = holder.setdefault(section, {})
        if not isinstance(inner, dict):
            raise UserError(f"override {override!r}: {section!r} is a value, not a section")
        holder = inner
    try:
        holder[last] = yaml.safe_load(raw) if raw else ""
    except yaml.YAMLError as error:
        raise UserError(f"override {override!r}: the value is not valid YAML") from error


def _explain(error: ValidationError) -> str:
    """Tell the first problem in one line; an unknown key comes with the nearest known one."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    if first["type"] != "extra_forbidden":
        return describe_first(error).removeprefix("document: ").replace("Value error, ", "")
    known = _known_keys(path[:-1])
    nearest = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.0)
    return f"unknown key {'.'.join(path)}; nearest known: {'.'.join([*path[:-1], *nearest])}"


def _known_keys(path: list[str]) -> list[str]:
    """Keys of the section at `path`; inside `ema` and `evaluation` the next part is a free name."""
    if not path:
        return list(Recipe.model_fields)
    named: dict[str, type[Section]] = {"ema": EmaProfile, "evaluation": EvaluationSpec}
    if path[0] in named:
        return list(named[path[0]].model_fields)
    section = Recipe.model_fields[path[0]].annotation
    assert isinstance(section, type)
    assert issubclass(section, Section)
    return list(section.model_fields)
