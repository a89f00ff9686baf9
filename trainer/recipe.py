"""Typed recipes: one YAML file per experiment, `section.key=value` overrides, mistakes named with a remedy.

`trainer/recipe_sections.py` holds the sections, `trainer/recipes/*.yaml` the published experiments. A recipe
may begin with `extends: NAME`: it is then that recipe, but for the keys it gives itself; null takes out one
of its EMA profiles or evaluations.
"""

import dataclasses
import difflib
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Final, TypeGuard, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from data_pipeline.documents import canonical_json, describe_first, sha256_hex
from data_pipeline.errors import UserError
from trainer.diffusion.losses import check_loss
from trainer.diffusion.process import GaussianDiffusion
from trainer.diffusion.schedule import from_config
from trainer.recipe_evaluation import EvaluationSpec
from trainer.recipe_sections import (
    BatchSection,
    CheckpointSection,
    DataSection,
    DeepSpeedSection,
    DiffusionSection,
    EmaProfile,
    GuardSection,
    ImageSection,
    LoggingSection,
    LossSection,
    ModelSection,
    OptimizerSection,
    Place,
    Precision,
    Section,
    StorageSection,
    TrainSection,
)
from trainer.unet_config import UNetConfig


class Recipe(Section):
    """The full configuration of one run."""

    run: Place = ""
    """The run directory: a folder or URL."""
    seed: int = Field(0, ge=0, lt=2**63)
    data: DataSection = DataSection()
    storage: StorageSection = StorageSection()
    image: ImageSection
    model: ModelSection
    diffusion: DiffusionSection
    loss: LossSection = LossSection()
    batch: BatchSection
    optimizer: OptimizerSection
    precision: Precision
    ema: dict[str, EmaProfile]
    guard: GuardSection = GuardSection()
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
        for name, spec in self.evaluation.items():
            if spec.ema != "raw" and spec.ema not in self.ema:
                known = ", ".join(("raw", *self.ema))
                raise ValueError(f"evaluation.{name}.ema is {spec.ema!r}; known: {known}")
        if self.batch.micro is not None and self.batch.micro > self.batch.total:
            raise ValueError(
                f"batch.micro={self.batch.micro} exceeds batch.total={self.batch.total}; lower batch.micro"
            )
        powered = any(profile.std is not None for profile in self.ema.values())
        if self.checkpoint.snapshot_every_images is not None and not powered:
            raise ValueError(
                "checkpoint.snapshot_every_images: only averages with a std are kept as snapshots; "
                "add one, e.g. ema.narrow={std: 0.05}"
            )
        if self.diffusion.beta_start > self.diffusion.beta_end:
            raise ValueError("diffusion.beta_start exceeds diffusion.beta_end; noise must grow with t")
        check_loss(self.build_diffusion(), self.loss.config())
        self.unet_config()
        return self

    @model_validator(mode="after")
    def _deepspeed_agrees(self) -> "Recipe":
        stage = self.deepspeed.zero_stage
        if self.precision is Precision.FP64 and stage != 0:
            raise ValueError("precision=fp64 is for proofs: it needs deepspeed.zero_stage=0")
        if self.precision.is_loss_scaled and stage == 0:
            raise ValueError("precision=fp16 needs partitioned masters: deepspeed.zero_stage=1, 2 or 3")
        if "fp16" in self.deepspeed.config and not self.precision.is_loss_scaled:
            raise ValueError("deepspeed.config.fp16: only precision=fp16 scales its loss; leave it out")
        if self.train.compile and stage == 3:
            raise ValueError(
                "train.compile=true: blocks cannot be compiled while ZeRO 3 moves their parameters; "
                "leave it out, or choose a deepspeed.zero_stage of 0 to 2"
            )
        return self

    @property
    def default_ema(self) -> str:
        """The weights that the first evaluation uses, else the first EMA profile, else "raw"."""
        spec = next(iter(self.evaluation.values()), None)
        return spec.ema if spec else next(iter(self.ema), "raw")

    def unet_config(self) -> UNetConfig:
        """Return the network's configuration.

        Raises:
            ValueError: The widths, resolutions or groups do not fit together.
        """
        return UNetConfig(
            image_size=self.image.size,
            in_channels=self.image.channels,
            out_channels=self.diffusion.variance.output_channels(self.image.channels),
            **dict(self.model),
        )

    def for_ranks(self, ranks: int) -> "Recipe":
        """Return the recipe as so many ranks follow it: on a single one nothing is partitioned.

        ZeRO would only copy there; what is offloaded, and the masters of fp16, need it all the same.
        """
        if ranks > 1 or self.deepspeed.offload_optimizer or self.precision.is_loss_scaled:
            return self
        return self.model_copy(update={"deepspeed": self.deepspeed.model_copy(update={"zero_stage": 0})})

    def has_network_of(self, other: "Recipe") -> bool:
        """Tell whether weights of the other recipe fit this one's network: all but dropout is equal."""
        return self._shape() == other._shape()

    def _shape(self) -> UNetConfig:
        return dataclasses.replace(self.unet_config(), dropout=0.0, checkpoint_activations=False)

    def build_diffusion(self) -> GaussianDiffusion:
        """Return the diffusion process of this recipe."""
        section = self.diffusion
        return GaussianDiffusion(from_config(section.schedule_config()), section.prediction, section.variance)

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
    # What is mixed how is part of the index's hash, as `data.url` is.
    ("data", "weight"),
    ("data", "also"),
    ("data", "prefetch_batches"),
    ("data", "prefetch_mib"),
    ("data", "reader_threads"),
    ("data", "requests"),
    ("data", "cache_dir"),
    ("data", "cache_gib"),
    ("data", "damage_budget"),
    ("storage",),
    ("model", "checkpoint_activations"),
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
    content = _content(text, where)
    for override in overrides:
        _apply_override(content, override)
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{where}: {_explain(error)}") from error


def differences(old: Recipe, new: Recipe) -> dict[str, str]:
    """Map the trajectory keys in which two recipes differ to lines "key: old -> new"."""
    before, after = dict(_flatten(old.trajectory())), dict(_flatten(new.trajectory()))
    return {
        key: f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    }


def _content(text: str, where: str) -> dict[str, Any]:
    """Parse YAML and lay it over the recipe it extends, if any."""
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{where}: a recipe is a mapping of sections; see `ddpm recipe show quickstart`")
    base = content.pop("extends", None)
    if base is None:
        return content
    if base not in recipe_names() or base == where:
        raise UserError(f"{where}: extends: {base!r} is no other shipped recipe: {', '.join(recipe_names())}")
    return _merged(_content(recipe_text(base), base), content)


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Lay one mapping over another, section by section; null takes a section or a named profile out."""
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        if value is None and isinstance(below, dict):
            del result[key]
            continue
        result[key] = _merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return result


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
        if holder.get(section) is None:
            holder[section] = {}
        inner = holder[section]
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
    section: type[BaseModel] = Recipe
    for part in path:
        annotation = section.model_fields[part].annotation
        # Of an optional section, e.g. logging.wandb, what it is if it is there.
        (section,) = (kind for kind in (annotation, *get_args(annotation)) if _is_section(kind))
    return list(section.model_fields)


def _is_section(kind: object) -> TypeGuard[type[Section]]:
    return isinstance(kind, type) and issubclass(kind, Section)
