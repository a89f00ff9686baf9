"""The bound where its value is known: pixel bins, the prior, Gaussian data; and the estimate of it."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from torch import Tensor

from trainer.diffusion.likelihood import (
    BitsEstimate,
    bits_by_timestep,
    bits_per_dim,
    discretized_gaussian_log_likelihood,
    estimate_bits_per_dim,
    normal_kl,
    prior_bits,
    vb_terms,
)
from trainer.diffusion.process import GaussianDiffusion, Prediction, Variance
from trainer.diffusion.samplers import Denoise
from trainer.diffusion.schedule import Schedule, ScheduleConfig, ScheduleKind, from_config, linear
from trainer.randomness import Purpose, normal

LEVELS = torch.arange(256, dtype=torch.float64) / 127.5 - 1


def gaussian_output(schedule: Schedule, s2: float, prediction: Prediction) -> Denoise:
    """The best prediction there is for x_0 ~ N(0, s2): a multiple of x_t."""
    d = GaussianDiffusion(schedule, prediction)
    shrink = schedule.sqrt_alphas_cumprod * s2
    gain = torch.tensor(shrink / (schedule.alphas_cumprod * s2 + 1 - schedule.alphas_cumprod))

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        x0_hat = gain[t].to(x.dtype).view(-1, *[1] * (x.ndim - 1)) * x
        return d.target(x0_hat, x, t, d.eps_from_x0(x, t, x0_hat))

    return denoise


@given(st.floats(-1.3, 1.3), st.floats(-9, 2))
@settings(max_examples=100, deadline=None)
def test_the_probabilities_of_all_levels_sum_to_one(mean: float, log_scale: float) -> None:
    means, scales = torch.full_like(LEVELS, mean), torch.full_like(LEVELS, log_scale)
    total = discretized_gaussian_log_likelihood(LEVELS, means, scales).exp().sum()
    assert float(total) == pytest.approx(1.0, abs=1e-6)
    single = discretized_gaussian_log_likelihood(LEVELS.float(), means.float(), scales.float()).exp().sum()
    assert float(single) == pytest.approx(1.0, abs=1e-5)


def test_the_distribution_function_is_the_papers_approximation() -> None:
    """Each bin is off by as much as tanh is from erf; the greatest error of that is known."""
    edges = torch.linspace(-6, 6, 4801, dtype=torch.float64)
    # The level -1 takes everything below its upper edge, which is all of the distribution function.
    below = discretized_gaussian_log_likelihood(
        torch.full_like(edges, -1.0), -1.0 + 1 / 255 - edges, torch.zeros_like(edges)
    ).exp()
    error = np.abs(below.numpy() - norm.cdf(edges.numpy())).max()
    assert 1.7e-4 < error < 1.8e-4


@given(st.integers(0, 255), st.floats(-1.2, 1.2), st.floats(-6, 1))
@settings(max_examples=100, deadline=None)
def test_each_level_has_its_bins_probability(level: int, mean: float, log_scale: float) -> None:
    x = LEVELS[level : level + 1]
    nats = discretized_gaussian_log_likelihood(x, torch.full_like(x, mean), torch.full_like(x, log_scale))
    distribution = norm(mean, math.exp(log_scale))
    upper = 1.0 if level == 255 else distribution.cdf(float(x) + 1 / 255)
    lower = 0.0 if level == 0 else distribution.cdf(float(x) - 1 / 255)
    assert math.exp(float(nats)) == pytest.approx(upper - lower, abs=4e-4)


@pytest.mark.parametrize("far", [-50.0, 50.0])
def test_the_edges_take_the_tails(far: float) -> None:
    means, scales = torch.full_like(LEVELS, far), torch.full_like(LEVELS, -3.0)
    nats = discretized_gaussian_log_likelihood(LEVELS, means, scales)
    assert int(nats.argmax()) == (0 if far < 0 else 255)
    assert float(nats.max()) == pytest.approx(0.0, abs=1e-9)
    assert float(nats.min()) == pytest.approx(math.log(1e-12))  # never minus infinity


@given(*(st.floats(-3, 3) for _ in range(4)))
@settings(max_examples=60, deadline=None)
def test_kl_of_normals(mean1: float, log1: float, mean2: float, log2: float) -> None:
    ours = normal_kl(*(torch.tensor(value, dtype=torch.float64) for value in (mean1, log1, mean2, log2)))
    against = torch.distributions.kl_divergence(
        torch.distributions.Normal(torch.tensor(mean1, dtype=torch.float64), math.exp(log1 / 2)),
        torch.distributions.Normal(torch.tensor(mean2, dtype=torch.float64), math.exp(log2 / 2)),
    )
    assert float(ours) == pytest.approx(float(against), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("value", "expected"), [(0.0, 5.9e-10), (0.5, 7.28e-6), (-1.0, 2.91e-5)])
def test_prior(value: float, expected: float, dtype: torch.dtype) -> None:
    bits = prior_bits(GaussianDiffusion(linear()), torch.full((2, 3, 4, 4), value, dtype=dtype))
    assert bits.dtype == dtype
    assert bits.tolist() == [pytest.approx(expected, rel=0.01)] * 2


def test_prior_of_random_pictures_is_the_papers() -> None:
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (4, 3, 32, 32), generator=generator) / 127.5 - 1
    bits = prior_bits(GaussianDiffusion(linear()), pictures)
    assert float(bits.mean()) == pytest.approx(1e-5, rel=0.1)  # section 4.3: "L_T ~ 1e-5"
    expected = 0.5 * linear().alphas_cumprod[-1] * float(pictures.double().square().mean()) / math.log(2)
    assert float(bits.mean()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("prediction", "s2", "variance", "expected"),
    [
        (Prediction.EPS, 0.25, Variance.FIXED_SMALL, 6.302444155),
        (Prediction.MU, 0.25, Variance.FIXED_LARGE, 5.645648320),
        (Prediction.V, 1.0, Variance.FIXED_SMALL, 7.314554033),
        (Prediction.X0, 1.0, Variance.FIXED_LARGE, 6.643856190),
    ],
)
def test_rate_of_gaussian_data_is_exact(
    prediction: Prediction, s2: float, variance: Variance, expected: float
) -> None:
    """The KL terms are quadratic in x_0 and noise, so two values of each integrate them exactly."""
    d = GaussianDiffusion(linear(), prediction, variance)
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    x0, noise = math.sqrt(s2) * signs[:, :1], signs[:, 1:]
    bits = bits_per_dim(d, gaussian_output(d.schedule, s2, prediction), x0, lambda t: noise, clip_x0=False)
    rate = float((bits.rate[:, 1:].sum(1) + bits.prior).mean())
    assert rate == pytest.approx(expected, abs=1e-9)
    assert bits.total.tolist() == pytest.approx((bits.rate.sum(1) + bits.prior).tolist(), rel=1e-12)
    # The errors of the best estimate, of x_0 and of eps, averaged over the same values.
    abar = d.schedule.alphas_cumprod
    remaining = s2 * (1 - abar) / (abar * s2 + 1 - abar)
    np.testing.assert_allclose(bits.x0_mse.mean(0).numpy(), remaining, rtol=1e-6)
    np.testing.assert_allclose(bits.eps_mse.mean(0).numpy(), d.schedule.snr * remaining, rtol=1e-6)


def pictures(n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 1, 4, 4), generator=generator) / 127.5 - 1


def test_the_terms_come_one_by_one_too() -> None:
    d = GaussianDiffusion(linear(12, 0.01, 0.3), variance=Variance.FIXED_LARGE)
    x0, denoise = pictures(3), gaussian_output(d.schedule, 0.3, Prediction.EPS)
    asked, done = [], []

    def noise(t: int) -> Tensor:
        asked.append(t)
        return normal(1, Purpose.NOISE, torch.arange(3), (1, 4, 4), draw=t)

    whole = bits_per_dim(d, denoise, x0, noise, progress=done.append)
    assert asked == list(range(11, -1, -1))
    assert done == list(range(1, 13))
    for term in bits_by_timestep(d, denoise, x0, noise):
        assert torch.equal(term.rate, whole.rate[:, term.t])
        assert torch.equal(term.x0_mse, whole.x0_mse[:, term.t])
        assert torch.equal(term.eps_mse, whole.eps_mse[:, term.t])
    assert whole.rate.shape == (3, 12)
    assert whole.total.dtype == torch.float32


def test_no_gradients_are_recorded() -> None:
    d = GaussianDiffusion(linear(4, 0.1, 0.3))
    weight = torch.ones(1, requires_grad=True)
    x0 = pictures(2)
    bits = bits_per_dim(d, lambda x, t: x * weight, x0, lambda t: x0)
    uniforms = torch.zeros(2, 1, dtype=torch.float64)
    estimate = estimate_bits_per_dim(d, lambda x, t: x * weight, x0, uniforms, lambda k: x0)
    assert not bits.total.requires_grad
    assert not estimate.per_image.requires_grad


def test_one_draw_per_stratum_is_the_exact_bound() -> None:
    """T - 1 strata of one timestep each leave nothing to chance but the noise."""
    d = GaussianDiffusion(linear(9, 0.01, 0.4), variance=Variance.FIXED_LARGE)
    x0, denoise = pictures(3), gaussian_output(d.schedule, 0.3, Prediction.EPS)
    noise = normal(2, Purpose.NOISE, torch.arange(3), (1, 4, 4))
    exact = bits_per_dim(d, denoise, x0, lambda t: noise)
    uniforms = torch.rand(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    estimate = estimate_bits_per_dim(d, denoise, x0, uniforms, lambda k: noise)
    torch.testing.assert_close(estimate.per_image.float(), exact.total)


@pytest.mark.parametrize("T", [1, 2, 40])
@pytest.mark.parametrize("K", [1, 3, 7])
def test_the_estimate_is_unbiased(T: int, K: int) -> None:
    """Over evenly spaced uniforms its mean is the integral it estimates: no luck is involved."""
    d = GaussianDiffusion(linear(T, 0.01, 0.4), variance=Variance.FIXED_LARGE)
    denoise = gaussian_output(d.schedule, 0.3, Prediction.EPS)
    # Enough points that each stratum's parts of timesteps are whole numbers of points.
    points = 13 * max(T - 1, 1) * K
    x0 = pictures(1).expand(points, -1, -1, -1)
    noise = normal(3, Purpose.NOISE, torch.zeros(1, dtype=torch.int64), (1, 4, 4)).expand_as(x0)
    exact = bits_per_dim(d, denoise, x0[:1], lambda t: noise[:1]).total
    u = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    estimate = estimate_bits_per_dim(d, denoise, x0, u[:, None].expand(-1, K), lambda k: noise)
    assert estimate.mean == pytest.approx(float(exact), rel=1e-6)


def test_the_standard_error_is_right() -> None:
    """200 estimates of 64 copies of one picture spread as each of them says, around the exact bound."""
    d = GaussianDiffusion(linear(60, 0.005, 0.3), variance=Variance.FIXED_LARGE)
    denoise = gaussian_output(d.schedule, 0.3, Prediction.EPS)
    x0 = pictures(1).expand(64, -1, -1, -1)
    noise = normal(4, Purpose.NOISE, torch.zeros(1, dtype=torch.int64), (1, 4, 4)).expand_as(x0)
    exact = float(bits_per_dim(d, denoise, x0[:1], lambda t: noise[:1]).total)
    generator = torch.Generator().manual_seed(5)
    estimates = [
        estimate_bits_per_dim(
            d, denoise, x0, torch.rand(64, 2, generator=generator, dtype=torch.float64), lambda k: noise
        )
        for _ in range(200)
    ]
    means = np.array([estimate.mean for estimate in estimates])
    stated = float(np.mean([estimate.standard_error for estimate in estimates]))
    assert means.std() == pytest.approx(stated, rel=0.15)
    assert abs(means.mean() - exact) < 4 * stated / math.sqrt(200)
    assert np.mean(np.abs(means - exact) < 1.96 * stated) == pytest.approx(0.95, abs=0.04)
    one = BitsEstimate.of(torch.tensor([3.5]))
    assert one.mean == 3.5
    assert math.isnan(one.standard_error)


def test_both_kinds_of_terms_in_one_batch() -> None:
    d = GaussianDiffusion(linear(), variance=Variance.FIXED_LARGE)
    x0, t = pictures(2), torch.tensor([0, 700])
    noise = normal(6, Purpose.NOISE, torch.arange(2), (1, 4, 4))
    x_t = d.q_sample(x0, t, noise)
    both, x0_hat = vb_terms(d, noise * 0.9, x0, x_t, t, clip_x0=True)
    step = d.p_mean_variance(noise * 0.9, x_t, t)
    decoder = -discretized_gaussian_log_likelihood(
        x0[:1], step.mean[:1], 0.5 * step.log_variance[:1].expand_as(x0[:1])
    )
    # KL of isotropic normals, in its textbook form.
    true_mean = d.q_posterior_mean(x0, x_t, t)[1]
    v1, v2 = float(d.gather("posterior_variance", t, x0)[1]), float(step.variance[1])
    kl = 0.5 * (v1 / v2 - 1 + math.log(v2 / v1) + (true_mean - step.mean[1]).square() / v2)
    assert both.tolist() == pytest.approx(
        [float(decoder.mean()) / math.log(2), float(kl.mean()) / math.log(2)], rel=1e-4
    )
    assert torch.equal(x0_hat, step.x0_hat)


@pytest.mark.parametrize("prediction", [Prediction.X0, Prediction.MU, Prediction.V])
def test_zero_terminal_snr_stays_finite(prediction: Prediction) -> None:
    schedule = from_config(ScheduleConfig(ScheduleKind.JSD, 25))
    d = GaussianDiffusion(schedule, prediction, Variance.FIXED_LARGE)
    x0 = pictures(2)
    noise = normal(7, Purpose.NOISE, torch.arange(2), (1, 4, 4))
    bits = bits_per_dim(d, gaussian_output(schedule, 0.3, prediction), x0, lambda t: noise)
    for tensor in vars(bits).values():
        assert bool(torch.isfinite(tensor).all())
    assert bits.prior.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (pictures(2) * 127.5, r"needs images in \[-1, 1\], got -.*scale 8-bit pixels by x / 127.5 - 1"),
        (pictures(2) * math.nan, r"needs images in \[-1, 1\], got nan"),
        (
            (pictures(2) * 127).to(torch.uint8),
            r"needs float32 images \[N, ...\], got torch.uint8 \[2, 1, 4, 4\]",
        ),
        (pictures(2).bfloat16(), "needs float32 images"),
        (pictures(2).flatten(), "needs float32 images"),
    ],
)
def test_bad_images(images: Tensor, message: str) -> None:
    d = GaussianDiffusion(linear(4, 0.1, 0.3))
    with pytest.raises(ValueError, match=message):
        bits_by_timestep(d, lambda x, t: x, images, lambda t: images)
    with pytest.raises(ValueError, match=message):
        bits_per_dim(d, lambda x, t: x, images, lambda t: images)
    with pytest.raises(ValueError, match=message):
        estimate_bits_per_dim(
            d, lambda x, t: x, images, torch.zeros(2, 1, dtype=torch.float64), lambda k: images
        )
    with pytest.raises(ValueError, match=message):
        prior_bits(d, images)
    with pytest.raises(ValueError, match=message):
        vb_terms(d, images, images, images, torch.zeros(2, dtype=torch.int64), clip_x0=True)


def test_bad_input() -> None:
    d = GaussianDiffusion(linear(4, 0.1, 0.3))
    x0 = pictures(2)
    fine = torch.zeros(2, 1, dtype=torch.float64)
    assert math.isfinite(estimate_bits_per_dim(d, lambda x, t: x, x0 * (1 + 1e-7), fine, lambda k: x0).mean)
    with pytest.raises(ValueError, match=r"timesteps must lie in \[0, 4\), got 0..4"):
        vb_terms(d, x0, x0, x0, torch.tensor([0, 4]), clip_x0=True)
    with pytest.raises(ValueError, match="noise has shape"):
        bits_per_dim(d, lambda x, t: x, x0, lambda t: x0[:1])
    for uniforms in (fine.float(), fine[:1], fine[:, 0]):
        with pytest.raises(ValueError, match=r"uniforms must be float64 of shape \[2, K\]"):
            estimate_bits_per_dim(d, lambda x, t: x, x0, uniforms, lambda k: x0)
    with pytest.raises(ValueError, match="at least one draw"):
        estimate_bits_per_dim(d, lambda x, t: x, x0, fine[:, :0], lambda k: x0)
