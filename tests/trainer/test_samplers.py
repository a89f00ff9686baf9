"""Samplers where the answer is known: Gaussian data, diffusers' schedulers, and each other."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from trainer.diffusion.process import GaussianDiffusion, Prediction, Variance
from trainer.diffusion.samplers import ancestral, ddim, ddim_invert, evenly_spaced, final
from trainer.diffusion.schedule import Schedule, ScheduleConfig, ScheduleKind, from_config, linear
from trainer.randomness import Purpose, normal


def gaussian_eps(schedule: Schedule, s2: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The best eps prediction there is for x_0 ~ N(0, s2)."""
    abar = schedule.alphas_cumprod
    table = torch.tensor(np.sqrt(1 - abar) / (abar * s2 + 1 - abar))
    return lambda x, t: table[t].to(x.dtype).view(-1, *[1] * (x.ndim - 1)) * x


def wavy(x: Tensor, t: Tensor) -> Tensor:
    """A closed-form stand-in for a network whose x_0 estimates leave [-1, 1] at times."""
    return 0.9 * x + 0.2 * torch.sin(3 * x + t.view(-1, 1, 1, 1) / 100)


def sample_noise(shape: tuple[int, ...], n: int, seed: int = 0) -> Callable[[int], Tensor]:
    return lambda draw: normal(seed, Purpose.SAMPLE_NOISE, torch.arange(n), shape, draw)


@pytest.mark.parametrize(
    ("s2", "variance", "expected"),
    [
        (0.25, Variance.FIXED_SMALL, 0.2461252114),
        (0.25, Variance.FIXED_LARGE, 0.2507520750),
        (1.0, Variance.FIXED_SMALL, 0.9910673764),
        (1.0, Variance.FIXED_LARGE, 0.9999),
    ],
)
def test_variance_of_gaussian_data_is_exact(s2: float, variance: Variance, expected: float) -> None:
    """The sampler is linear here: a chain without noise gives its gains, one fed with ones its step sizes."""
    d = GaussianDiffusion(linear(), Prediction.EPS, variance)
    probe = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    push = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    total, before = 1.0, probe
    for step in ancestral(d, gaussian_eps(d.schedule, s2), probe, lambda draw: push, clip_x0=False):
        gain = float(step.x[0] / before[0])
        sigma = float(step.x[1] - gain * before[1])
        total = gain**2 * total + sigma**2
        before = step.x
    # The last expected value is known to four digits only.
    assert total == pytest.approx(expected, abs=1e-9 if expected != 0.9999 else 1e-4)


def test_random_samples_of_gaussian_data() -> None:
    d = GaussianDiffusion(linear())
    generator = torch.Generator().manual_seed(0)

    def noise(draw: int) -> Tensor:
        return torch.randn(1, 100_000, generator=generator)

    x = final(ancestral(d, gaussian_eps(d.schedule, 0.25), noise(0), noise, clip_x0=False))
    # Standard error of a variance from 100,000 numbers: 0.45 %.
    assert float(x.var()) == pytest.approx(0.2461252114, rel=0.01)
    assert abs(float(x.mean())) < 0.005


def as_output(
    d: GaussianDiffusion, x0_hat: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[Tensor, Tensor], Tensor]:
    """The network of d that estimates x_0 so, with variances in the middle of their range."""

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        estimate = x0_hat(x, t)
        output = d.target(estimate, x, t, d.eps_from_x0(x, t, estimate))
        match d.variance:
            case Variance.LEARNED:
                lower, width = (
                    d.gather(name, t, x) for name in ("posterior_log_variance_clipped", "log_variance_range")
                )
                return torch.cat([output, (lower + 0.5 * width).expand_as(x)], dim=1)
            case Variance.LEARNED_RANGE:
                return torch.cat([output, torch.zeros_like(x)], dim=1)
        return output

    return denoise


def squashed(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(0.8 * x + t.view(-1, 1, 1, 1) / 1000)


@pytest.mark.parametrize("steps", [6, 24])
@pytest.mark.parametrize("prediction", list(Prediction))
@pytest.mark.parametrize("variance", [Variance.LEARNED, Variance.FIXED_LARGE])
def test_the_same_x0_hat_gives_the_same_pictures(
    prediction: Prediction, variance: Variance, steps: int
) -> None:
    """Whatever the network predicts, and strided too, where mu and a raw log-variance mean another step."""
    s = linear(24, 2e-3, 0.6)
    known = Variance.FIXED_LARGE if variance is Variance.FIXED_LARGE else Variance.LEARNED_RANGE
    reference, d = GaussianDiffusion(s, Prediction.X0, known), GaussianDiffusion(s, prediction, variance)
    noise = sample_noise((3, 4, 4), 2)
    visited = None if steps == 24 else evenly_spaced(24, steps)
    first, second = (
        final(
            ancestral(
                model,
                as_output(model, squashed),
                noise(0).double(),
                lambda draw: noise(draw).double(),
                visited,
            )
        )
        for model in (reference, d)
    )
    torch.testing.assert_close(second, first, atol=1e-9, rtol=0)
    both = [
        final(ddim(model, as_output(model, squashed), noise(0).double(), steps=steps))
        for model in (reference, d)
    ]
    torch.testing.assert_close(both[1], both[0], atol=1e-9, rtol=0)


@pytest.mark.parametrize("prediction", [Prediction.X0, Prediction.MU, Prediction.V])
def test_sampling_from_zero_terminal_snr(prediction: Prediction) -> None:
    d = GaussianDiffusion(from_config(ScheduleConfig(ScheduleKind.JSD, 30)), prediction, Variance.FIXED_LARGE)
    noise, denoise = sample_noise((3, 4, 4), 2), as_output(d, squashed)
    for steps in (
        ancestral(d, denoise, noise(0), noise),
        ancestral(d, denoise, noise(0), noise, [0, 12, 29]),
        ddim(d, denoise, noise(0), steps=30, eta=0.5, noise_fn=noise),
        ddim_invert(d, denoise, noise(0).clamp(-1, 1), steps=10),
    ):
        for step in steps:
            assert bool(torch.isfinite(step.x).all())
            assert bool(torch.isfinite(step.x0_hat).all())
        assert bool(step.x.any())


def two_humps(d: GaussianDiffusion, x: Tensor, t: Tensor) -> Tensor:
    """The best estimate of x_0 for data spread around -0.5 and 0.5 with variance 0.04 each."""
    signal = d.gather("sqrt_alphas_cumprod", t, x)
    total = signal**2 * 0.04 + (1 - signal**2)
    shrink = signal * 0.04 / total
    return shrink * x + (1 - signal * shrink) * 0.5 * torch.tanh(signal * 0.5 * x / total)


def test_inversion_leads_back_the_better_the_more_steps() -> None:
    """On Gaussian data, where every step is a multiplication, and on data that make the map a curve."""
    d = GaussianDiffusion(linear())
    x0 = torch.linspace(-0.9, 0.9, 12, dtype=torch.float64).view(4, 3, 1, 1)
    for denoise in (gaussian_eps(d.schedule, 0.25), as_output(d, lambda x, t: two_humps(d, x, t))):
        errors = []
        for steps in (10, 50, 250):
            latent = final(ddim_invert(d, denoise, x0, steps=steps))
            back = final(ddim(d, denoise, latent, steps=steps, clip_x0=False))
            errors.append(float((back - x0).abs().max()))
        assert errors[0] > 3 * errors[1] > 9 * errors[2]
        assert errors[2] < 0.03


def test_inversion_ends_where_ddim_begins() -> None:
    """The latent of N(0, s2) data has the variance of q(x_t) at the highest of the visited timesteps."""
    d = GaussianDiffusion(linear())
    abar = float(d.schedule.alphas_cumprod[980])
    steps = list(
        ddim_invert(d, gaussian_eps(d.schedule, 0.25), torch.full((1, 1), 0.5, dtype=torch.float64), steps=50)
    )
    assert [step.t for step in steps] == evenly_spaced(1000, 50)[:-1]
    assert float(steps[-1].x) == pytest.approx((abar * 0.25 + 1 - abar) ** 0.5, rel=0.1)


def test_ddim_approaches_the_data_as_steps_grow() -> None:
    """The deterministic sampler multiplies x_T by a constant: the data's 0.5, but for its discretisation."""
    d = GaussianDiffusion(linear())
    x_T = torch.ones(1, 1, dtype=torch.float64)
    gains = [
        float(final(ddim(d, gaussian_eps(d.schedule, 0.25), x_T, steps=steps, clip_x0=False)))
        for steps in (10, 50, 1000)
    ]
    errors = [abs(gain - 0.5) for gain in gains]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.005


def test_ddim_with_full_noise_is_ancestral_sampling() -> None:
    d = GaussianDiffusion(linear(100), variance=Variance.FIXED_SMALL)
    noise = sample_noise((3, 4, 4), 4)
    stochastic = ddim(
        d, wavy, noise(0).double(), steps=100, eta=1.0, noise_fn=lambda draw: noise(draw).double()
    )
    plain = ancestral(d, wavy, noise(0).double(), lambda draw: noise(draw).double())
    count = 0
    for a, b in zip(stochastic, plain, strict=True):
        assert a.t == b.t == 99 - count
        torch.testing.assert_close(a.x, b.x, atol=1e-9, rtol=0)
        count += 1
    assert count == 100


@pytest.mark.parametrize("clip", [True, False])
def test_ddim_trajectory_against_diffusers(clip: bool) -> None:
    theirs = DDIMScheduler(beta_schedule="linear", clip_sample=clip, set_alpha_to_one=True)
    theirs.set_timesteps(50)
    d = GaussianDiffusion(linear())
    x_T = sample_noise((3, 4, 4), 4)(0)
    x = x_T
    steps = list(ddim(d, wavy, x_T, steps=50, clip_x0=clip))
    assert [step.t for step in steps] == theirs.timesteps.tolist()
    for step in steps:
        out = theirs.step(wavy(x, torch.full((4,), step.t)), step.t, x, use_clipped_model_output=True)
        x = out.prev_sample
        torch.testing.assert_close(step.x, x, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(step.x0_hat, out.pred_original_sample, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("variance", "steps"),
    [(Variance.FIXED_SMALL, 1000), (Variance.FIXED_SMALL, 25), (Variance.FIXED_LARGE, 50)],
)
def test_ancestral_trajectory_against_diffusers(variance: Variance, steps: int) -> None:
    theirs = DDPMScheduler(beta_schedule="linear", variance_type=variance.value.replace("-", "_"))
    theirs.set_timesteps(steps)
    d = GaussianDiffusion(linear(), variance=variance)
    generator, again = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    x = x_T = sample_noise((3, 4, 4), 2)(0)
    timesteps = None if steps == 1000 else evenly_spaced(1000, steps)
    mine = ancestral(d, wavy, x_T, lambda draw: torch.randn(x_T.shape, generator=generator), timesteps)
    for t, step in zip(theirs.timesteps.tolist(), mine, strict=True):
        assert step.t == t
        x = theirs.step(wavy(x, torch.full((2,), t)), t, x, generator=again).prev_sample
        torch.testing.assert_close(step.x, x, atol=1e-4, rtol=1e-3)


def test_draws_count_from_one_and_the_last_step_needs_none() -> None:
    d = GaussianDiffusion(linear(6))
    asked: list[int] = []

    def noise(draw: int) -> Tensor:
        asked.append(draw)
        return torch.zeros(1, 1, 2, 2)

    x_T = torch.ones(1, 1, 2, 2)
    steps = list(ancestral(d, wavy, x_T, noise))
    assert asked == [1, 2, 3, 4, 5]
    assert [step.t for step in steps] == [5, 4, 3, 2, 1, 0]
    torch.testing.assert_close(steps[-1].x, steps[-1].x0_hat)
    asked.clear()
    final(ddim(d, wavy, x_T, steps=3, eta=0.5, noise_fn=noise))
    assert asked == [1, 2]


def test_no_gradients_are_recorded_and_the_caller_keeps_theirs() -> None:
    d = GaussianDiffusion(linear(4))
    weight = torch.ones(1, requires_grad=True)
    for step in ddim(d, lambda x, t: x * weight, torch.ones(1, 1, 2, 2), steps=2):
        assert not step.x.requires_grad
        assert (weight * 2).requires_grad


@pytest.mark.parametrize(("T", "steps"), [(1000, 50), (1000, 300), (10, 10), (7, 3), (1, 1)])
def test_evenly_spaced(T: int, steps: int) -> None:
    spaced = evenly_spaced(T, steps)
    assert len(spaced) == steps
    assert spaced[0] == 0
    assert spaced[-1] < T
    gaps = {b - a for a, b in zip(spaced, [*spaced[1:], T], strict=True)}
    assert max(gaps) - min(gaps) <= 1


def test_bad_arguments_are_refused_at_the_call() -> None:
    d = GaussianDiffusion(linear(10))
    x_T = torch.ones(1, 1, 2, 2)
    with pytest.raises(ValueError, match=r"steps must lie in \[1, 10\]"):
        ddim(d, wavy, x_T, steps=11)
    with pytest.raises(ValueError, match=r"eta must lie in \[0, 1\]"):
        ddim(d, wavy, x_T, steps=5, eta=1.5)
    with pytest.raises(ValueError, match="needs noise_fn"):
        ddim(d, wavy, x_T, steps=5, eta=0.5)
    with pytest.raises(ValueError, match=r"steps must lie in \[1, 10\]"):
        ddim_invert(d, wavy, x_T, steps=11)
    with pytest.raises(ValueError, match="steps must be 2 or more, got 1"):
        ddim_invert(d, wavy, x_T, steps=1)
    with pytest.raises(ValueError, match="increase strictly"):
        ancestral(d, wavy, x_T, lambda draw: x_T, [3, 1])
    with pytest.raises(ValueError, match="noise_fn gave"):
        final(ancestral(d, wavy, x_T, lambda draw: torch.zeros(1, 1, 1, 1)))
    with pytest.raises(ValueError, match="model_output has shape"):
        final(ancestral(d, lambda x, t: torch.cat([x, x], dim=1), x_T, lambda draw: x_T))
