"""From a recipe to a DeepSpeed engine; the only module that imports DeepSpeed at run time.

DeepSpeed partitions the optimizer (ZeRO 1), reduces gradients in float32 and clips them. Everything
else stays ours: autocast around the network, the learning rate from the image clock, the state, which is
read and written through DeepSpeed's tensor fragments and never by `engine.save_checkpoint`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from trainer.checkpoint import Slice
from trainer.distributed import Environment
from trainer.recipe import Recipe
from trainer.recipe_sections import OptimizerSection, Precision

_ADAM_ROLES = ("exp_avg", "exp_avg_sq")


def init_process_group(environment: Environment, timeout_seconds: float) -> None:
    """Join the job's process group (NCCL on GPUs, gloo on CPUs) with an explicit time limit."""
    on_gpu = environment.device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(environment.device)
    deepspeed.init_distributed(
        dist_backend="nccl" if on_gpu else "gloo",
        timeout=timedelta(seconds=timeout_seconds),
        verbose=False,
    )


@dataclass(frozen=True)
class StepOutcome:
    """What one optimizer step did.

    Attributes:
        applied: False if DeepSpeed dropped the update because a gradient was not finite.
        grad_norm: Global norm of the averaged gradient before clipping; not finite if not applied.
    """

    applied: bool
    grad_norm: float


class Engine:
    """The network under DeepSpeed, with its state visible as flat slices.

    Args:
        recipe: The run's recipe.
        model: The network, float32, same weights on every rank.
        device: Where it trains.
        micro_steps: Forward and backward passes per optimizer update on this rank.
    """

    def __init__(self, recipe: Recipe, model: nn.Module, device: torch.device, micro_steps: int) -> None:
        self._micro_steps = micro_steps
        self._autocast = recipe.precision is Precision.BF16
        self._device = device
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        model = model.to(device)
        optimizer = _adam(recipe.optimizer, model)
        self._engine, self._zero, _, _ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=_deepspeed_config(recipe, micro_steps),
            dist_init_required=False,
        )
        self._adam = optimizer
        self._prime_adam()

    @property
    def module(self) -> nn.Module:
        """The network itself, with its full float32 parameters."""
        return self._engine.module  # type: ignore[no-any-return]

    @property
    def masters(self) -> list[Tensor]:
        """This rank's flat float32 master partitions (padded at the end), one per parameter group."""
        return list(self._zero.single_partition_of_fp32_groups)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Run the network under the recipe's autocast.

        Args:
            x_t: float32 [B, C, H, W].
            t: int64 [B].

        Returns:
            The prediction as float32 [B, C_out, H, W].
        """
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocast):
            output: Tensor = self._engine(x_t, t)
        return output.float()

    def backward(self, loss: Tensor) -> None:
        """Add one micro-step's gradient.

        Args:
            loss: This rank's share of the batch's mean loss; the shares of all ranks and micro-steps add up.
        """
        # DeepSpeed averages over micro-steps and ranks; the shares shall be summed.
        self._engine.backward(loss * (self._micro_steps * torch.distributed.get_world_size()))

    def micro_step_done(self) -> None:
        """Close a micro-step that is not the last one of the update."""
        self._engine.step()

    def update(self, learning_rate: float, epsilon: float) -> StepOutcome:
        """Close the last micro-step: reduce, clip and apply Adam with this learning rate and epsilon."""
        for group in self._adam.param_groups:
            group["lr"], group["eps"] = learning_rate, epsilon
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        return StepOutcome(
            applied=not self._zero.overflow, grad_norm=float("nan") if norm is None else float(norm)
        )

    def slices(self, averages: dict[str, list[Tensor]]) -> list[Slice]:
        """Return this rank's state as slices of parameters.

        Args:
            averages: By EMA profile, tensors laid out as `masters`.

        Returns:
            Slices whose tensors are views of the live state.
        """
        found = []
        for parameter, index, offset in self._fragments():
            fragment = parameter._hp_mapping  # type: ignore[attr-defined]
            start, count = fragment.lp_fragment_address.start, fragment.lp_fragment_address.numel
            tensors = {"master": fragment.hp_fragment.detach()}
            tensors |= {role: fragment.get_optim_state_fragment(role) for role in _ADAM_ROLES}
            for name, flats in averages.items():
                tensors[f"ema.{name}"] = flats[index][offset : offset + count]
            found.append(Slice(self._names[id(parameter)], start, start + count, tensors))
        return found

    def layout(self) -> list[tuple[str, int, int, int, int]]:
        """Return (parameter, start, stop, index of the flat, offset in the flat) of this rank's slices."""
        pieces = []
        for parameter, index, offset in self._fragments():
            address = parameter._hp_mapping.lp_fragment_address  # type: ignore[attr-defined]
            stop = address.start + address.numel
            pieces.append((self._names[id(parameter)], address.start, stop, index, offset))
        return pieces

    def resume(self, weights: dict[str, Tensor], updates: int) -> None:
        """Take over loaded state: whole parameters, and Adam's count of updates.

        The slices' tensors (masters, moments) must have been filled already.
        """
        with torch.no_grad():
            for name, parameter in self.module.named_parameters():
                parameter.copy_(weights[name])
        for state in self._adam.state.values():
            state["step"].fill_(updates)

    def close(self) -> None:
        """Release DeepSpeed's resources."""
        self._engine.destroy()

    def _prime_adam(self) -> None:
        """Create Adam's state before its first step, so that it can be loaded into, and link it."""
        for master in self.masters:
            self._adam.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=master.device),
                **{role: torch.zeros_like(master) for role in _ADAM_ROLES},
            }
        self._zero._lazy_init_hp_params_optimizer_state()

    def _fragments(self) -> list[tuple[nn.Parameter, int, int]]:
        """Parameters this rank owns a part of, with their flat's index and their offset in it."""
        groups: Sequence[Sequence[nn.Parameter]] = self._zero.bit16_groups
        return [
            (parameter, index, parameter._hp_mapping.hp_fragment_address.start)  # type: ignore[attr-defined]
            for index, group in enumerate(groups)
            for parameter in group
            if parameter._hp_mapping is not None  # type: ignore[attr-defined]
        ]


def _adam(section: OptimizerSection, model: nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam(
        model.parameters(), lr=section.learning_rate, betas=section.betas, eps=section.eps, fused=True
    )


def _deepspeed_config(recipe: Recipe, micro_steps: int) -> dict[str, Any]:
    # The batch sizes only feed DeepSpeed's own bookkeeping: the true shares of ranks may differ by one
    # image, and `Engine.backward` weighs them exactly.
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_steps,
        "gradient_clipping": recipe.optimizer.clip_norm,
        "zero_optimization": {"stage": recipe.deepspeed.zero_stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**62,
    }
