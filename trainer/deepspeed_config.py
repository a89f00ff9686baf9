"""DeepSpeed's configuration: ours, with the user's raw section merged in and its contradictions refused.

Pure: nothing here imports DeepSpeed, so a wrong key is named before anything starts.
"""

import difflib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:  # recipes check themselves with this module
    from trainer.recipe import Recipe

LARGEST_BUCKET: Final = 2**25
"""Numbers that are reduced or gathered together: 128 MiB of float32. DeepSpeed's default would take 2 GB."""

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

_OURS: Final = {
    "amp": "precision",
    "bf16": "precision",
    "checkpoint": "checkpoint",
    "comet": "logging",
    "communication_data_type": "nothing else, for gradients are always reduced in float32",
    "csv_monitor": "logging",
    "data_types": "precision",
    "fp16.enabled": "precision",
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
    for path in _paths(raw):
        decided_by = _OURS.get(path)
        if decided_by is not None:
            raise ValueError(f"deepspeed.config.{path} contradicts the recipe; use {decided_by}")
    for key in raw:
        if key not in _FREE:
            nearest = difflib.get_close_matches(key, sorted(_FREE), n=1, cutoff=0.0)[0]
            raise ValueError(
                f"deepspeed.config.{key} is none of the keys that may be given; nearest: {nearest}; "
                f"there are {', '.join(sorted(_FREE))}"
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
    bucket = min(parameters + parameters % 2, LARGEST_BUCKET)  # DeepSpeed wants an even number
    zero: dict[str, Any] = {
        "stage": section.zero_stage,
        "reduce_bucket_size": bucket,
        "overlap_comm": on_gpu and section.zero_stage > 0,
    }
    zero |= {"prefetch_bucket_size": bucket} if section.zero_stage == 3 else {"allgather_bucket_size": bucket}
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


def _paths(raw: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """All dotted keys, those of sections included."""
    for key, value in raw.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _paths(value, f"{prefix}{key}.")
