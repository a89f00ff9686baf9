"""The sections of a recipe: typed, immutable, each field with what it means.

Lengths of time are images (the design's one clock); per-step constants of the paper are given together
with the batch they were meant for.
"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from data_pipeline.storage_backend import StorageBackend
from trainer.diffusion.losses import LossConfig, LossKind, Weighting
from trainer.diffusion.process import Prediction, Variance
from trainer.diffusion.schedule import ScheduleConfig, ScheduleKind
from trainer.diffusion.timesteps import TimestepKind
from trainer.unet_config import Profile


class Section(BaseModel):
    """Base of all recipe sections: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _absolute(place: str) -> str:
    """Make a local path absolute, so that a run can be continued and evaluated from any folder."""
    return place if not place or "://" in place else str(Path(place).expanduser().absolute())


Place = Annotated[str, AfterValidator(_absolute)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class OtherData(Section):
    """A data set that is mixed in."""

    url: Place
    weight: float = Field(1.0, gt=0)
    """Only proportions matter; shares are multiples of 1/1024, see `data_pipeline.mixture`."""


class DataSection(Section):
    """Where the training pictures are."""

    url: Place = ""
    """Folder or URL that holds index.json, as made by `ddpm data build`."""
    split: str = "train"
    window_shards: int = Field(16, ge=1)
    """How many shards are mixed at a time; part of the order, see `data_pipeline.order`."""
    weight: float = Field(1.0, gt=0)
    """Of `url`, where `also` names further data sets."""
    also: list[OtherData] = Field(default_factory=list)
    """Further data sets of the same picture size that are mixed in. Evaluation's reference is `url`."""
    prefetch_batches: int = Field(4, ge=1)
    """Decoded batches that are kept ready."""
    prefetch_mib: int = Field(256, ge=1)
    """MiB of coded pictures a rank may hold; best is twice its part of a window."""
    reader_threads: int = Field(2, ge=0)
    """Threads that decode."""
    requests: int = Field(8, ge=1)
    """Reads from the storage at the same time."""
    cache_dir: str = ""
    """Folder on each node's own disk for blocks of shards, shared by its ranks; empty: no cache."""
    cache_gib: float = Field(64.0, gt=0)
    """Most GiB in that folder."""
    damage_budget: int = Field(100, ge=0)
    """Members of shards that may be damaged in the store before training stops; others take their place."""


class StorageSection(Section):
    """How shards are read; run directories always go through s3fs."""

    backend: StorageBackend = StorageBackend.S3FS
    """Who reads from S3: `s3fs`, or `obstore`, which needs less processor time."""
    request_timeout: float = Field(30.0, gt=0)
    """Seconds after which one read without its whole answer is given up and repeated."""


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
    profile: Profile = Profile.HO
    """Whose conventions: the paper's code (ho), OpenAI's, or diffusers' defaults."""
    num_heads: int | None = Field(None, ge=1)
    """Attention heads at every width; default: the profile's."""
    head_channels: int | None = Field(None, ge=1)
    """Channels of one attention head, instead of num_heads."""
    scale_shift_norm: bool = False
    """The time scales and shifts the second normalisation (OpenAI's networks) instead of being added."""
    block_size: int = Field(1, ge=1)
    """Space-to-depth before the network: the paper's code has the option, its published runs 1."""
    checkpoint_activations: bool = False
    """Recompute activations in the backward pass: less memory, more time, the same numbers."""


class DiffusionSection(Section):
    """The forward process and what the network predicts (paper, sections 2 to 4)."""

    num_timesteps: int = Field(1000, ge=2)
    schedule: ScheduleKind = ScheduleKind.LINEAR
    beta_start: float = Field(1e-4, gt=0, lt=1)
    beta_end: float = Field(0.02, gt=0, lt=1)
    prediction: Prediction = Prediction.EPS
    variance: Variance

    def schedule_config(self) -> ScheduleConfig:
        """Return the noise schedule these numbers describe."""
        return ScheduleConfig(self.schedule, self.num_timesteps, self.beta_start, self.beta_end)


class LossSection(Section):
    """What is minimised (paper, section 3.4) and which timesteps training visits."""

    kind: LossKind = LossKind.SIMPLE
    weighting: Weighting = Weighting.NONE
    """Weight of L_simple's terms by their signal-to-noise ratio."""
    min_snr_gamma: float = Field(5.0, gt=0)
    p2_gamma: float = Field(1.0, ge=0)
    p2_k: float = Field(1.0, gt=0)
    hybrid_weight: float = Field(0.001, gt=0)
    """Share of the variational bound in `hybrid` (Nichol & Dhariwal 2021, section 3.1)."""
    timesteps: TimestepKind = TimestepKind.UNIFORM
    refresh_every_images: int | None = Field(None, ge=1)
    """loss-aware: at each multiple the distribution of timesteps is set anew from the losses seen so far."""
    uniform_share: float = Field(0.001, gt=0, le=1)
    """loss-aware: this share of the timesteps stays uniform, so that none is forgotten."""

    @model_validator(mode="after")
    def _refreshed(self) -> "LossSection":
        aware = self.timesteps is TimestepKind.LOSS_AWARE
        if aware != (self.refresh_every_images is not None):
            raise ValueError(
                "loss.refresh_every_images belongs to loss.timesteps=loss-aware: give both, "
                "e.g. loss.refresh_every_images=1280000, or neither"
            )
        return self

    def config(self) -> LossConfig:
        """Return the loss these numbers describe."""
        return LossConfig(
            self.kind, self.weighting, self.min_snr_gamma, self.p2_gamma, self.p2_k, self.hybrid_weight
        )


class BatchSection(Section):
    """Batch arithmetic; ranks never appear in a recipe."""

    total: int = Field(ge=1)
    """Images per optimizer update over all ranks and accumulation steps."""
    micro: int | None = Field(None, ge=1)
    """Most images one device holds at a time; default: its whole share of `total`."""


class EpsilonForm(StrEnum):
    """Where Adam's epsilon stands."""

    TORCH = "torch"
    """Added to sqrt(v_hat), after bias correction (Kingma & Ba 2015, algorithm 1)."""
    TENSORFLOW = "tensorflow"
    """Added to sqrt(v), before it ("epsilon hat", their section 2): what the paper's code ran."""


class OptimizerSection(Section):
    """Adam (paper, appendix B)."""

    learning_rate: float = Field(gt=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    epsilon_form: EpsilonForm = EpsilonForm.TORCH
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

    images: int = Field(ge=1, lt=10**10)
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


class SamplerName(StrEnum):
    """How pictures are drawn from a network."""

    DDIM = "ddim"
    ANCESTRAL = "ancestral"
    DPM_SOLVER = "dpm-solver++"
    UNIPC = "unipc"

    def most_steps(self, num_timesteps: int) -> int:
        """Return how often the network can be asked: once per timestep, by the solvers once less."""
        return num_timesteps - (self in (SamplerName.DPM_SOLVER, SamplerName.UNIPC))


class EvaluationSpec(Section):
    """One named protocol of the evaluation service (design, law 7)."""

    samples: int = Field(ge=2)
    sampler: SamplerName = SamplerName.DDIM
    steps: int = Field(ge=1)
    eta: float = Field(0.0, ge=0.0, le=1.0)
    ema: str
    """Name of an EMA profile, or "raw"."""
    features: Literal["effnetlite0", "inception"] = "effnetlite0"
    chunk: int = Field(64, ge=1)
    """Images generated together; part of the protocol because it fixes every rounding."""
    seed: int = Field(0, ge=0, lt=2**63)
    reference_split: str = "train"
    held_out_split: str = "val"


class DeepSpeedSection(Section):
    """How state is partitioned over the ranks; has no influence on the trajectory."""

    zero_stage: Literal[1] = 1
    timeout_seconds: float = Field(600.0, gt=0)
    """After so long without an answer of another rank the process gives up."""
