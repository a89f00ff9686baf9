"""Hugging Face's `DDPMScheduler`: its scheduler_config.json, written and compared.

Nothing here imports diffusers. Source: diffusers 0.42.1, the arguments of `DDPMScheduler` with defaults.
"""

import logging
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data_pipeline.documents import describe_first
from data_pipeline.errors import UserError
from trainer.diffusion.process import Prediction, Variance
from trainer.diffusion.schedule import ScheduleConfig, ScheduleKind, Table, from_config
from trainer.recipe import Recipe

log = logging.getLogger(__name__)

PREDICTIONS: Final[Mapping[Prediction, str]] = {
    Prediction.EPS: "epsilon",
    Prediction.X0: "sample",
    Prediction.V: "v_prediction",
}
VARIANCES: Final[Mapping[Variance, str]] = {
    Variance.FIXED_SMALL: "fixed_small",
    Variance.FIXED_LARGE: "fixed_large",
    Variance.LEARNED_RANGE: "learned_range",
}
KINDS: Final[Mapping[str, ScheduleKind]] = {
    "linear": ScheduleKind.LINEAR,
    "scaled_linear": ScheduleKind.QUADRATIC,
    "squaredcos_cap_v2": ScheduleKind.COSINE,
}
"""Those of their schedules that a recipe can have."""
_TOLERANCE: Final = 1e-5
"""Relative; betas that were float32 once are the same schedule."""


class SchedulerJson(BaseModel):
    """Content of a scheduler_config.json: the arguments of `DDPMScheduler`, absent ones at their defaults."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    num_train_timesteps: int = Field(1000, ge=1, le=1_000_000)
    beta_schedule: str = "linear"
    beta_start: float = Field(1e-4, gt=0, lt=1)
    beta_end: float = Field(0.02, gt=0, lt=1)
    trained_betas: tuple[float, ...] | None = None
    prediction_type: str = "epsilon"
    variance_type: str = "fixed_small"
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    thresholding: bool = False
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    rescale_betas_zero_snr: bool = False


def scheduler_json(recipe: Recipe) -> SchedulerJson:
    """The `DDPMScheduler` that samples as our ancestral sampler does, x_0 clipped.

    Raises:
        UserError: There is none; the recipe's key that it lacks is named.
    """
    section = recipe.diffusion
    if section.prediction not in PREDICTIONS:
        known = ", ".join(PREDICTIONS)
        raise UserError(
            f"diffusion.prediction={section.prediction}: diffusers' DDPMScheduler has {known} only"
        )
    if section.variance not in VARIANCES:
        known = ", ".join(VARIANCES)
        raise UserError(
            f"diffusion.variance={section.variance}: diffusers' DDPMScheduler has {known} only "
            "(what it calls learned is a variance, ours is its logarithm)"
        )
    linear = section.schedule is ScheduleKind.LINEAR
    return SchedulerJson(
        num_train_timesteps=section.num_timesteps,
        beta_start=section.beta_start,
        beta_end=section.beta_end,
        trained_betas=None if linear else tuple(recipe.build_diffusion().schedule.betas.tolist()),
        prediction_type=PREDICTIONS[section.prediction],
        variance_type=VARIANCES[section.variance],
    )


def compare_scheduler(content: Mapping[str, Any], recipe: Recipe, where: str) -> None:
    """Check that a scheduler_config.json describes the diffusion process of a recipe.

    What only sampling needs (the variance, if it is not learned) may differ; the log says so.

    Args:
        content: The file's content.
        recipe: The recipe.
        where: Name of the file for messages.

    Raises:
        UserError: It is ill-typed, or describes another process; the first key that differs is named with
            what to set.
    """
    try:
        theirs = SchedulerJson.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{where}: {describe_first(error)}") from error
    section = recipe.diffusion
    wanted = PREDICTIONS.get(section.prediction, str(section.prediction))
    if theirs.prediction_type != wanted:
        ours = next((kind for kind, name in PREDICTIONS.items() if name == theirs.prediction_type), None)
        remedy = f"set diffusion.prediction={ours}" if ours else "no diffusion.prediction is like that"
        raise UserError(
            f"{where}: prediction_type is {theirs.prediction_type}, the recipe's is {wanted}; {remedy}"
        )
    name = theirs.beta_schedule if theirs.trained_betas is None else "trained_betas"
    _compare_betas(_betas(theirs, where), name, recipe, where)
    if theirs.variance_type != VARIANCES.get(section.variance):
        log.warning(
            "%s: variance_type is %s; `ddpm sample` goes by the recipe's diffusion.variance=%s",
            where,
            theirs.variance_type,
            section.variance,
        )


def _compare_betas(theirs: Table, name: str, recipe: Recipe, where: str) -> None:
    section = recipe.diffusion
    ours = recipe.build_diffusion().schedule.betas
    if len(theirs) != len(ours):
        raise UserError(
            f"{where}: there are {len(theirs)} timesteps, the recipe has {len(ours)}; "
            f"set diffusion.num_timesteps={len(theirs)}"
        )
    if not np.allclose(theirs, ours, rtol=_TOLERANCE, atol=0.0):
        schedule = f"diffusion.schedule={KINDS[name]}" if name in KINDS else "diffusion.schedule"
        raise UserError(
            f"{where}: beta_schedule {name} runs from {theirs[0]:.6g} to {theirs[-1]:.6g}, the recipe's "
            f"{section.schedule} from {ours[0]:.6g} to {ours[-1]:.6g}; set {schedule}, diffusion.beta_start "
            "and diffusion.beta_end"
        )


def _betas(theirs: SchedulerJson, where: str) -> Table:
    """Their table of betas, float64 [T].

    Raises:
        UserError: It is none that a recipe can have.
    """
    if theirs.rescale_betas_zero_snr:
        raise UserError(f"{where}: rescale_betas_zero_snr is set; no diffusion.schedule is like that")
    if theirs.trained_betas is not None:
        return np.asarray(theirs.trained_betas, dtype=np.float64)
    if theirs.beta_schedule not in KINDS:
        known = ", ".join(KINDS)
        raise UserError(
            f"{where}: beta_schedule is {theirs.beta_schedule}; a recipe can have {known} or trained_betas"
        )
    kind = KINDS[theirs.beta_schedule]
    config = ScheduleConfig(kind, theirs.num_train_timesteps, theirs.beta_start, theirs.beta_end)
    try:
        return from_config(config).betas
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
