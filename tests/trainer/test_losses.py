"""The losses against their definitions, each other and finite differences."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer.diffusion.likelihood import vb_terms
from trainer.diffusion.losses import (
    LossConfig,
    LossKind,
    Weighting,
    check_loss,
    l_simple,
    timestep_weights,
    training_losses,
)
from trainer.diffusion.process import GaussianDiffusion, Prediction, Variance
from trainer.diffusion.schedule import ScheduleConfig, ScheduleKind, from_config, linear

WEIGHTED = [Weighting.MIN_SNR, Weighting.P2]
LEARNED = [Variance.LEARNED, Variance.LEARNED_RANGE]


def batch(n: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0, noise, output = (torch.randn(n, 3, 4, 6, generator=generator) for _ in range(3))
    return x0, noise, output, torch.arange(n) * 200


def doubles(seed: int, n: int, size: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Clean images, noise and estimates of the images, in float64."""
    generator = torch.Generator().manual_seed(seed)
    x0, x0_hat = (
        torch.rand(n, 2, size, size, generator=generator, dtype=torch.float64) * 1.8 - 0.9 for _ in range(2)
    )
    return x0, torch.randn(n, 2, size, size, generator=generator, dtype=torch.float64), x0_hat


@pytest.mark.parametrize("prediction", list(Prediction))
def test_per_sample_mean_square(prediction: Prediction) -> None:
    d = GaussianDiffusion(linear(), prediction)
    x0, noise, output, t = batch()
    x_t = d.q_sample(x0, t, noise)
    loss = l_simple(d, output, x0, x_t, t, noise)
    s, at = d.schedule, t.numpy()

    def mix(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        x, y = (tensor.double().numpy().T for tensor in (x0, noise))
        return (a[at] * x + b[at] * y).T

    signal, sigma = s.sqrt_alphas_cumprod, s.sqrt_one_minus_alphas_cumprod
    target = {
        Prediction.EPS: mix(0 * signal, np.ones(1000)),
        Prediction.X0: mix(np.ones(1000), 0 * signal),
        Prediction.V: mix(-sigma, signal),
        Prediction.MU: mix(
            s.posterior_mean_coef_x0 + s.posterior_mean_coef_xt * signal, s.posterior_mean_coef_xt * sigma
        ),
    }[prediction]
    expected = ((output.double().numpy() - target) ** 2).reshape(5, -1).mean(axis=1)
    assert loss.dtype == torch.float32
    np.testing.assert_allclose(loss.numpy(), expected, rtol=2e-6)
    assert torch.equal(loss, training_losses(d, output, x0, x_t, t, noise, LossConfig()))


@pytest.mark.parametrize("prediction", list(Prediction))
def test_a_perfect_network_has_no_loss(prediction: Prediction) -> None:
    d = GaussianDiffusion(linear(), prediction)
    x0, noise, _, t = batch()
    x_t = d.q_sample(x0, t, noise)
    perfect = d.target(x0, x_t, t, noise)
    assert float(l_simple(d, perfect, x0, x_t, t, noise).max()) == 0


def test_any_output_is_compared_in_float32() -> None:
    d = GaussianDiffusion(linear())
    x0, noise, output, t = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = l_simple(d, output.bfloat16(), x0, x0, t, noise)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, l_simple(d, output.bfloat16().float(), x0, x0, t, noise))
    assert l_simple(d, output.double(), x0, x0, t, noise).dtype == torch.float32


def test_gradient_is_twice_the_error_over_the_pixels() -> None:
    d = GaussianDiffusion(linear())
    x0, noise, output, t = batch()
    output.requires_grad_()
    (gradient,) = torch.autograd.grad(l_simple(d, output, x0, x0, t, noise).sum(), output)
    torch.testing.assert_close(gradient, 2 * (output.detach() - noise) / 72)


def test_l_simple_does_not_look_at_the_variance() -> None:
    x0, noise, output, t = batch()
    d = GaussianDiffusion(linear(), variance=Variance.LEARNED)
    both = torch.cat([output, torch.full_like(output, torch.nan)], dim=1)
    expected = l_simple(GaussianDiffusion(linear()), output, x0, x0, t, noise)
    assert torch.equal(l_simple(d, both, x0, x0, t, noise), expected)


@given(
    st.sampled_from([kind for kind in ScheduleKind if kind is not ScheduleKind.JSD]),
    st.integers(2, 400),
    st.sampled_from(WEIGHTED),
    st.floats(0.1, 20),
    st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None)
def test_weighted_losses_agree_across_predictions(
    kind: ScheduleKind, T: int, weighting: Weighting, number: float, seed: int
) -> None:
    """The same x0_hat costs the same, whether the network put it as x_0, eps, mu or v."""
    schedule = from_config(ScheduleConfig(kind, T))
    config = LossConfig(weighting=weighting, min_snr_gamma=number, p2_gamma=number / 5, p2_k=number)
    x0, noise, x0_hat = doubles(seed, 4)
    t = torch.tensor([0, T // 3, T // 2, T - 1])
    d = GaussianDiffusion(schedule, Prediction.X0)
    x_t = d.q_sample(x0, t, noise)
    eps = d.eps_from_x0(x_t, t, x0_hat)
    outputs = {
        Prediction.X0: x0_hat,
        Prediction.V: d.v_from(x0_hat, t, eps),
        Prediction.MU: d.q_posterior_mean(x0_hat, x_t, t),
        Prediction.EPS: eps,
    }
    losses = {
        prediction: training_losses(
            GaussianDiffusion(schedule, prediction), output, x0, x_t, t, noise, config
        )
        for prediction, output in outputs.items()
    }
    snr = d.gather("snr", t, x0).view(-1)
    on_x0 = {
        Weighting.MIN_SNR: snr.clamp_max(number),
        Weighting.P2: snr / (number + snr) ** (number / 5),
    }[weighting]
    expected = on_x0 * (x0_hat - x0).square().flatten(1).mean(1)
    for prediction, loss in losses.items():
        assert loss.tolist() == pytest.approx(expected.tolist(), rel=1e-6), prediction


def test_the_published_forms_of_the_weights() -> None:
    snr = linear().snr
    config = LossConfig(weighting=Weighting.MIN_SNR, min_snr_gamma=5.0)
    weights = {p: timestep_weights(GaussianDiffusion(linear(), p), config) for p in Prediction}
    np.testing.assert_allclose(weights[Prediction.EPS], np.minimum(1.0, 5.0 / snr))
    np.testing.assert_allclose(weights[Prediction.V], np.minimum(snr, 5.0) / (snr + 1))
    p2 = LossConfig(weighting=Weighting.P2, p2_gamma=0.5, p2_k=2.0)
    np.testing.assert_allclose(timestep_weights(GaussianDiffusion(linear()), p2), 1 / (2.0 + snr) ** 0.5)
    flat = LossConfig(weighting=Weighting.P2, p2_gamma=0.0)
    np.testing.assert_allclose(timestep_weights(GaussianDiffusion(linear()), flat), 1.0)


def test_hybrid_is_the_simple_loss_plus_the_bound_for_the_variance_alone() -> None:
    d = GaussianDiffusion(linear(), variance=Variance.LEARNED_RANGE)
    x0, noise, _ = doubles(1, 4)
    t = torch.tensor([0, 1, 500, 999])
    x_t = d.q_sample(x0, t, noise)
    output = torch.cat([noise * 0.9, x0], dim=1).requires_grad_()
    config = LossConfig(LossKind.HYBRID, hybrid_weight=0.01)
    loss = training_losses(d, output, x0, x_t, t, noise, config)
    bits, _ = vb_terms(d, output, x0, x_t, t, clip_x0=False)
    simple = l_simple(d, output, x0, x_t, t, noise)
    torch.testing.assert_close(loss, simple + 0.01 * 1000 * bits)
    hybrid_gradient, bound_gradient, simple_gradient = (
        torch.autograd.grad(x.sum(), output, retain_graph=True)[0] for x in (loss, bits, simple)
    )
    assert bool(bound_gradient[:, :2].any())
    torch.testing.assert_close(hybrid_gradient[:, :2], simple_gradient[:, :2])
    torch.testing.assert_close(hybrid_gradient[:, 2:], 10 * bound_gradient[:, 2:])
    weighted = training_losses(
        d, output, x0, x_t, t, noise, LossConfig(LossKind.HYBRID, Weighting.MIN_SNR, hybrid_weight=0.01)
    )
    weights = torch.tensor(np.minimum(1.0, 5.0 / linear().snr))[t]
    torch.testing.assert_close(weighted, weights * simple + 10 * bits)


@pytest.mark.parametrize(
    ("prediction", "variance", "config"),
    [
        *(
            (prediction, Variance.FIXED_SMALL, LossConfig(weighting=weighting))
            for prediction, weighting in itertools.product(Prediction, Weighting)
        ),
        *(
            (prediction, variance, LossConfig(LossKind.VB))
            for prediction, variance in itertools.product(Prediction, Variance)
        ),
    ],
)
def test_gradients_against_finite_differences(
    prediction: Prediction, variance: Variance, config: LossConfig
) -> None:
    """Of every loss, at the decoder's timestep, its neighbour and late ones."""
    d = GaussianDiffusion(linear(20, 1e-3, 0.3), prediction, variance)
    x0, noise, x0_hat = doubles(2, 4, size=1)
    t = torch.tensor([0, 1, 9, 19])
    x_t = d.q_sample(x0, t, noise)
    near = 0.98 * x0 + 0.02 * x0_hat
    eps = d.eps_from_x0(x_t, t, near)
    output = d.target(near, x_t, t, eps)
    if variance.is_learned:
        raw = d.gather("posterior_log_variance_clipped", t, x0) + 0.3 * x0_hat
        output = torch.cat([output, raw if variance is Variance.LEARNED else x0_hat], dim=1)
    output.requires_grad_()
    loss = training_losses(d, output, x0, x_t, t, noise, config)
    assert bool((torch.autograd.grad(loss.sum(), output)[0].flatten(1).abs().sum(1) > 0).all())
    assert torch.autograd.gradcheck(
        lambda o: training_losses(d, o, x0, x_t, t, noise, config), output, eps=1e-7, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("variance", LEARNED)
@pytest.mark.parametrize("weighting", list(Weighting))
def test_gradients_of_the_hybrid_against_finite_differences(variance: Variance, weighting: Weighting) -> None:
    """Each half with the other one held: what the mean does to the bound has no gradient by design."""
    d = GaussianDiffusion(linear(20, 1e-3, 0.3), Prediction.EPS, variance)
    x0, noise, x0_hat = doubles(3, 3, size=1)
    t = torch.tensor([0, 5, 19])
    x_t = d.q_sample(x0, t, noise)
    prediction = (noise + 0.01 * x0_hat).requires_grad_()
    values = d.gather("betas", t, x0).log() + 0.1 * x0_hat if variance is Variance.LEARNED else x0_hat
    values = values.clone().requires_grad_()
    config = LossConfig(LossKind.HYBRID, weighting)

    def of_values(v: Tensor) -> Tensor:
        return training_losses(d, torch.cat([prediction.detach(), v], dim=1), x0, x_t, t, noise, config)

    def of_prediction(p: Tensor) -> Tensor:
        frozen = torch.cat([p, values.detach()], dim=1)
        bound, _ = vb_terms(d, frozen.detach(), x0, x_t, t, clip_x0=False)
        return training_losses(d, frozen, x0, x_t, t, noise, config) - 0.02 * bound

    assert torch.autograd.gradcheck(of_values, values, eps=1e-7, atol=1e-5, rtol=1e-4)
    assert torch.autograd.gradcheck(of_prediction, prediction, eps=1e-7, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("prediction", [Prediction.X0, Prediction.MU, Prediction.V])
@pytest.mark.parametrize("variance", list(Variance))
def test_zero_terminal_snr_stays_finite(
    prediction: Prediction, variance: Variance, dtype: torch.dtype
) -> None:
    d = GaussianDiffusion(from_config(ScheduleConfig(ScheduleKind.JSD, 30)), prediction, variance)
    x0, noise, x0_hat = (x.to(dtype) for x in doubles(4, 30))
    t = torch.arange(30)
    x_t = d.q_sample(x0, t, noise)
    output = d.target(x0_hat, x_t, t, d.eps_from_x0(x_t, t, x0_hat))
    if variance.is_learned:
        output = torch.cat([output, x0 - 2], dim=1)
    for kind in LossKind:
        config = LossConfig(kind)
        if kind is not LossKind.VB and (kind is LossKind.HYBRID) != variance.is_learned:
            continue
        leaf = output.clone().requires_grad_()
        loss = training_losses(d, leaf, x0, x_t, t, noise, config)
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        assert bool(torch.isfinite(loss).all())
        assert bool(torch.isfinite(gradient).all())


def test_wild_variances_leave_the_gradient_of_the_bound_finite() -> None:
    """At t = 0 the KL, at t > 0 the decoder is not asked for: neither may overflow into the gradient."""
    d = GaussianDiffusion(linear(), variance=Variance.LEARNED)
    x0, noise, _ = (x.float() for x in doubles(5, 2))
    for t in (torch.tensor([0, 0]), torch.tensor([500, 500])):
        x_t = d.q_sample(x0, t, noise)
        raw = torch.full_like(x0, -90.0 if int(t[0]) == 0 else -80.0)
        output = torch.cat([noise, raw], dim=1).requires_grad_()
        loss = training_losses(d, output, x0, x_t, t, noise, LossConfig(LossKind.VB))
        (gradient,) = torch.autograd.grad(loss.sum(), output)
        assert bool(torch.isfinite(gradient).all())


def test_impossible_losses() -> None:
    eps = GaussianDiffusion(linear())
    learned = GaussianDiffusion(linear(), variance=Variance.LEARNED_RANGE)
    with pytest.raises(ValueError, match="loss = simple gives variance = learned-range no gradient"):
        check_loss(learned, LossConfig())
    with pytest.raises(
        ValueError, match="loss = hybrid is for a learned variance, but variance = fixed-small"
    ):
        check_loss(eps, LossConfig(LossKind.HYBRID))
    with pytest.raises(ValueError, match="weighting = p2 cannot go with it"):
        check_loss(eps, LossConfig(LossKind.VB, Weighting.P2))
    ends_in_noise = GaussianDiffusion(from_config(ScheduleConfig(ScheduleKind.JSD, 30)), Prediction.V)
    check_loss(ends_in_noise, LossConfig())
    with pytest.raises(ValueError, match="weighting = min-snr gives the last timestep no weight"):
        check_loss(ends_in_noise, LossConfig(weighting=Weighting.MIN_SNR))
    for possible in (LossConfig(LossKind.VB), LossConfig(LossKind.HYBRID, Weighting.P2)):
        check_loss(learned, possible)
    x0, noise, output, t = batch()
    with pytest.raises(ValueError, match="loss = hybrid"):
        training_losses(eps, output, x0, x0, t, noise, LossConfig(LossKind.HYBRID))
    for name, value in (("min_snr_gamma", 0.0), ("p2_k", -1.0), ("hybrid_weight", 0.0), ("p2_k", np.nan)):
        with pytest.raises(ValueError, match=f"{name} must be positive"):
            LossConfig(**{name: value})
    with pytest.raises(ValueError, match="p2_gamma must not be negative"):
        LossConfig(p2_gamma=-0.1)


def test_wrong_shapes() -> None:
    d = GaussianDiffusion(linear())
    x0, noise, output, t = batch()
    with pytest.raises(ValueError, match=r"model_output has shape \[5, 6, 4, 6\]"):
        l_simple(d, torch.cat([output, output], dim=1), x0, x0, t, noise)
    with pytest.raises(ValueError, match="noise has shape"):
        l_simple(d, output, x0, x0, t, noise[:1])
    with pytest.raises(ValueError, match=r"t has shape \[1\], but there are 5 images"):
        l_simple(d, output, x0, x0, t[:1], noise)
    with pytest.raises(ValueError, match=r"images in \[-1, 1\]"):
        training_losses(d, output, x0, x0, t, noise, LossConfig(LossKind.VB))
