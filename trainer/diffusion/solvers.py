"""Fast deterministic solvers: diffusers' DPM-Solver++ and UniPC behind the interface of `samplers`.

Both integrate the probability flow from estimates of x_0, which they are given ready (and clipped): so every
kind of prediction and variance works. Their arithmetic is float32. diffusers is imported when a solver is
first asked for; the import takes seconds.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.diffusion.process import GaussianDiffusion
from trainer.diffusion.samplers import Denoise, Step, all_at

# In place of alpha_T = 0: where no signal is left the solvers' sqrt((1 - abar) / abar) has no value.
_LEAST_ALPHA = 2.0**-24


def dpm_solver(
    diffusion: GaussianDiffusion,
    denoise: Denoise,
    x_T: Tensor,
    *,
    steps: int,
    order: int = 2,
    clip_x0: bool = True,
) -> Iterator[Step]:
    """DPM-Solver++, multistep (Lu et al. 2022, arXiv 2211.01095, algorithm 2).

    Args:
        diffusion: The process and the meaning of the network's output (its variance is not used).
        denoise: The network.
        x_T: float32 [B, C, ...] standard normal.
        steps: Network evaluations, in [1, T - 1]; their timesteps run evenly from T - 1 towards 0, which the
            last step reaches without the network.
        order: Of the method: 1 (which is DDIM), 2 or 3.
        clip_x0: Clip each estimate of x_0 to [-1, 1].

    Returns:
        An iterator over the steps, highest timestep first.

    Raises:
        ValueError: If steps or order are out of range; while iterating, if the network's output has a wrong
            shape or precision.
    """
    _check(diffusion, steps, order)
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(**_settings(diffusion), solver_order=order)
    return _solve(scheduler, diffusion, denoise, x_T, steps, clip_x0)


def unipc(
    diffusion: GaussianDiffusion,
    denoise: Denoise,
    x_T: Tensor,
    *,
    steps: int,
    order: int = 2,
    clip_x0: bool = True,
) -> Iterator[Step]:
    """UniPC, the predictor-corrector with B(h) = e^h - 1 (Zhao et al. 2023, arXiv 2302.04867).

    Args:
        diffusion: The process and the meaning of the network's output (its variance is not used).
        denoise: The network.
        x_T: float32 [B, C, ...] standard normal.
        steps: Network evaluations, in [1, T - 1]; their timesteps run evenly from T - 1 towards 0, which the
            last step reaches without the network.
        order: Of the predictor: 1, 2 or 3.
        clip_x0: Clip each estimate of x_0 to [-1, 1].

    Returns:
        An iterator over the steps, highest timestep first.

    Raises:
        ValueError: If steps or order are out of range; while iterating, if the network's output has a wrong
            shape or precision.
    """
    _check(diffusion, steps, order)
    from diffusers import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(**_settings(diffusion), solver_order=order)
    return _solve(scheduler, diffusion, denoise, x_T, steps, clip_x0)


@torch.no_grad()
def _solve(
    scheduler: Any,  # the two schedulers share no typed base
    diffusion: GaussianDiffusion,
    denoise: Denoise,
    x_T: Tensor,
    steps: int,
    clip_x0: bool,
) -> Iterator[Step]:
    # Their tables are float32, off by 1.7e-4 at small t; ours take their place.
    abar, before = diffusion.schedule.alphas_cumprod, diffusion.schedule.alphas_cumprod_prev
    scheduler.alphas_cumprod = torch.tensor(np.where(abar > 0, abar, _LEAST_ALPHA * before))
    scheduler.set_timesteps(steps)
    x = x_T
    for timestep in scheduler.timesteps.tolist():
        t = all_at(x, timestep)
        x0_hat = diffusion.predict_x0(x, t, denoise(x, t), clip_x0)
        x = scheduler.step(x0_hat, timestep, x).prev_sample
        yield Step(timestep, x, x0_hat)


def _settings(diffusion: GaussianDiffusion) -> dict[str, object]:
    return {
        "num_train_timesteps": diffusion.num_timesteps,
        "trained_betas": diffusion.schedule.betas.tolist(),
        "prediction_type": "sample",
        "timestep_spacing": "linspace",
        "final_sigmas_type": "zero",
    }


def _check(diffusion: GaussianDiffusion, steps: int, order: int) -> None:
    most = diffusion.num_timesteps - 1
    if not 1 <= steps <= most:
        raise ValueError(
            f"steps must lie in [1, {most}], one less than the number of timesteps, got {steps}; "
            "ddim and ancestral sampling can take all of them"
        )
    if order not in (1, 2, 3):
        raise ValueError(f"order must be 1, 2 or 3, got {order}")
