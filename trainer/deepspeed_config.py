"""DeepSpeed's configuration: ours, with the user's raw section merged in and its contradictions refused.

Pure: nothing here imports DeepSpeed, so a wrong key is named before anything starts.
"""

import difflib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:  # recipes check themselves with this module
    from trainer.recipe import Recipe

LARGEST_BUCKET: Final = 2**25
"""Numbers that are gathered together: 128 MiB of float32. DeepSpeed's default would take 2 GB."""
LARGEST_REDUCED: Final = 2**23
"""Numbers that are reduced together: 32 MiB of float32. Reducing begins when the first so many gradients are
there: in larger pieces little of it would overlap with the backward pass."""

_FREE: Final = frozenset(
    {
        "aio",
        "comms_logger",
        "disable_allgather",
        "dump_state",
        "flops_profiler",
        "fp16",
        "gradient_predivide_factor",
        "memory_breakdown",
        "prescale_gradients",
        "steps_per_print",
        "wall_clock_breakdown",
        "zero_optimization",
    }
)
"""Top-level keys that may be given: they choose how training runs, not what is trained."""

_SECTIONS: Final = frozenset({"aio", "comms_logger", "flops_profiler", "fp16", "zero_optimization"})
"""Those of them that are sections of keys."""

_OURS: Final = {
    "amp": "precision",
    "bf16": "precision",
    "checkpoint": "checkpoint",
    "comet": "logging",
    "communication_data_type": "nothing else, for gradients are always reduced in float32",
    "csv_monitor": "logging",
    "data_types": "precision",
    "fp16.enabled": "precision",
    "fp16.fp16_master_weights_and_grads": "nothing else, for masters are always float32",
    "fp16.loss_scale": "fp16.initial_scale_power, for the scale is always dynamic",
    "gradient_accumulation_steps": "batch.total and batch.micro",
    "gradient_clipping": "optimizer.clip_norm",
    "nebula": "checkpoint",
    "optimizer": "optimizer",
    "scheduler": "optimizer.warmup_images",
    "tensorboard": "logging",
    "torch_autocast": "precision",
    "train_batch_size": "batch.total",
    "train_micro_batch_size_per_gpu": "batch.total and batch.micro",
    "wandb": "logging",
    "zero_allow_untested_optimizer": "optimizer",
    "zero_force_ds_cpu_optimizer": "optimizer",
    "zero_optimization.cpu_offload": "deepspeed.offload_optimizer",
    "zero_optimization.cpu_offload_param": "deepspeed.zero_stage=3, which partitions parameters",
    "zero_optimization.offload_optimizer.device": "deepspeed.offload_optimizer",
    "zero_optimization.offload_param": "deepspeed.zero_stage=3, which partitions parameters",
    "zero_optimization.stage": "deepspeed.zero_stage",
    "zero_optimization.compute_grad_norm": "optimizer.clip_norm, which needs the norm",
    "zero_optimization.zero_quantized_gradients": "nothing else, for gradients are always reduced in float32",
    "zero_optimization.zero_quantized_weights": "precision",
}
"""What the recipe decides, and by which key."""


def check_raw(raw: Mapping[str, Any]) -> None:
    """Check the keys of a raw DeepSpeed configuration.

    Raises:
        ValueError: A key contradicts the recipe or is none that may be given; names it and the remedy.
    """
    for path, value in _entries(raw):
        decided_by = _OURS.get(path)
        if decided_by is not None:
            raise ValueError(f"deepspeed.config.{path} contradicts the recipe; use {decided_by}")
        if value == "auto":
            raise ValueError(f"deepspeed.config.{path}: nobody fills in 'auto' here; leave the key out")
    for key, value in raw.items():
        if key not in _FREE:
            nearest = difflib.get_close_matches(key, sorted(_FREE), n=1, cutoff=0.0)[0]
            raise ValueError(
                f"deepspeed.config.{key} is none of the keys that may be given; nearest: {nearest}; "
                f"there are {', '.join(sorted(_FREE))}"
            )
        if key in _SECTIONS and not isinstance(value, Mapping):
            raise ValueError(
                f"deepspeed.config.{key} is a section: give its keys as {{KEY: VALUE}} rather than {value!r}"
            )


def build_config(recipe: "Recipe", micro_steps: int, parameters: int, *, on_gpu: bool) -> dict[str, Any]:
    """Return the configuration that `deepspeed.initialize` takes.

    Args:
        recipe: The run's recipe.
        micro_steps: Forward and backward passes per update.
        parameters: Numbers in the network.
        on_gpu: Whether communication can overlap with computing.
    """
    section = recipe.deepspeed
    whole = parameters + parameters % 2  # DeepSpeed wants an even number
    gathered = min(whole, LARGEST_BUCKET)
    zero: dict[str, Any] = {
        "stage": section.zero_stage,
        "reduce_bucket_size": min(whole, LARGEST_REDUCED),
        "overlap_comm": on_gpu and section.zero_stage > 0,
    }
    if section.zero_stage < 3:
        zero["allgather_bucket_size"] = gathered
    elif "stage3_prefetch_bucket_size" not in section.config.get("zero_optimization", {}):
        zero["prefetch_bucket_size"] = gathered  # DeepSpeed knows it by both names, but not by both at once
    if section.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    ours: dict[str, Any] = {
        # The batch sizes only feed DeepSpeed's own bookkeeping: the true shares of ranks may differ by one
        # image, and `Engine.backward` weighs them exactly.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_steps,
        # At stage 0 the optimizer is torch's own, and `Engine` clips: DeepSpeed would not tell the norm.
        "gradient_clipping": recipe.optimizer.clip_norm if section.zero_stage else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**62,
        # It would wait for the device twice a micro-step, for a speed that nobody reads.
        "timers": {"throughput": {"enabled": False}},
    }
    if recipe.precision.is_loss_scaled:
        ours["fp16"] = {"enabled": True}
    return _merged(ours, section.config)


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        result[key] = _merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return result


def _entries(raw: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All dotted keys, those of sections included, and what is given for them."""
    for key, value in raw.items():
        yield f"{prefix}{key}", value
        if isinstance(value, Mapping):
            yield from _entries(value, f"{prefix}{key}.")
