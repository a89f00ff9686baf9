"""DPM-Solver++ and UniPC against diffusers used directly, known answers and each other."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

from trainer.diffusion.process import GaussianDiffusion, Prediction, Variance
from trainer.diffusion.samplers import final
from trainer.diffusion.schedule import ScheduleConfig, ScheduleKind, from_config, linear
from trainer.diffusion.solvers import dpm_solver, unipc
from trainer.randomness import Purpose, normal

SOLVERS = {"dpm": (dpm_solver, DPMSolverMultistepScheduler), "unipc": (unipc, UniPCMultistepScheduler)}
NAMES = {Prediction.EPS: "epsilon", Prediction.X0: "sample", Prediction.V: "v_prediction"}
both = pytest.mark.parametrize("solver", list(SOLVERS))


def noise(n: int = 2) -> Tensor:
    return normal(0, Purpose.SAMPLE_NOISE, torch.arange(n), (3, 4, 4))


def wavy(x: Tensor, t: Tensor) -> Tensor:
    return 0.9 * x + 0.2 * torch.sin(3 * x + t.view(-1, 1, 1, 1) / 100)


def best_eps(d: GaussianDiffusion, s2: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The best eps there is for x_0 ~ N(0, s2): then the flow multiplies x_T by the standard deviation."""
    abar = d.schedule.alphas_cumprod
    table = torch.tensor(np.sqrt(1 - abar) / (abar * s2 + 1 - abar))
    return lambda x, t: table[t].to(x.dtype).view(-1, *[1] * (x.ndim - 1)) * x


@both
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("steps", [10, 25])
@pytest.mark.parametrize("prediction", list(NAMES))
def test_trajectory_against_diffusers(solver: str, order: int, steps: int, prediction: Prediction) -> None:
    """They turn the network's output into x_0 themselves, from their own float32 tables."""
    run, scheduler = SOLVERS[solver]
    theirs = scheduler(beta_schedule="linear", prediction_type=NAMES[prediction], solver_order=order)
    theirs.set_timesteps(steps)
    x = noise()
    ours = list(
        run(GaussianDiffusion(linear(), prediction), wavy, x, steps=steps, order=order, clip_x0=False)
    )
    assert [step.t for step in ours] == theirs.timesteps.tolist()
    for step in ours:
        x = theirs.step(wavy(x, torch.full((2,), step.t)), step.t, x).prev_sample
        scale = float(x.abs().max()) + 1
        torch.testing.assert_close(step.x / scale, x / scale, atol=1e-4, rtol=0)
    torch.testing.assert_close(ours[-1].x, ours[-1].x0_hat)


@both
def test_clipped_trajectory_against_diffusers(solver: str) -> None:
    run, scheduler = SOLVERS[solver]
    theirs = scheduler(beta_schedule="linear", prediction_type="sample")
    theirs.set_timesteps(25)
    d = GaussianDiffusion(linear(), variance=Variance.LEARNED)
    x = noise()
    clipped = 0
    for step in run(d, lambda x, t: torch.cat([wavy(x, t), x], dim=1), x, steps=25):
        at = torch.full((2,), step.t)
        x0_hat = d.x0_from_eps(x, at, wavy(x, at))
        clipped += int((x0_hat.abs() > 1).sum())
        x = theirs.step(x0_hat.clamp(-1, 1), step.t, x).prev_sample
        torch.testing.assert_close(step.x, x, atol=1e-4, rtol=0)
        assert float(step.x0_hat.abs().max()) <= 1
    assert clipped > 100


@both
def test_convergence_on_gaussian_data(solver: str) -> None:
    """x_T is multiplied by the data's 0.5; a higher order needs fewer steps for it."""
    run, _ = SOLVERS[solver]
    d = GaussianDiffusion(linear())
    errors = {
        order: [
            abs(
                float(final(run(d, best_eps(d, 0.25), torch.ones(1, 1), steps=n, order=order, clip_x0=False)))
                - 0.5
            )
            for n in (10, 40)
        ]
        for order in (1, 2)
    }
    assert errors[1][0] > errors[1][1]
    assert errors[2][1] < 0.01
    assert errors[2][0] < errors[1][0]


@pytest.mark.parametrize("kind", [kind for kind in ScheduleKind if kind is not ScheduleKind.JSD])
def test_first_order_is_ddim(kind: ScheduleKind) -> None:
    """Its update in closed form, float64: so our tables, and not their float32 ones, are in use."""
    d = GaussianDiffusion(from_config(ScheduleConfig(kind, 400)), Prediction.V)
    abar = d.schedule.alphas_cumprod
    steps = list(dpm_solver(d, wavy, noise(), steps=30, order=1))
    x = noise().double()
    for step, after in zip(steps, [*(step.t for step in steps[1:]), None], strict=True):
        at = torch.full((2,), step.t)
        x0_hat = d.x0_from_v(x, at, wavy(x, at)).clamp(-1, 1)
        signal = 1.0 if after is None else float(abar[after])
        x = signal**0.5 * x0_hat + (1 - signal) ** 0.5 * d.eps_from_x0(x, at, x0_hat)
        torch.testing.assert_close(step.x.double(), x, atol=1e-5, rtol=0)


@both
@pytest.mark.parametrize("prediction", [Prediction.X0, Prediction.MU, Prediction.V])
def test_zero_terminal_snr_stays_finite(solver: str, prediction: Prediction) -> None:
    run, _ = SOLVERS[solver]
    d = GaussianDiffusion(from_config(ScheduleConfig(ScheduleKind.JSD, 100)), prediction)
    for step in run(d, lambda x, t: 0.5 * torch.sin(x), noise(), steps=12):
        assert bool(torch.isfinite(step.x).all())
    assert step.t > 0
    assert float(step.x.abs().max()) <= 1


@both
def test_any_number_of_steps_and_precision(solver: str) -> None:
    run, _ = SOLVERS[solver]
    d = GaussianDiffusion(linear(12, 0.01, 0.3))
    weight = torch.ones(1, requires_grad=True)
    for dtype in (torch.float32, torch.float64):
        for steps in range(1, 12):
            taken = list(run(d, lambda x, t: x * weight, noise().to(dtype), steps=steps, order=3))
            assert len({step.t for step in taken}) == len(taken) == steps
            assert taken[0].t == 11
            assert taken[-1].x.dtype == dtype
            assert bool(torch.isfinite(taken[-1].x).all())
            assert not taken[-1].x.requires_grad


@both
def test_bad_arguments_are_refused_at_the_call(solver: str) -> None:
    run, _ = SOLVERS[solver]
    d = GaussianDiffusion(linear(10))
    for steps in (0, 10):
        with pytest.raises(ValueError, match=rf"steps must lie in \[1, 9\].*got {steps}"):
            run(d, wavy, noise(), steps=steps)
    with pytest.raises(ValueError, match="order must be 1, 2 or 3, got 4"):
        run(d, wavy, noise(), steps=5, order=4)
    with pytest.raises(ValueError, match="model_output has shape"):
        final(run(d, lambda x, t: x[:, :1], noise(), steps=5))
