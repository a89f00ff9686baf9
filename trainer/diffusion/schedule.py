"""Noise schedules: every table of the forward process and its posterior, in float64.

Timesteps count from 0 to T-1 here (the network's input), from 1 to T in the paper: table[0] is t = 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

Table = NDArray[np.float64]


class ScheduleKind(StrEnum):
    """How beta runs over the timesteps. All but the last are options of the paper's code."""

    LINEAR = "linear"  # the paper's (section 4)
    QUADRATIC = "quadratic"  # sqrt(beta) linear
    CONSTANT = "constant"  # beta_end throughout
    JSD = "jsd"  # 1/T, 1/(T-1), ..., 1: the signal abar falls linearly to 0
    WARMUP10 = "warmup10"  # linear over the first 10 % of the timesteps, then beta_end
    WARMUP50 = "warmup50"  # linear over the first half of the timesteps, then beta_end
    COSINE = "cosine"  # Nichol & Dhariwal 2021, eq. 17


@dataclass(frozen=True)
class ScheduleConfig:
    """What a recipe says about the schedule. Defaults: Ho et al. 2020, section 4.

    Attributes:
        kind: Shape of the curve.
        num_timesteps: T, at least 1.
        beta_start: beta of the first timestep, in (0, 1); `constant`, `jsd` and `cosine` have no use for it.
        beta_end: beta of the last timestep, in (0, 1); `jsd` and `cosine` have no use for it.
    """

    kind: ScheduleKind = ScheduleKind.LINEAR
    num_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02


@dataclass(frozen=True, eq=False)
class Schedule:
    """Tables of the diffusion process, each float64 [T] and read-only. Made by `from_betas`.

    Equation numbers are of Ho et al. 2020 (arXiv 2006.11239v2).

    Attributes:
        betas: beta_t, variances of the forward steps (eq. 2); the last one may be 1.
        alphas: alpha_t = 1 - beta_t.
        alphas_cumprod: abar_t, product of alpha_1..alpha_t (eq. 4); 0 where beta_t = 1.
        alphas_cumprod_prev: abar_{t-1}, with abar_0 = 1.
        sqrt_alphas_cumprod: sqrt(abar_t), signal level (eq. 4).
        sqrt_one_minus_alphas_cumprod: sqrt(1 - abar_t), noise level sigma(t) (eq. 4).
        sqrt_recip_alphas_cumprod: sqrt(1 / abar_t) (eq. 9 solved for x_0); infinite where abar_t = 0.
        sqrt_recipm1_alphas_cumprod: sqrt(1 / abar_t - 1) (eq. 9 solved for x_0); infinite where abar_t = 0.
        posterior_mean_coef_x0: Weight of x_0 in the mean of q(x_{t-1} | x_t, x_0) (eq. 7).
        posterior_mean_coef_xt: Weight of x_t in the same (eq. 7).
        posterior_variance: Variance of q(x_{t-1} | x_t, x_0) (eq. 7); 0 at the first timestep.
        posterior_log_variance_clipped: Its logarithm, the first value replaced by the second one.
        fixed_large_variance: beta_t, the first value replaced by posterior_variance[1]
            as in the paper's code (a better decoder).
        fixed_large_log_variance: Its logarithm.
    """

    betas: Table
    alphas: Table
    alphas_cumprod: Table
    alphas_cumprod_prev: Table
    sqrt_alphas_cumprod: Table
    sqrt_one_minus_alphas_cumprod: Table
    sqrt_recip_alphas_cumprod: Table
    sqrt_recipm1_alphas_cumprod: Table
    posterior_mean_coef_x0: Table
    posterior_mean_coef_xt: Table
    posterior_variance: Table
    posterior_log_variance_clipped: Table
    fixed_large_variance: Table
    fixed_large_log_variance: Table

    def __post_init__(self) -> None:
        for field in fields(self):
            table: Table = getattr(self, field.name)
            assert table.dtype == np.float64, field.name
            assert table.shape == self.betas.shape, field.name
            table.setflags(write=False)

    @property
    def num_timesteps(self) -> int:
        """T, the number of timesteps."""
        return len(self.betas)

    @property
    def snr(self) -> Table:
        """Signal-to-noise ratio abar_t / (1 - abar_t), float64 [T], falling with t."""
        return self.alphas_cumprod / (1.0 - self.alphas_cumprod)

    @property
    def log_snr(self) -> Table:
        """Natural logarithm of `snr`, float64 [T]; minus infinity where abar_t = 0."""
        with np.errstate(divide="ignore"):
            return np.log(self.alphas_cumprod) - np.log1p(-self.alphas_cumprod)

    @property
    def log_variance_range(self) -> Table:
        """Distance log beta_t - log of the posterior's variance (clipped), float64 [T], never negative.

        They are the two extreme choices of the reverse variance (section 3.2).
        """
        return np.maximum(np.log(self.betas) - self.posterior_log_variance_clipped, 0.0)

    def respaced(self, timesteps: Sequence[int]) -> "Schedule":
        """The process observed at some of its timesteps only.

        Its abar are those of this schedule at `timesteps`, its betas 1 - abar_{s_i} / abar_{s_{i-1}}
        (Nichol & Dhariwal 2021, eq. 19).

        Args:
            timesteps: Strictly increasing, in [0, T), not empty.

        Returns:
            A schedule of len(timesteps) timesteps.

        Raises:
            ValueError: If the timesteps are none, out of range or not increasing.
        """
        steps = np.asarray(timesteps, dtype=np.int64)
        if steps.ndim != 1 or len(steps) == 0:
            raise ValueError("timesteps must be a sequence of at least one timestep")
        if steps[0] < 0 or steps[-1] >= self.num_timesteps or np.any(np.diff(steps) <= 0):
            raise ValueError(
                f"timesteps must increase strictly within [0, {self.num_timesteps}), got {timesteps}"
            )
        kept = self.alphas_cumprod[steps]
        alphas = kept / np.append(1.0, kept[:-1])
        # Not by way of the betas alone: over a wide gap alpha may be so small that beta rounds to 1.
        return _derive(1.0 - alphas, alphas, kept)


def from_betas(betas: Sequence[float] | Table) -> Schedule:
    """Derives every table from the forward variances.

    Args:
        betas: beta_t for t = 1..T, each in (0, 1), the last one in (0, 1]: 1 leaves pure noise.

    Returns:
        The schedule.

    Raises:
        ValueError: If there are none, any lies outside its range, the first is lost to rounding, or signal
            is left that float32 cannot hold.
    """
    betas = np.array(betas, dtype=np.float64)
    if betas.ndim != 1 or len(betas) == 0:
        raise ValueError(f"betas must be a sequence of at least one number, got shape {betas.shape}")
    if not (np.all(betas > 0) and np.all(betas[:-1] < 1) and betas[-1] <= 1):
        raise ValueError(
            f"every beta must lie in (0, 1), the last one in (0, 1], got {betas.min()} to {betas.max()}"
        )
    alphas = 1.0 - betas
    abar: Table = np.cumprod(alphas, dtype=np.float64)
    if abar[0] == 1.0:
        raise ValueError(f"the first beta, {betas[0]}, adds no noise in double precision: raise it")
    lost = np.flatnonzero(abar[: len(abar) - (betas[-1] == 1)] < np.finfo(np.float32).tiny)
    if len(lost):
        raise ValueError(
            f"no signal that float32 can hold is left from timestep {lost[0]} of {len(betas)} on: "
            "lower the betas or the number of timesteps"
        )
    return _derive(betas, alphas, abar)


def _derive(betas: Table, alphas: Table, abar: Table) -> Schedule:
    """All tables, from the forward variances, 1 minus these, and the running product of that."""
    abar_prev = np.append(1.0, abar[:-1])
    posterior_variance = betas * (1.0 - abar_prev) / (1.0 - abar)
    # log 0 at the first timestep: there the code of the paper takes the second value. A process of a single
    # timestep has no second one.
    first = posterior_variance[1] if len(betas) > 1 else betas[0]
    fixed_large = np.append(first, betas[1:])
    with np.errstate(divide="ignore"):
        recip = 1.0 / abar
    return Schedule(
        betas=betas,
        alphas=alphas,
        alphas_cumprod=abar,
        alphas_cumprod_prev=abar_prev,
        sqrt_alphas_cumprod=np.sqrt(abar),
        sqrt_one_minus_alphas_cumprod=np.sqrt(1.0 - abar),
        sqrt_recip_alphas_cumprod=np.sqrt(recip),
        sqrt_recipm1_alphas_cumprod=np.sqrt(recip - 1.0),
        posterior_mean_coef_x0=betas * np.sqrt(abar_prev) / (1.0 - abar),
        posterior_mean_coef_xt=(1.0 - abar_prev) * np.sqrt(alphas) / (1.0 - abar),
        posterior_variance=posterior_variance,
        posterior_log_variance_clipped=np.log(np.append(first, posterior_variance[1:])),
        fixed_large_variance=fixed_large,
        fixed_large_log_variance=np.log(fixed_large),
    )


def linear(num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
    """The paper's schedule: beta linear from 1e-4 to 0.02 over T = 1000 (Ho et al. 2020, section 4).

    Args:
        num_timesteps: T, at least 1.
        beta_start: First beta, in (0, 1).
        beta_end: Last beta, in (0, 1). For T = 1 the first beta alone counts.

    Returns:
        The schedule.

    Raises:
        ValueError: If T < 1 or a beta lies outside (0, 1).
    """
    return from_config(ScheduleConfig(ScheduleKind.LINEAR, num_timesteps, beta_start, beta_end))


def from_config(config: ScheduleConfig) -> Schedule:
    """The schedule a recipe asks for.

    Args:
        config: Kind and numbers of the schedule.

    Returns:
        The schedule.

    Raises:
        ValueError: If the numbers make no schedule.
    """
    T, start, end = config.num_timesteps, config.beta_start, config.beta_end
    if T < 1:
        raise ValueError(f"num_timesteps must be at least 1, got {T}")
    for name, beta in (("beta_start", start), ("beta_end", end)):
        if not 0.0 < beta < 1.0:
            raise ValueError(f"every beta must lie in (0, 1), got {name} = {beta}")
    match config.kind:
        case ScheduleKind.LINEAR:
            betas = np.linspace(start, end, T, dtype=np.float64)
        case ScheduleKind.QUADRATIC:
            betas = np.linspace(start**0.5, end**0.5, T, dtype=np.float64) ** 2
        case ScheduleKind.CONSTANT:
            betas = np.full(T, end, dtype=np.float64)
        case ScheduleKind.JSD:
            betas = 1.0 / np.linspace(T, 1, T, dtype=np.float64)
        case ScheduleKind.WARMUP10:
            betas = _warmup(T, start, end, 0.1)
        case ScheduleKind.WARMUP50:
            betas = _warmup(T, start, end, 0.5)
        case ScheduleKind.COSINE:
            betas = _cosine(T)
    return from_betas(betas)


def _warmup(num_timesteps: int, beta_start: float, beta_end: float, share: float) -> Table:
    """beta_end, but for a linear rise over the first `share` of the timesteps."""
    betas = np.full(num_timesteps, beta_end, dtype=np.float64)
    rising = int(num_timesteps * share)
    betas[:rising] = np.linspace(beta_start, beta_end, rising, dtype=np.float64)
    return betas


def _cosine(num_timesteps: int, s: float = 0.008, largest: float = 0.999) -> Table:
    """abar_t = f(t) / f(0), f(t) = cos^2((t/T + s) / (1 + s) pi/2) (Nichol & Dhariwal 2021, eq. 17)."""
    t = np.arange(num_timesteps + 1, dtype=np.float64) / num_timesteps
    f = np.cos((t + s) / (1.0 + s) * np.pi / 2.0) ** 2
    betas: Table = np.minimum(1.0 - f[1:] / f[:-1], largest)
    return betas
