"""Tables against the paper's formulae, diffusers and themselves."""

import math

import numpy as np
import pytest
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.diffusion.schedule import (
    Schedule,
    ScheduleConfig,
    ScheduleKind,
    from_betas,
    from_config,
    linear,
)


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


def make(kind: ScheduleKind, T: int, start: float = 1e-4, end: float = 0.02) -> Schedule:
    return from_config(ScheduleConfig(kind, T, start, end))


def test_quadratic_has_a_linear_root() -> None:
    betas = make(ScheduleKind.QUADRATIC, 1000).betas
    assert (betas[0], betas[-1]) == (pytest.approx(1e-4), pytest.approx(0.02))
    np.testing.assert_allclose(np.diff(np.sqrt(betas)), (0.02**0.5 - 0.01) / 999, rtol=1e-9)


def test_constant_and_warmup_end_at_the_last_beta() -> None:
    np.testing.assert_array_equal(make(ScheduleKind.CONSTANT, 7).betas, 0.02)
    for kind, T, rising in (
        (ScheduleKind.WARMUP10, 1000, 100),
        (ScheduleKind.WARMUP50, 1000, 500),
        (ScheduleKind.WARMUP10, 39, 3),
        (ScheduleKind.WARMUP50, 39, 19),
    ):
        betas = make(kind, T).betas
        assert betas[0] == 1e-4
        np.testing.assert_allclose(np.diff(betas[:rising]), (0.02 - 1e-4) / (rising - 1), rtol=1e-9)
        np.testing.assert_array_equal(betas[rising - 1 :], 0.02)
    np.testing.assert_array_equal(make(ScheduleKind.WARMUP10, 9).betas, 0.02)  # 10 % of 9 is no timestep


@pytest.mark.parametrize("T", [1, 2, 10, 1000])
def test_jsd_loses_the_signal_evenly_and_all_of_it(T: int) -> None:
    s = make(ScheduleKind.JSD, T)
    np.testing.assert_allclose(s.betas, [1 / (T - t) for t in range(T)], rtol=1e-15)
    np.testing.assert_allclose(s.alphas_cumprod, [1 - (t + 1) / T for t in range(T)], atol=1e-13)
    assert s.alphas_cumprod[-1] == 0
    assert s.snr[-1] == 0
    assert s.log_snr[-1] == -math.inf


def test_cosine_against_diffusers() -> None:
    theirs = DDPMScheduler(num_train_timesteps=300, beta_schedule="squaredcos_cap_v2").betas.numpy()
    ours = make(ScheduleKind.COSINE, 300).betas
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    assert ours[-1] == 0.999


@given(st.sampled_from(list(ScheduleKind)), st.integers(1, 1500))
@settings(max_examples=60, deadline=None)
def test_every_kind_at_any_length(kind: ScheduleKind, T: int) -> None:
    s = make(kind, T)
    assert s.num_timesteps == T
    assert np.all(np.diff(s.alphas_cumprod) < 0)
    np.testing.assert_array_equal(s.snr, s.alphas_cumprod / (1 - s.alphas_cumprod))
    assert np.all(np.diff(s.snr) < 0)
    np.testing.assert_allclose(np.exp(s.log_snr), s.snr, rtol=1e-9)
    np.testing.assert_allclose(
        s.posterior_log_variance_clipped + s.log_variance_range, np.log(s.betas), rtol=1e-12, atol=1e-15
    )
    unbounded = {"sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"}
    for name, table in vars(s).items():
        assert np.all(np.isfinite(table[: -1 if kind is ScheduleKind.JSD and name in unbounded else None])), (
            name
        )
    for name in ("posterior_variance", "fixed_large_variance", "sqrt_one_minus_alphas_cumprod"):
        assert np.all(getattr(s, name) >= 0)


@given(st.sampled_from(list(ScheduleKind)), st.integers(1, 300), st.data())
@settings(max_examples=60, deadline=None)
def test_respaced_keeps_abar(kind: ScheduleKind, T: int, data: st.DataObject) -> None:
    schedule = make(kind, T, 1e-4, 0.05)
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
    for bad in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"every beta must lie in \(0, 1\), got beta_start = "):
            make(ScheduleKind.COSINE, 10, start=bad)
    with pytest.raises(ValueError, match="at least one"):
        from_betas([])
    with pytest.raises(ValueError, match=r"the last one in \(0, 1\], got 0.5 to 1.0"):
        from_betas([0.5, 1.0, 0.5])
    with pytest.raises(ValueError, match=r"got 0.5 to 1.5"):
        from_betas([0.5, 1.5])
    with pytest.raises(ValueError, match="every beta"):
        from_betas([0.1, math.nan])
    assert from_betas([0.5, 1.0]).alphas_cumprod[-1] == 0
    with pytest.raises(ValueError, match="the first beta, 1e-17, adds no noise"):
        from_betas([1e-17, 0.1])
    with pytest.raises(
        ValueError, match="no signal that float32 can hold is left from timestep 4323 of 5000 on"
    ):
        make(ScheduleKind.CONSTANT, 5000)
