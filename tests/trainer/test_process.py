"""The process against diffusers, against composed forward steps and against itself."""

from dataclasses import astuple

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer.diffusion.process import GaussianDiffusion, Prediction, Variance
from trainer.diffusion.schedule import ScheduleConfig, ScheduleKind, from_config, linear

TIMESTEPS = torch.tensor([0, 1, 10, 250, 500, 998, 999])
FIXED = [Variance.FIXED_SMALL, Variance.FIXED_LARGE]
# diffusers knows no mu.
THEIR_NAMES = {Prediction.EPS: "epsilon", Prediction.X0: "sample", Prediction.V: "v_prediction"}


def images(seed: int, dtype: torch.dtype = torch.float32, n: int = len(TIMESTEPS)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.rand(n, 3, 4, 4, generator=generator, dtype=dtype) * 2 - 1
    return x0, torch.randn(n, 3, 4, 4, generator=generator, dtype=dtype)


def test_q_sample_against_diffusers() -> None:
    x0, noise = images(0)
    theirs = DDPMScheduler(beta_schedule="linear").add_noise(x0, noise, TIMESTEPS)
    torch.testing.assert_close(
        GaussianDiffusion(linear()).q_sample(x0, TIMESTEPS, noise), theirs, atol=1e-5, rtol=0
    )


def test_noise_levels_survive_autocast() -> None:
    """In half precision the first timesteps add no noise and a thousand levels collapse to 190."""
    schedule = linear()
    t = torch.arange(1000)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.bfloat16  # autocast is on
        x_t = GaussianDiffusion(schedule).q_sample(torch.zeros(1000, 1), t, torch.ones(1000, 1))
    assert x_t.dtype == torch.float32
    sigma = x_t[:, 0].double().numpy()
    np.testing.assert_allclose(sigma, schedule.sqrt_one_minus_alphas_cumprod, rtol=1e-6)
    assert len(np.unique(sigma)) == 1000


def test_posterior_agrees_with_q_over_one_step() -> None:
    """q(x_{t-1} | x_0) = integral of q(x_{t-1} | x_t, x_0) q(x_t | x_0): means and variances match."""
    d = GaussianDiffusion(linear())
    x0, _ = images(1, torch.float64)
    s = d.schedule
    mean_t = d.q_sample(x0, TIMESTEPS, torch.zeros_like(x0))
    mean = d.q_posterior_mean(x0, mean_t, TIMESTEPS)
    before = torch.tensor(np.sqrt(s.alphas_cumprod_prev))[TIMESTEPS].view(-1, 1, 1, 1)
    torch.testing.assert_close(mean, before * x0, atol=1e-12, rtol=0)
    t = TIMESTEPS.numpy()
    variance = s.posterior_variance[t] + s.posterior_mean_coef_xt[t] ** 2 * (1 - s.alphas_cumprod[t])
    np.testing.assert_allclose(variance, 1 - s.alphas_cumprod_prev[t], atol=1e-15, rtol=1e-10)


@given(st.sampled_from(list(ScheduleKind)), st.integers(1, 400), st.floats(-1, 1), st.floats(-4, 4))
@settings(max_examples=40, deadline=None)
def test_q_is_the_forward_steps_composed(kind: ScheduleKind, T: int, x0: float, noise: float) -> None:
    """T single steps (eq. 2), by their mean and variance, against the jump (eq. 4) from each timestep."""
    d = GaussianDiffusion(from_config(ScheduleConfig(kind, T)), Prediction.V)
    t = torch.arange(T)
    pictures, noises = (torch.full((T, 1), value, dtype=torch.float64) for value in (x0, noise))
    x_t = d.q_sample(pictures, t, noises)
    mean, variance = x0, 0.0
    for i, beta in enumerate(d.schedule.betas.tolist()):
        mean, variance = (1 - beta) ** 0.5 * mean, (1 - beta) * variance + beta
        assert float(x_t[i]) == pytest.approx(mean + variance**0.5 * noise, abs=1e-10)


@given(
    st.sampled_from(list(ScheduleKind)),
    st.integers(1, 1200),
    st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=6),
    st.integers(0, 2**31),
    st.sampled_from(list(Prediction)),
    st.sampled_from(list(Variance)),
)
@settings(max_examples=120, deadline=None)
def test_round_trips(
    kind: ScheduleKind, T: int, places: list[float], seed: int, prediction: Prediction, variance: Variance
) -> None:
    """The target is what leads back to x_0 and eps, whatever schedule, prediction and variance."""
    if prediction is Prediction.EPS and kind is ScheduleKind.JSD:
        kind = ScheduleKind.COSINE
    d = GaussianDiffusion(from_config(ScheduleConfig(kind, T)), prediction, variance)
    t = torch.tensor([int(place * T) for place in places])
    x0, noise = images(seed, torch.float64, len(t))
    x_t = d.q_sample(x0, t, noise)
    output = d.target(x0, x_t, t, noise)
    if variance.is_learned:
        output = torch.cat([output, torch.full_like(output, 7.0)], dim=1)
    # Out of almost pure noise (abar_T of constant betas: 1e-11) x_0 is found with its relative error only.
    loss_of_signal = float(1 / np.sqrt(d.schedule.alphas_cumprod[t.max()] + 1e-300))
    amplified = {Prediction.EPS: loss_of_signal, Prediction.MU: 1e3 * loss_of_signal}.get(prediction, 1.0)
    torch.testing.assert_close(d.predict_x0(x_t, t, output), x0, atol=1e-12 * min(amplified, 1e7), rtol=0)
    torch.testing.assert_close(d.predict_eps(x_t, t, output), noise, atol=1e-9, rtol=0)
    torch.testing.assert_close(d.eps_from_x0(x_t, t, x0), noise, atol=1e-9, rtol=0)
    v = d.v_from(x0, t, noise)
    torch.testing.assert_close(d.x0_from_v(x_t, t, v), x0, atol=1e-12, rtol=0)
    torch.testing.assert_close(d.eps_from_v(x_t, t, v), noise, atol=1e-12, rtol=0)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("prediction", list(THEIR_NAMES))
@pytest.mark.parametrize("variance", FIXED)
def test_reverse_step_against_diffusers(variance: Variance, prediction: Prediction, clip: bool) -> None:
    """Their whole step against ours, with the noise their generator will draw.

    Their tables are float32; widened to ours, what remains is the formulae, and those agree to rounding.
    """
    d = GaussianDiffusion(linear(), prediction, variance)
    theirs = DDPMScheduler(
        beta_schedule="linear",
        variance_type=variance.value.replace("-", "_"),
        prediction_type=THEIR_NAMES[prediction],
        clip_sample=clip,
    )
    theirs.alphas_cumprod = torch.tensor(d.schedule.alphas_cumprod)
    theirs.one = torch.tensor(1.0, dtype=torch.float64)
    x_t, output = images(2, torch.float64)
    for i, t in enumerate(TIMESTEPS.tolist()):
        x, out, at = x_t[i : i + 1], output[i : i + 1], TIMESTEPS[i : i + 1]
        step = d.p_mean_variance(out, x, at, clip_x0=clip)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        ours = step.mean + (0.5 * step.log_variance).exp() * noise * (t > 0)
        expected = theirs.step(out, t, x, generator=torch.Generator().manual_seed(5))
        torch.testing.assert_close(ours, expected.prev_sample, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(step.x0_hat, expected.pred_original_sample, atol=1e-9, rtol=1e-9)
        if t > 0:
            torch.testing.assert_close(step.variance.log(), step.log_variance, atol=1e-9, rtol=0)


@pytest.mark.parametrize("variance", FIXED)
def test_step_against_diffusers_as_shipped(variance: Variance) -> None:
    theirs = DDPMScheduler(beta_schedule="linear", variance_type=variance.value.replace("-", "_"))
    x_t, output = images(9)
    for i, t in enumerate(TIMESTEPS.tolist()):
        x, out, at = x_t[i : i + 1], output[i : i + 1], TIMESTEPS[i : i + 1]
        step = GaussianDiffusion(linear(), Prediction.EPS, variance).p_mean_variance(out, x, at)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
        ours = step.mean + (0.5 * step.log_variance).exp() * noise * (t > 0)
        expected = theirs.step(out, t, x, generator=torch.Generator().manual_seed(5)).prev_sample
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


def test_learned_variances_mean_what_they_say() -> None:
    s = linear()
    x_t, values = images(10, torch.float64)
    t = TIMESTEPS.numpy()
    lower, upper = s.posterior_log_variance_clipped[t], np.log(s.betas[t])
    for variance, expected in (
        (Variance.LEARNED, values.numpy()),
        (
            Variance.LEARNED_RANGE,
            ((values.numpy().T + 1) / 2 * upper + (1 - values.numpy().T) / 2 * lower).T,  # eq. 15
        ),
    ):
        d = GaussianDiffusion(s, Prediction.EPS, variance)
        step = d.p_mean_variance(torch.cat([x_t, values], dim=1), x_t, TIMESTEPS)
        np.testing.assert_allclose(step.log_variance.numpy(), expected, atol=1e-12)
        np.testing.assert_allclose(step.variance.numpy(), np.exp(expected), rtol=1e-12)
        fixed = GaussianDiffusion(s).p_mean_variance(x_t, x_t, TIMESTEPS)
        assert torch.equal(step.mean, fixed.mean)
        assert (d.variance.output_channels(3), GaussianDiffusion(s).variance.output_channels(3)) == (6, 3)


def test_mu_is_the_mean_and_clipping_leaves_it_alone() -> None:
    d = GaussianDiffusion(linear(), Prediction.MU)
    x_t, output = images(11)
    step = d.p_mean_variance(output, x_t, TIMESTEPS, clip_x0=True)
    assert torch.equal(step.mean, output)
    assert float(step.x0_hat.abs().max()) == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("prediction", [Prediction.X0, Prediction.MU, Prediction.V])
@pytest.mark.parametrize("variance", list(Variance))
def test_zero_terminal_snr_stays_finite(
    prediction: Prediction, variance: Variance, dtype: torch.dtype
) -> None:
    d = GaussianDiffusion(from_config(ScheduleConfig(ScheduleKind.JSD, 50)), prediction, variance)
    t = torch.arange(50)
    x0, noise = images(12, dtype, 50)
    x_t = d.q_sample(x0, t, noise)
    assert torch.equal(x_t[-1], noise[-1])
    output = torch.cat([noise, x0], dim=1) if variance.is_learned else noise
    for clip in (True, False):
        for tensor in astuple(d.p_mean_variance(output, x_t, t, clip)):
            assert bool(torch.isfinite(tensor).all())
    assert bool(torch.isfinite(d.predict_eps(x_t, t, output)).all())
    assert bool(torch.isfinite(d.target(x0, x_t, t, noise)).all())


def test_eps_of_pure_noise_is_refused() -> None:
    schedule = from_config(ScheduleConfig(ScheduleKind.JSD, 50))
    with pytest.raises(
        ValueError, match="prediction = eps cannot go with a schedule that ends in pure noise"
    ):
        GaussianDiffusion(schedule, Prediction.EPS)
    d = GaussianDiffusion(schedule, Prediction.V)
    x_t, eps = images(13, n=2)
    assert bool(torch.isfinite(d.x0_from_eps(x_t, torch.tensor([0, 48]), eps)).all())
    with pytest.raises(ValueError, match="x_0 cannot be told from eps at timestep 49"):
        d.x0_from_eps(x_t, torch.tensor([0, 49]), eps)


def test_respaced_outputs_keep_their_meaning() -> None:
    """Of 1000 timesteps 9: mu still holds the same x_0, a raw log-variance its place between the extremes."""
    s, visited = linear(), [0, 3, 100, 250, 500, 750, 900, 998, 999]
    index, t = torch.arange(9), torch.tensor(visited)
    x0, noise = images(14, torch.float64, 9)
    full = GaussianDiffusion(s, Prediction.MU, Variance.LEARNED)
    x_t = full.q_sample(x0, t, noise)
    place = torch.linspace(0, 1, 9, dtype=torch.float64).view(-1, 1, 1, 1).expand_as(x0)
    lower, width = (
        full.gather(name, t, x0) for name in ("posterior_log_variance_clipped", "log_variance_range")
    )
    output = torch.cat([full.q_posterior_mean(x0, x_t, t), lower + place * width], dim=1)
    few = full.respaced(visited)
    step = few.p_mean_variance(output, x_t, index)
    torch.testing.assert_close(step.x0_hat, x0, atol=1e-8, rtol=0)
    torch.testing.assert_close(step.mean, few.q_posterior_mean(x0, x_t, index), atol=1e-8, rtol=0)
    new_lower = few.gather("posterior_log_variance_clipped", index, x0)
    expected = new_lower + place * (few.gather("betas", index, x0).log() - new_lower)
    torch.testing.assert_close(step.log_variance, expected, atol=1e-8, rtol=0)
    # Outside the extremes the strided process takes the nearer one, the whole process what it is told.
    wild = torch.cat([output[:, :3], torch.full_like(x0, 9.0)], dim=1)
    torch.testing.assert_close(
        few.p_mean_variance(wild, x_t, index).log_variance,
        few.gather("betas", index, x0).log().expand_as(x0),
    )
    assert float(full.p_mean_variance(wild, x_t, t).log_variance.min()) == 9.0
    assert full.respaced(range(1000)) is full
    again = few.respaced([1, 4, 8]).p_mean_variance(output[[1, 4, 8]], x_t[[1, 4, 8]], torch.arange(3))
    torch.testing.assert_close(again.x0_hat, x0[[1, 4, 8]], atol=1e-8, rtol=0)


def test_raw_variance_where_the_extremes_meet() -> None:
    """Late steps of constant betas: float32 sees no distance between the extremes, nor may divide by it."""
    schedule = from_config(ScheduleConfig(ScheduleKind.CONSTANT, 4000))
    few = GaussianDiffusion(schedule, Prediction.X0, Variance.LEARNED).respaced([0, 1998, 3998, 3999])
    x_t, _ = images(15, n=4)
    output = torch.cat(
        [x_t, few.gather("posterior_log_variance_clipped", torch.arange(4), x_t).expand_as(x_t)], 1
    )
    assert bool(torch.isfinite(few.p_mean_variance(output, x_t, torch.arange(4)).log_variance).all())


def test_clipping_bites() -> None:
    x_t, output = images(3)
    step = GaussianDiffusion(linear()).p_mean_variance(output, x_t, TIMESTEPS, clip_x0=True)
    free = GaussianDiffusion(linear()).p_mean_variance(output, x_t, TIMESTEPS, clip_x0=False)
    assert float(free.x0_hat.abs().max()) > 10
    assert float(step.x0_hat.abs().max()) == 1.0


def test_low_precision_output_is_widened() -> None:
    x_t, output = images(4)
    d = GaussianDiffusion(linear())
    half = output.bfloat16()
    assert torch.equal(d.predict_x0(x_t, TIMESTEPS, half), d.predict_x0(x_t, TIMESTEPS, half.float()))


def test_tables_made_in_inference_mode_serve_training() -> None:
    d = GaussianDiffusion(linear())
    x_t, output = images(5)
    with torch.inference_mode():
        d.predict_x0(x_t, TIMESTEPS, output)
    leaf = output.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(d.predict_x0(x_t, TIMESTEPS, leaf).sum(), leaf)
    assert bool(gradient.any())


@pytest.mark.parametrize("prediction", list(Prediction))
def test_gradients_against_finite_differences(prediction: Prediction) -> None:
    d = GaussianDiffusion(linear(), prediction, Variance.LEARNED_RANGE)
    x_t, output = images(6, torch.float64)
    x_t, output = x_t[:, :1, :2, :2].contiguous(), output[:, :2, :2, :2].contiguous().requires_grad_()

    def step(o: Tensor) -> tuple[Tensor, Tensor]:
        reverse = d.p_mean_variance(o, x_t, TIMESTEPS, clip_x0=False)
        return reverse.mean, reverse.log_variance

    assert torch.autograd.gradcheck(step, output)


@pytest.mark.parametrize(
    ("t", "message"),
    [
        (torch.tensor([0, 1000]), r"\[0, 1000\), got 0..1000"),
        (torch.tensor([-1, 3]), r"\[0, 1000\), got -1..3"),
        (torch.tensor([0.0, 1.0]), "int64"),
        (torch.tensor([0, 1], dtype=torch.int32), "int64"),
        (torch.tensor([1]), r"of shape \[2\]"),
        (torch.tensor(1), r"of shape \[2\]"),
    ],
)
def test_bad_timesteps(t: Tensor, message: str) -> None:
    d = GaussianDiffusion(linear())
    x0, noise = images(7, n=2)
    with pytest.raises(ValueError, match=message):
        d.q_sample(x0, t, noise)
    with pytest.raises(ValueError, match=message):
        d.p_mean_variance(noise, x0, t)
    with pytest.raises(ValueError, match=message):
        d.v_from(x0, t, noise)


def test_bad_images() -> None:
    d = GaussianDiffusion(linear())
    x0, noise = images(8)
    with pytest.raises(ValueError, match=r"got images of torch\.bfloat16"):
        d.q_sample(x0.bfloat16(), TIMESTEPS, noise)
    with pytest.raises(ValueError, match=r"got images of torch\.uint8"):
        d.q_sample(x0.to(torch.uint8), TIMESTEPS, noise)
    with pytest.raises(ValueError, match=r"noise is torch\.bfloat16"):
        d.q_sample(x0, TIMESTEPS, noise.bfloat16())
    with pytest.raises(ValueError, match="noise has shape"):
        d.q_sample(x0, TIMESTEPS, noise[:, :1])
    with pytest.raises(ValueError, match=r"model_output has shape \[7, 6, 4, 4\]"):
        d.predict_eps(x0, TIMESTEPS, torch.cat([noise, noise], dim=1))
    learned = GaussianDiffusion(linear(), variance=Variance.LEARNED)
    with pytest.raises(
        ValueError, match=r"model_output has shape \[7, 3, 4, 4\], expected \[7, 6, 4, 4\]: twice"
    ):
        learned.p_mean_variance(noise, x0, TIMESTEPS)
    with pytest.raises(ValueError, match=r"learned variance needs images \[B, C, ...\]"):
        learned.p_mean_variance(noise[:, 0, 0, 0], x0[:, 0, 0, 0], TIMESTEPS)
    for method in (d.eps_from_x0, d.x0_from_eps, d.x0_from_v, d.eps_from_v):
        with pytest.raises(ValueError, match="has shape"):
            method(x0, TIMESTEPS, noise[:3])
