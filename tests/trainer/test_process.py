"""The process against diffusers, against composed forward steps and against itself."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer.diffusion.process import GaussianDiffusion, Prediction, Variance
from trainer.diffusion.schedule import linear

TIMESTEPS = torch.tensor([0, 1, 10, 250, 500, 998, 999])


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


@given(
    st.lists(st.integers(0, 999), min_size=1, max_size=6),
    st.integers(0, 2**31),
    st.sampled_from(list(Prediction)),
)
@settings(max_examples=50, deadline=None)
def test_round_trips(timesteps: list[int], seed: int, prediction: Prediction) -> None:
    d = GaussianDiffusion(linear(), prediction)
    t = torch.tensor(timesteps)
    x0, noise = images(seed, torch.float64, len(t))
    x_t = d.q_sample(x0, t, noise)
    perfect = noise if prediction is Prediction.EPS else x0
    torch.testing.assert_close(d.predict_x0(x_t, t, perfect), x0, atol=1e-9, rtol=0)
    torch.testing.assert_close(d.predict_eps(x_t, t, perfect), noise, atol=1e-9, rtol=0)
    torch.testing.assert_close(d.eps_from_x0(x_t, t, x0), noise, atol=1e-9, rtol=0)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("prediction", list(Prediction))
@pytest.mark.parametrize("variance", list(Variance))
def test_reverse_step_against_diffusers(variance: Variance, prediction: Prediction, clip: bool) -> None:
    """Their whole step against ours, with the noise their generator will draw.

    Their tables are float32; widened to ours, what remains is the formulae, and those agree to rounding.
    """
    d = GaussianDiffusion(linear(), prediction, variance)
    theirs = DDPMScheduler(
        beta_schedule="linear",
        variance_type=variance.value.replace("-", "_"),
        prediction_type={Prediction.EPS: "epsilon", Prediction.X0: "sample"}[prediction],
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


def test_gradients_against_finite_differences() -> None:
    d = GaussianDiffusion(linear())
    x_t, output = images(6, torch.float64)
    x_t, output = x_t[:, :1, :2, :2].contiguous(), output[:, :1, :2, :2].contiguous().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda o: d.p_mean_variance(o, x_t, TIMESTEPS, clip_x0=False).mean, output
    )


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
