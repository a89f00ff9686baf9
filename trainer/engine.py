"""From a recipe to a DeepSpeed engine.

DeepSpeed partitions the state (ZeRO 0 to 3), reduces gradients in float32 and clips them. Everything else
stays ours: autocast around the network, the learning rate from the image clock, the decision whether an
update is applied, and the state, which is read and written through views and never by DeepSpeed's
`save_checkpoint`.
"""

import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from trainer import partition
from trainer.deepspeed_config import build_config
from trainer.distributed import Environment, Ranks
from trainer.recipe import Recipe
from trainer.recipe_sections import OptimizerSection, Precision
from trainer.unet import UNet, compile_blocks

Allow = Callable[[float], bool]
"""Tells, by the global norm of the averaged gradient before clipping, whether an update shall be applied."""


def init_process_group(environment: Environment, timeout_seconds: float) -> None:
    """Join the job's process group (NCCL on GPUs, gloo on CPUs) with an explicit time limit."""
    on_gpu = environment.device.type == "cuda"
    # It warns of every optimizer that it does not know, ours among them.
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if on_gpu:
        torch.cuda.set_device(environment.device)
        # DeepSpeed takes it for a device's number; Slurm may show each task its own GPU only, numbered 0.
        os.environ["LOCAL_RANK"] = str(environment.device.index)
    deepspeed.init_distributed(
        dist_backend="nccl" if on_gpu else "gloo",
        timeout=timedelta(seconds=timeout_seconds),
        verbose=False,
    )


@dataclass(frozen=True)
class StepOutcome:
    """What one optimizer step did.

    Attributes:
        applied: False if the update was dropped: a gradient was not finite, or `Allow` said no.
        grad_norm: Global norm of the averaged gradient before clipping; infinite if it was not finite.
    """

    applied: bool
    grad_norm: float


class AskingAdam(torch.optim.Adam):
    """Adam that asks before the first of an update's steps whether to take them.

    DeepSpeed reduces, measures and clips gradients and then calls `step`, once or once for each part of the
    state: the only moment at which an update can be dropped with the gradient's norm known.
    """

    may_step: Callable[[], bool]
    """Asked once for each update; to be set before it."""
    stepped: bool | None = None
    """The answer; None until it is asked for."""

    def step(self, closure: Any = None) -> Any:
        """Take a step unless the update is to be dropped."""
        if self.stepped is None:
            self.stepped = self.may_step()
        return super().step(closure) if self.stepped else None


class Engine:
    """The network under DeepSpeed, with its state visible as flat pieces.

    Args:
        recipe: The run's recipe.
        model: The network, float32, with the same weights on every rank.
        ranks: The processes of the job.
        micro_steps: Forward and backward passes per optimizer update on this rank.
    """

    def __init__(self, recipe: Recipe, model: UNet, ranks: Ranks, micro_steps: int) -> None:
        self._precision, self.zero_stage = recipe.precision, recipe.deepspeed.zero_stage
        self._clip_norm = recipe.optimizer.clip_norm
        self._device, self._micro_steps, self._world = ranks.device, micro_steps, ranks.world
        _set_kernels(recipe, self._device)
        if self._precision is Precision.FP64:
            model.double()
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        size = sum(parameter.numel() for parameter in model.parameters())
        model = model.to(self._device)
        _autocast_inside(model, self._device, self._precision.autocast)
        if recipe.train.compiles(self._device, self.zero_stage):
            compile_blocks(model)
        self._adam = _adam(recipe.optimizer, model)
        config = build_config(recipe, micro_steps, size, on_gpu=self._device.type == "cuda")
        self._engine, self._zero, _, _ = deepspeed.initialize(
            model=model, optimizer=self._adam, config=config, dist_init_required=False
        )
        if self._precision.is_loss_scaled:
            self._zero.loss_scaler.raise_error_at_min_scale = False  # the guard counts what then overflows
        # DeepSpeed reduces no float64, and at stage 0 it copies all gradients even where nobody else is.
        is_alone = ranks.world == 1 and self.zero_stage == 0
        self._engine.enable_backward_allreduce = self._precision is not Precision.FP64 and not is_alone
        self.partition = self._divide(names, ranks)

    @property
    def module(self) -> nn.Module:
        """The network itself."""
        return self._engine.module  # type: ignore[no-any-return]

    @property
    def loss_scale(self) -> dict[str, float] | None:
        """The state of fp16's loss scaling; None in other precisions."""
        if not self._precision.is_loss_scaled:
            return None
        return {key: float(getattr(self._zero.loss_scaler, key)) for key in _LOSS_SCALE_STATE}

    @property
    def may_lower_scale(self) -> bool:
        """Whether an overflow may still be fp16's loss scale's fault."""
        if not self._precision.is_loss_scaled:
            return False
        scaler = self._zero.loss_scaler
        return bool(scaler.cur_scale > scaler.min_scale)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Run the network under the recipe's autocast.

        Args:
            x_t: float32 [B, C, H, W]; float64 in that precision.
            t: int64 [B].

        Returns:
            The prediction [B, C_out, H, W], as precise as `x_t`.
        """
        output: Tensor = self._engine(x_t, t)
        return output.to(x_t.dtype)

    def backward(self, loss: Tensor) -> None:
        """Add one micro-step's gradient.

        Args:
            loss: This rank's share of the batch's mean loss; the shares of all ranks and micro-steps add up.
        """
        # DeepSpeed averages over micro-steps and ranks; the shares shall be summed.
        self._engine.backward(loss * (self._micro_steps * self._world))

    def micro_step_done(self) -> None:
        """Close a micro-step that is not the last one of the update."""
        self._engine.step()

    def update(self, learning_rate: float, epsilon: float, allow: Allow) -> StepOutcome:
        """Close the last micro-step: reduce, clip and, if allowed, apply Adam with these numbers.

        Every rank must allow the same. `allow` is not asked where a gradient is not finite.
        """
        for group in self._adam.param_groups:
            group["lr"], group["eps"] = learning_rate, epsilon
        norms: list[float] = []

        def may_step() -> bool:
            norms.append(self._grad_norm())
            return math.isfinite(norms[0]) and allow(norms[0])

        if self._precision is Precision.FP64:
            self._average_gradients()
        self._adam.may_step, self._adam.stepped = may_step, None
        self._engine.step()
        # DeepSpeed takes no step at all where it finds a gradient that is not finite.
        norm = norms[0] if norms and math.isfinite(norms[0]) else math.inf
        return StepOutcome(applied=self._adam.stepped is True, grad_norm=norm)

    def resume(self, updates: int, loss_scale: dict[str, float] | None) -> None:
        """Take over loaded state: Adam's count of updates and fp16's loss scaling.

        The weights were loaded into the model before, moments and masters into `partition`.
        """
        for state in self._adam.state.values():
            state["step"].fill_(updates)
        if loss_scale is not None and self._precision.is_loss_scaled:
            for key, value in loss_scale.items():
                scaler = self._zero.loss_scaler
                setattr(scaler, key, type(getattr(scaler, key))(value))

    def close(self) -> None:
        """Release DeepSpeed's resources."""
        self._engine.destroy()

    def _divide(self, names: dict[int, str], ranks: Ranks) -> partition.Partition:
        match self.zero_stage:
            case 0:
                return partition.of_whole_model(self.module, self._adam, ranks.rank, ranks.world)
            case 3:
                return partition.of_zero_3(self._zero, names, self._adam, ranks.rank)
        return partition.of_zero_1_or_2(self._zero, names, self._adam)

    def _average_gradients(self) -> None:
        """What DeepSpeed does in all other precisions."""
        for parameter in self.module.parameters():
            assert parameter.grad is not None, "every parameter takes part in every step"
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= self._world

    def _grad_norm(self) -> float:
        """Global norm before clipping. At stage 0 this is where gradients are clipped."""
        if self.zero_stage == 0:
            return float(nn.utils.clip_grad_norm_(self.module.parameters(), self._clip_norm))
        return float(self._zero._global_grad_norm)


def _autocast_inside(model: UNet, device: torch.device, dtype: torch.dtype | None) -> None:
    """Let the network enter autocast itself.

    Entered around DeepSpeed's engine it would be switched off again on a GPU, by the engine, which knows
    only its own.
    """
    if dtype is not None:
        model.forward = torch.autocast(device.type, dtype)(model.forward)  # type: ignore[method-assign]


_LOSS_SCALE_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def _adam(section: OptimizerSection, model: nn.Module) -> AskingAdam:
    return AskingAdam(
        model.parameters(), lr=section.learning_rate, betas=section.betas, eps=section.eps, fused=True
    )


def _set_kernels(recipe: Recipe, device: torch.device) -> None:
    """State which kernels may be chosen on a GPU: torch keeps these choices for the whole process."""
    if device.type != "cuda":
        return
    tf32 = recipe.precision is Precision.TF32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32  # torch's own default is True
    torch.backends.cudnn.benchmark = not recipe.train.deterministic
    torch.use_deterministic_algorithms(recipe.train.deterministic)
