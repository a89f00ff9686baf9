"""Everything OpenAI's package can compute, computed by both: tables, steps, losses, bounds and samplers.

Each comparison runs twice: against the package as it is, whose tables are rounded to float32, and in
float64 with its gather widened, where only the formulae remain and agree to rounding.
"""

import hashlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from guided_diffusion import gaussian_diffusion as oracle
from guided_diffusion.respace import SpacedDiffusion, space_timesteps
from torch import Tensor

from trainer.diffusion.likelihood import bits_per_dim, prior_bits
from trainer.diffusion.losses import LossConfig, LossKind, training_losses
from trainer.diffusion.process import GaussianDiffusion, Prediction, Variance
from trainer.diffusion.samplers import ancestral, ddim, ddim_invert, evenly_spaced
from trainer.diffusion.schedule import Schedule, ScheduleConfig, ScheduleKind, from_config, linear

HASHES = {
    "gaussian_diffusion": "c72bd8d7289d063487d3563e4eb5fa64781743ce8e0d0c522effe529ff85f787",
    "losses": "0b0f5a5532910fbc7f16d30f2b891d8f1e20aa88881589ce4eacc2cc6ce06026",
    "respace": "b9a509b28c10a52ca3ee8cc48f40205b1d70aecfc95356b540dc88415368c2de",
}
TIMESTEPS = torch.tensor([0, 1, 2, 10, *range(49, 950, 100), 998, 999])
MEANS = {
    Prediction.EPS: oracle.ModelMeanType.EPSILON,
    Prediction.X0: oracle.ModelMeanType.START_X,
    Prediction.MU: oracle.ModelMeanType.PREVIOUS_X,
}
VARIANCES = {
    Variance.FIXED_SMALL: oracle.ModelVarType.FIXED_SMALL,
    Variance.FIXED_LARGE: oracle.ModelVarType.FIXED_LARGE,
    Variance.LEARNED: oracle.ModelVarType.LEARNED,
    Variance.LEARNED_RANGE: oracle.ModelVarType.LEARNED_RANGE,
}
LOSSES = {
    "mse": oracle.LossType.MSE,
    "rescaled-mse": oracle.LossType.RESCALED_MSE,
    "kl": oracle.LossType.KL,
    "rescaled-kl": oracle.LossType.RESCALED_KL,
}
every_model = pytest.mark.parametrize(
    ("prediction", "variance"), [(prediction, variance) for prediction in MEANS for variance in VARIANCES]
)


@pytest.fixture(params=[torch.float32, torch.float64], ids=["as-shipped", "widened"])
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    chosen: torch.dtype = request.param
    if chosen == torch.float64:

        def gather(table: np.ndarray, t: Tensor, shape: torch.Size) -> Tensor:
            return torch.from_numpy(table)[t].view(-1, *[1] * (len(shape) - 1)).expand(shape)

        monkeypatch.setattr(oracle, "_extract_into_tensor", gather)
    return chosen


@pytest.fixture(autouse=True)
def own_random_state() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        yield


def theirs(
    prediction: Prediction, variance: Variance, loss: str = "mse", schedule: Schedule | None = None
) -> oracle.GaussianDiffusion:
    return oracle.GaussianDiffusion(
        betas=(schedule or linear()).betas,
        model_mean_type=MEANS[prediction],
        model_var_type=VARIANCES[variance],
        loss_type=LOSSES[loss],
    )


def data(seed: int, dtype: torch.dtype, n: int = len(TIMESTEPS)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.rand(n, 3, 4, 4, generator=generator, dtype=dtype) * 2 - 1
    return x0, torch.randn(n, 3, 4, 4, generator=generator, dtype=dtype)


def network(variance: Variance) -> Callable[[Tensor, Tensor], Tensor]:
    """A closed-form stand-in whose estimates of x_0 leave [-1, 1] at times."""

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        prediction = 0.9 * x + 0.2 * torch.sin(3 * x + t.view(-1, 1, 1, 1) / 100)
        match variance:
            case Variance.LEARNED:
                return torch.cat([prediction, torch.cos(2 * x) - 6], dim=1)
            case Variance.LEARNED_RANGE:
                return torch.cat([prediction, torch.cos(2 * x) + 0.2], dim=1)
        return prediction

    return denoise


def assert_close(ours: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
    """Agreement relative to each sample's largest value: float32 loses what cancels."""
    if tolerance is None:
        tolerance = 1e-5 if expected.dtype == torch.float32 else 1e-11
    assert ours.dtype == expected.dtype
    ours, expected = (x.expand_as(expected).reshape(len(expected), -1) for x in (ours, expected))
    scale = expected.abs().amax(1, keepdim=True) + 1
    torch.testing.assert_close(ours / scale, expected / scale, atol=tolerance, rtol=0)


def test_the_oracle_is_the_one_these_tests_were_written_against() -> None:
    assert importlib.metadata.version("guided-diffusion-sdk") == "1.0.0"
    for module, expected in HASHES.items():
        spec = importlib.util.find_spec(f"guided_diffusion.{module}")
        assert spec is not None
        assert spec.origin is not None
        assert hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest() == expected, module


@pytest.mark.parametrize("T", [1000, 250, 4000])
def test_tables(T: int) -> None:
    linear_betas = oracle.get_named_beta_schedule("linear", T)
    ours = linear(T, 1e-4 * 1000 / T, 0.02 * 1000 / T)  # they scale by the length
    np.testing.assert_array_equal(ours.betas, linear_betas)
    cosine = from_config(ScheduleConfig(ScheduleKind.COSINE, T))
    np.testing.assert_allclose(cosine.betas, oracle.get_named_beta_schedule("cosine", T), rtol=1e-10)
    expected = theirs(Prediction.EPS, Variance.FIXED_SMALL, schedule=ours)
    for mine, name in {
        "alphas_cumprod": "alphas_cumprod",
        "alphas_cumprod_prev": "alphas_cumprod_prev",
        "sqrt_recip_alphas_cumprod": "sqrt_recip_alphas_cumprod",
        "sqrt_recipm1_alphas_cumprod": "sqrt_recipm1_alphas_cumprod",
        "posterior_mean_coef_x0": "posterior_mean_coef1",
        "posterior_mean_coef_xt": "posterior_mean_coef2",
        "posterior_variance": "posterior_variance",
        "posterior_log_variance_clipped": "posterior_log_variance_clipped",
    }.items():
        np.testing.assert_allclose(getattr(ours, mine), getattr(expected, name), rtol=1e-14, err_msg=mine)


def test_noising_posterior_and_conversions(dtype: torch.dtype) -> None:
    ours, expected = GaussianDiffusion(linear()), theirs(Prediction.EPS, Variance.FIXED_SMALL)
    x0, noise = data(0, dtype)
    x_t = ours.q_sample(x0, TIMESTEPS, noise)
    assert_close(x_t, expected.q_sample(x0, TIMESTEPS, noise))
    mean, variance, log_variance = expected.q_posterior_mean_variance(x0, x_t, TIMESTEPS)
    assert_close(ours.q_posterior_mean(x0, x_t, TIMESTEPS), mean)
    assert_close(ours.gather("posterior_variance", TIMESTEPS, x_t), variance)
    assert_close(ours.gather("posterior_log_variance_clipped", TIMESTEPS, x_t), log_variance)
    assert_close(ours.x0_from_eps(x_t, TIMESTEPS, x0), expected._predict_xstart_from_eps(x_t, TIMESTEPS, x0))
    assert_close(ours.eps_from_x0(x_t, TIMESTEPS, x0), expected._predict_eps_from_xstart(x_t, TIMESTEPS, x0))
    mu = GaussianDiffusion(linear(), Prediction.MU)
    assert_close(mu.predict_x0(x_t, TIMESTEPS, x0), expected._predict_xstart_from_xprev(x_t, TIMESTEPS, x0))


@every_model
@pytest.mark.parametrize("clip", [True, False])
def test_reverse_step(prediction: Prediction, variance: Variance, clip: bool, dtype: torch.dtype) -> None:
    x_t, _ = data(1, dtype)
    model = network(variance)
    expected = theirs(prediction, variance).p_mean_variance(model, x_t, TIMESTEPS, clip_denoised=clip)
    ours = GaussianDiffusion(linear(), prediction, variance)
    step = ours.p_mean_variance(model(x_t, TIMESTEPS), x_t, TIMESTEPS, clip)
    assert_close(step.mean, expected["mean"])
    assert_close(step.variance, expected["variance"])
    assert_close(step.log_variance, expected["log_variance"])
    tolerance = None
    if prediction is Prediction.MU and clip and dtype == torch.float32:
        tolerance = 1e-3  # before it was clipped it was a difference of numbers up to 2e4
    assert_close(step.x0_hat, expected["pred_xstart"], tolerance)


@every_model
def test_sampled_step(prediction: Prediction, variance: Variance) -> None:
    """One ancestral step with the same noise, in float32 as shipped."""
    x_t, _ = data(2, torch.float32)
    model = network(variance)
    torch.manual_seed(3)
    expected = theirs(prediction, variance).p_sample(model, x_t, TIMESTEPS)["sample"]
    torch.manual_seed(3)
    ours = GaussianDiffusion(linear(), prediction, variance)
    step = ours.p_mean_variance(model(x_t, TIMESTEPS), x_t, TIMESTEPS)
    noise = torch.randn_like(x_t) * (TIMESTEPS > 0).view(-1, 1, 1, 1)
    torch.testing.assert_close(
        step.mean + (0.5 * step.log_variance).exp() * noise, expected, atol=1e-6, rtol=1e-6
    )


@every_model
@pytest.mark.parametrize("loss", list(LOSSES))
def test_training_losses(prediction: Prediction, variance: Variance, loss: str, dtype: torch.dtype) -> None:
    x0, noise = data(4, dtype)
    model = network(variance)
    expected = theirs(prediction, variance, loss).training_losses(model, x0, TIMESTEPS, noise=noise)["loss"]
    ours = GaussianDiffusion(linear(), prediction, variance)
    match loss:
        case "mse" | "rescaled-mse" if not variance.is_learned:
            config = LossConfig(LossKind.SIMPLE)
        case "mse":  # the bound's term is neither multiplied by T nor weighted
            config = LossConfig(LossKind.HYBRID, hybrid_weight=1 / 1000)
        case "rescaled-mse":
            config = LossConfig(LossKind.HYBRID)
        case _:
            config = LossConfig(LossKind.VB)
    x_t = ours.q_sample(x0, TIMESTEPS, noise)
    losses = training_losses(ours, model(x_t, TIMESTEPS), x0, x_t, TIMESTEPS, noise, config)
    # Where variances are almost equal their exp(x) - 1 leaves float32 rounding, which T would multiply.
    assert_close(losses, expected / 1000 if loss == "rescaled-kl" else expected)


@pytest.mark.parametrize(
    ("prediction", "variance", "T", "clip"),
    [
        (Prediction.EPS, Variance.FIXED_LARGE, 1000, True),
        (Prediction.X0, Variance.LEARNED_RANGE, 150, False),
        (Prediction.MU, Variance.LEARNED, 150, True),
    ],
)
def test_full_bound(prediction: Prediction, variance: Variance, T: int, clip: bool) -> None:
    x0, _ = data(5, torch.float32, 2)
    schedule, model = linear(T, 0.1 / T, 20 / T), network(variance)
    torch.manual_seed(6)
    expected = theirs(prediction, variance, schedule=schedule).calc_bpd_loop(model, x0, clip_denoised=clip)
    torch.manual_seed(6)  # they draw from the last timestep down, as we ask
    ours = GaussianDiffusion(schedule, prediction, variance)
    bits = bits_per_dim(ours, model, x0, lambda t: torch.randn_like(x0), clip)
    for mine, name in ((bits.rate, "vb"), (bits.x0_mse, "xstart_mse"), (bits.eps_mse, "mse")):
        torch.testing.assert_close(mine, expected[name].flip(1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(bits.total, expected["total_bpd"], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(bits.prior, expected["prior_bpd"], atol=1e-7, rtol=0)


def test_full_bound_in_float64(dtype: torch.dtype) -> None:
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    schedule = linear(100, 1e-3, 0.2)
    x0, _ = data(7, dtype, 3)
    model = network(Variance.LEARNED_RANGE)
    torch.manual_seed(8)
    expected = theirs(Prediction.EPS, Variance.LEARNED_RANGE, schedule=schedule).calc_bpd_loop(model, x0)
    torch.manual_seed(8)
    ours = GaussianDiffusion(schedule, Prediction.EPS, Variance.LEARNED_RANGE)
    bits = bits_per_dim(ours, model, x0, lambda t: torch.randn_like(x0))
    torch.testing.assert_close(bits.rate, expected["vb"].flip(1), atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(bits.total, expected["total_bpd"], atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(prior_bits(ours, x0), expected["prior_bpd"], atol=1e-7, rtol=0)


def spaced(
    visited: set[int] | list[int], prediction: Prediction, variance: Variance = Variance.FIXED_SMALL
) -> SpacedDiffusion:
    return SpacedDiffusion(
        visited,
        betas=linear().betas,
        model_mean_type=MEANS[prediction],
        model_var_type=VARIANCES[variance],
        loss_type=LOSSES["mse"],
    )


@pytest.mark.parametrize("sections", ["25", "5,10,15"])
@pytest.mark.parametrize("variance", [Variance.FIXED_SMALL, Variance.FIXED_LARGE, Variance.LEARNED_RANGE])
def test_strided_ancestral_sampling(variance: Variance, sections: str, dtype: torch.dtype) -> None:
    """Of mu and a raw learned variance theirs makes no sense when strided; ours is tested elsewhere."""
    visited = sorted(space_timesteps(1000, sections))
    expected, model = spaced(visited, Prediction.EPS, variance), network(variance)
    _, x = data(9, dtype, 2)
    torch.manual_seed(10)
    ours = GaussianDiffusion(linear(), Prediction.EPS, variance)
    steps = list(ancestral(ours, model, x, lambda draw: torch.randn_like(x), visited))
    torch.manual_seed(10)
    for index, step in zip(reversed(range(len(visited))), steps, strict=True):
        out = expected.p_sample(model, x, torch.full((2,), index))
        x = out["sample"]
        assert_close(step.x, x, 1e-4 if dtype == torch.float32 else 1e-9)
        assert_close(step.x0_hat, out["pred_xstart"], 1e-4 if dtype == torch.float32 else 1e-9)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize(
    ("prediction", "eta"), [(Prediction.EPS, 0.0), (Prediction.EPS, 0.7), (Prediction.X0, 0.0)]
)
def test_ddim(prediction: Prediction, eta: float, clip: bool, dtype: torch.dtype) -> None:
    visited = space_timesteps(1000, "ddim25")
    assert sorted(visited) == evenly_spaced(1000, 25)
    expected, model = spaced(visited, prediction), network(Variance.FIXED_SMALL)
    _, x = data(11, dtype, 2)
    torch.manual_seed(12)
    ours = GaussianDiffusion(linear(), prediction)
    noise = None if eta == 0 else lambda draw: torch.randn_like(x)
    steps = list(ddim(ours, model, x, steps=25, eta=eta, noise_fn=noise, clip_x0=clip))
    torch.manual_seed(12)
    for index, step in zip(reversed(range(25)), steps, strict=True):
        out = expected.ddim_sample(model, x, torch.full((2,), index), clip_denoised=clip, eta=eta)
        x = out["sample"]
        assert_close(step.x, x, 1e-4 if dtype == torch.float32 else 1e-9)
        assert_close(step.x0_hat, out["pred_xstart"], 1e-4 if dtype == torch.float32 else 1e-9)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("prediction", [Prediction.EPS, Prediction.X0])
def test_ddim_inversion(prediction: Prediction, clip: bool, dtype: torch.dtype) -> None:
    expected = spaced(space_timesteps(1000, "ddim25"), prediction)
    model = network(Variance.FIXED_SMALL)
    x, _ = data(13, dtype, 2)
    ours = GaussianDiffusion(linear(), prediction)
    steps = list(ddim_invert(ours, model, x, steps=25, clip_x0=clip))
    assert [step.t for step in steps] == evenly_spaced(1000, 25)[:-1]
    for index, step in enumerate(steps):
        out = expected.ddim_reverse_sample(model, x, torch.full((2,), index), clip_denoised=clip)
        x = out["sample"]
        assert_close(step.x, x, 1e-4 if dtype == torch.float32 else 1e-9)
        assert_close(step.x0_hat, out["pred_xstart"], 1e-4 if dtype == torch.float32 else 1e-9)
