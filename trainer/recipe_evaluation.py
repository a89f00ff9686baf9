"""The section `evaluation` of a recipe: named protocols of the evaluation service (design, law 7)."""

from enum import StrEnum
from typing import Literal

from pydantic import Field

from trainer.recipe_sections import Section


class SamplerName(StrEnum):
    """How pictures are drawn from a network."""

    DDIM = "ddim"
    ANCESTRAL = "ancestral"
    DPM_SOLVER = "dpm-solver++"
    UNIPC = "unipc"

    def most_steps(self, num_timesteps: int) -> int:
        """Return how often the network can be asked: once per timestep, by the solvers once less."""
        return num_timesteps - (self in (SamplerName.DPM_SOLVER, SamplerName.UNIPC))


class MetricName(StrEnum):
    """What an evaluation measures; docs/evaluation.md says how each is computed."""

    DISTANCE = "distance"
    """Fréchet distance: FID with the original Inception weights, else FD-<network>."""
    HELD_OUT = "held-out"
    """The same distance to the held-out pictures, all of them: the paper's second FID."""
    SCORE = "score"
    """Inception Score, or the classifier score of another network."""
    SPATIAL = "spatial"
    """Fréchet distance of spatial features: sFID (features=inception-state only)."""
    KERNEL = "kernel"
    """Kernel distance with its interval: KID."""
    MANIFOLD = "manifold"
    """Improved precision and recall, density and coverage."""
    INFINITY = "infinity"
    """The distance extrapolated to infinitely many samples."""
    INTERVAL = "interval"
    """A bootstrap interval of the distance over the drawn samples."""
    NEIGHBOURS = "neighbours"
    """Nearest training pictures of the samples, as a check for memorisation."""
    BITS = "bits"
    """Bits per dimension of training and held-out pictures, with rate and distortion."""


class BitsSpec(Section):
    """Which pictures' bits per dimension are computed, and how exactly."""

    images: int | None = Field(1000, ge=2)
    """The first so many of each split; null: all of them."""
    draws: int | None = Field(20, ge=1)
    """An unbiased estimate from so many timesteps a picture, and the first; null: all T of them."""


class EvaluationSpec(Section):
    """One named protocol of the evaluation service (design, law 7)."""

    samples: int = Field(ge=2)
    sampler: SamplerName = SamplerName.DDIM
    steps: int = Field(ge=1)
    eta: float = Field(0.0, ge=0.0, le=1.0)
    ema: str
    """Name of an EMA profile, or "raw"."""
    features: str = Field("effnetlite0", min_length=1)
    """Feature network as `ddpm eval … --features` takes it; `inception` alone demands that option."""
    resize: Literal["clean", "legacy_tensorflow", "legacy_pytorch"] = "clean"
    """How pictures come to the network's input size, by clean-fid's names of the modes."""
    metrics: tuple[MetricName, ...] = (MetricName.DISTANCE, MetricName.SCORE)
    bits: BitsSpec = BitsSpec()
    """For `metrics: [bits]`."""
    reference_file: str | None = None
    """Statistics that others published (.npz of clean-fid, pytorch-fid, ADM, EDM), PATH_OR_URL#sha256=HEX."""
    automatic: bool = True
    """Whether every checkpoint is evaluated so; false: only on request, `ddpm eval … --spec NAME`."""
    chunk: int = Field(64, ge=1)
    """Images generated together; part of the protocol because it fixes every rounding."""
    seed: int = Field(0, ge=0, lt=2**63)
    reference_split: str = "train"
    held_out_split: str = "val"
