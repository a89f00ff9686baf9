"""The sections of a recipe: typed, immutable, each field with what it means.

Lengths of time are images (the design's one clock); per-step constants of the paper are given together
with the batch they were meant for.
"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from data_pipeline.storage_backend import StorageBackend
from trainer.deepspeed_config import check_raw
from trainer.diffusion.losses import LossConfig, LossKind, Weighting
from trainer.diffusion.process import Prediction, Variance
from trainer.diffusion.schedule import ScheduleConfig, ScheduleKind
from trainer.diffusion.timesteps import TimestepKind
from trainer.power_ema import WIDEST_STD
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
    """What the network computes in; parameters, gradients' reduction and losses stay float32.

    The exceptions are fp16, where DeepSpeed keeps the parameters in float16 beside float32 masters and scales
    the loss, and fp64, which is for proofs.
    """

    FP32 = "fp32"
    """IEEE float32 everywhere: TensorFloat-32 is off."""
    TF32 = "tf32"
    """float32, with the products of convolutions and matrices in TensorFloat-32 (GPUs since Ampere)."""
    BF16 = "bf16"
    FP16 = "fp16"
    FP64 = "fp64"

    @property
    def autocast(self) -> torch.dtype | None:
        """The precision of autocast around the network; None for none."""
        return {Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16}.get(self)

    @property
    def is_loss_scaled(self) -> bool:
        """Whether parameters are float16 and the loss is scaled."""
        return self is Precision.FP16


class EmaWarmup(StrEnum):
    """How an average's decay rises at the start."""

    TENSORFLOW = "tensorflow"
    """At most (1 + n) / (10 + n) after n = images / per_images updates: `num_updates` of
    tf.train.ExponentialMovingAverage and its ports."""


class EmaProfile(Section):
    """One moving average of the weights: `decay` per `per_images`, or a half-life, or a power function.

    Two warm-ups keep the first two from dragging the random start along: `half_life_share` caps the
    half-life at that share of the images seen so far (Karras et al. 2022), `warmup` the decay.
    """

    decay: float | None = Field(None, gt=0, lt=1)
    per_images: int | None = Field(None, ge=1)
    half_life_images: float | None = Field(None, gt=0)
    half_life_share: float | None = Field(None, gt=0, lt=1)
    warmup: EmaWarmup | None = None
    """Belongs to decay and per_images."""
    std: float | None = Field(None, gt=0, lt=WIDEST_STD)
    """Relative standard deviation: an average as wide as this share of the training so far, and one that
    others can be made of afterwards (Karras et al. 2024, section 3), see `trainer.power_ema`."""

    @model_validator(mode="after")
    def _one_form(self) -> "EmaProfile":
        if (self.decay is None) != (self.per_images is None):
            raise ValueError("decay and per_images belong together, e.g. decay: 0.9999, per_images: 128")
        if sum(form is not None for form in (self.decay, self.half_life_images, self.std)) != 1:
            raise ValueError("give either decay with per_images, or half_life_images, or std")
        if self.std is not None and self.half_life_share is not None:
            raise ValueError("half_life_share does not belong to std, which needs no warm-up; leave it out")
        if self.warmup is not None and (self.decay is None or self.half_life_share is not None):
            raise ValueError("warmup belongs to decay with per_images, without half_life_share")
        return self


class TrainSection(Section):
    """How long to train, and with which kernels."""

    images: int = Field(ge=1, lt=10**10)
    """Training ends when this many images have been applied."""
    max_minutes: float | None = Field(None, gt=0)
    """Wall-clock budget of the training loop of one attempt; reaching it also counts as finished."""
    compile: bool | None = None
    """torch.compile of each block of the network; default: on GPUs, where ZeRO 3 does not move parameters."""
    deterministic: bool = False
    """Only deterministic kernels on a GPU: a resumed run is then bit-identical; slower."""

    def compiles(self, device: torch.device, zero_stage: int) -> bool:
        """Whether blocks are compiled on this device."""
        return self.compile if self.compile is not None else device.type == "cuda" and zero_stage < 3


class CheckpointSection(Section):
    """When checkpoints are published and how many stay."""

    every_images: int = Field(ge=1)
    keep: int = Field(3, ge=2)
    """Newest checkpoints that keep their files."""
    keep_every_images: int | None = Field(None, ge=1)
    """Checkpoints at multiples of it stay as well."""
    keep_best: bool = True
    """So do those that an evaluation found best (`RUN/eval/*/best.json`)."""
    deadline_minutes: float = Field(10.0, gt=0)
    """A checkpoint that could not be written for so long is given up, and training goes on; the next one is
    due as ever."""
    snapshot_every_images: int | None = Field(None, ge=1)
    """How often the power-function averages (`ema.NAME.std`) are kept for good, see `trainer.snapshots`;
    default: with every checkpoint."""


class WandbSection(Section):
    """Weights & Biases; the API key comes from its own standard chain."""

    project: str = Field(min_length=1)
    entity: str | None = None
    """User or team; default: the key's."""
    mode: Literal["online", "offline"] | None = None
    """offline: files for `wandb sync`; default: as WANDB_MODE says, else online."""


class MlflowSection(Section):
    """MLflow tracking."""

    experiment: str = Field(min_length=1)
    tracking_uri: str | None = None
    """Server, database or folder; default: as MLFLOW_TRACKING_URI says."""

    @model_validator(mode="after")
    def _without_password(self) -> "MlflowSection":
        if self.tracking_uri is not None and urlsplit(self.tracking_uri).password is not None:
            raise ValueError(
                "logging.mlflow.tracking_uri holds a password, and recipes are stored in the run directory; "
                "set MLFLOW_TRACKING_URI instead"
            )
        return self


class LoggingSection(Section):
    """Metrics of the training loop, described in docs/telemetry.md."""

    every_images: int = Field(ge=1)
    tensorboard: bool = True
    """Event files in the run directory."""
    wandb: WandbSection | None = None
    """Needs the extra `wandb`."""
    mlflow: MlflowSection | None = None
    """Needs the extra `mlflow`."""
    prometheus: Place = ""
    """Text file on rank 0's machine for node_exporter, NAME.prom; empty: none."""

    @model_validator(mode="after")
    def _collected(self) -> "LoggingSection":
        if self.prometheus and not self.prometheus.endswith(".prom"):
            raise ValueError(
                f"logging.prometheus={self.prometheus}: node_exporter reads files named *.prom only; "
                "name it so, e.g. /var/lib/node_exporter/ddpm.prom"
            )
        return self


class GuardSection(Section):
    """What is done about updates that would do harm; part of the trajectory."""

    spike_factor: float | None = Field(20.0, gt=1)
    """An update is dropped if its loss or gradient norm exceeds so many times its average; null: never."""
    warmup_updates: int = Field(100, ge=0)
    """Before so many updates only what is not finite is dropped."""
    skips: int = Field(10, ge=0)
    """So many updates of the last hundred may be dropped; one more rolls back to the last checkpoint."""
    rollbacks: int = Field(3, ge=0)
    """So many times a run may be rolled back; once more ends it."""


class DeepSpeedSection(Section):
    """How state is partitioned over the ranks; has no influence on the trajectory."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    """What is partitioned: 0 nothing, 1 Adam's state, 2 gradients too, 3 parameters too."""
    offload_optimizer: bool = False
    """Keep Adam's state and the float32 masters in the host's memory and update them there."""
    config: dict[str, Any] = Field(default_factory=dict)
    """DeepSpeed's own keys, merged into what the recipe makes; contradictions are refused."""
    timeout_seconds: float = Field(600.0, gt=0)
    """After so long without an answer of another rank the process gives up."""

    @model_validator(mode="after")
    def _consistent(self) -> "DeepSpeedSection":
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError(
                "deepspeed.offload_optimizer needs a partitioned optimizer: zero_stage 1, 2 or 3"
            )
        check_raw(self.config)
        return self
