"""Tables against the paper's formulae, diffusers and themselves."""

import math

import numpy as np
import pytest
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.diffusion.schedule import Schedule, ScheduleConfig, from_betas, from_config, linear


def test_the_papers_numbers() -> None:
    schedule = linear()
    assert schedule.num_timesteps == 1000
    assert schedule.betas[0] == 1e-4
    assert schedule.betas[-1] == 0.02
    assert schedule.alphas_cumprod[999] == pytest.approx(4.035829765375676e-05, rel=1e-12)
    assert schedule.posterior_variance[1] == pytest.approx(5.4531876613021935e-05, rel=1e-12)


def test_against_diffusers() -> None:
    """Diffusers' tables are float32, which sets the tolerances."""
    theirs = DDPMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    ours = linear()
    np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod.numpy(), rtol=2e-5)
    variances = [float(theirs._get_variance(t, variance_type="fixed_small")) for t in range(1, 1000)]
    np.testing.assert_allclose(ours.posterior_variance[1:], variances, rtol=5e-4)


@given(st.lists(st.floats(1e-5, 0.5), min_size=1, max_size=60))
@settings(max_examples=60, deadline=None)
def test_tables_are_consistent(betas: list[float]) -> None:
    """Each table against a definition that is not the one it was computed by."""
    s = from_betas(betas)
    T = s.num_timesteps
    assert [math.prod(1 - b for b in betas[: t + 1]) for t in range(T)] == pytest.approx(
        list(s.alphas_cumprod)
    )
    np.testing.assert_allclose(s.sqrt_alphas_cumprod**2 + s.sqrt_one_minus_alphas_cumprod**2, 1.0)
    np.testing.assert_allclose(
        s.sqrt_recip_alphas_cumprod**2 - s.sqrt_recipm1_alphas_cumprod**2, 1.0, rtol=1e-6
    )
    # Bayes: the posterior's precision is the sum of the prior's and the likelihood's, its mean their balance.
    prior = 1 - s.alphas_cumprod_prev[1:]
    precision = 1 / prior + s.alphas[1:] / s.betas[1:]
    np.testing.assert_allclose(s.posterior_variance[1:], 1 / precision, rtol=1e-7)
    np.testing.assert_allclose(
        s.posterior_mean_coef_x0[1:], np.sqrt(s.alphas_cumprod_prev[1:]) / prior / precision, rtol=1e-7
    )
    np.testing.assert_allclose(
        s.posterior_mean_coef_xt[1:], np.sqrt(s.alphas[1:]) / s.betas[1:] / precision, rtol=1e-7
    )
    assert s.posterior_variance[0] == 0
    assert (s.posterior_mean_coef_x0[0], s.posterior_mean_coef_xt[0]) == (pytest.approx(1), 0)
    assert np.all(np.isfinite(s.posterior_log_variance_clipped))
    np.testing.assert_allclose(np.exp(s.posterior_log_variance_clipped[1:]), s.posterior_variance[1:])
    np.testing.assert_array_equal(s.fixed_large_variance[1:], s.betas[1:])


def test_first_log_variances_are_the_papers() -> None:
    s = linear()
    assert s.posterior_log_variance_clipped[0] == s.posterior_log_variance_clipped[1]
    assert s.fixed_large_variance[0] == s.posterior_variance[1]


@given(st.integers(1, 300), st.data())
@settings(max_examples=40, deadline=None)
def test_respaced_keeps_abar(T: int, data: st.DataObject) -> None:
    schedule = linear(T, 1e-4, 0.05)
    steps = sorted(data.draw(st.sets(st.integers(0, T - 1), min_size=1)))
    np.testing.assert_allclose(
        schedule.respaced(steps).alphas_cumprod, schedule.alphas_cumprod[steps], rtol=1e-10
    )


@pytest.mark.parametrize("steps", [[], [3, 3], [5, 2], [-1, 4], [0, 10]])
def test_respaced_refuses(steps: list[int]) -> None:
    with pytest.raises(ValueError, match="timestep"):
        linear(10).respaced(steps)


def test_tables_cannot_be_written() -> None:
    schedule = from_config(ScheduleConfig(num_timesteps=10))
    assert isinstance(schedule, Schedule)
    with pytest.raises(ValueError, match="read-only"):
        schedule.betas[0] = 1.0


def test_bad_numbers() -> None:
    with pytest.raises(ValueError, match="num_timesteps must be at least 1, got 0"):
        linear(0)
    with pytest.raises(ValueError, match=r"every beta must lie in \(0, 1\)"):
        linear(10, 0.0, 0.02)
    with pytest.raises(ValueError, match=r"every beta must lie in \(0, 1\)"):
        linear(10, 0.1, 1.0)
    with pytest.raises(ValueError, match="at least one"):
        from_betas([])
