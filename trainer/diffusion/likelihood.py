"""The variational bound in bits per dimension: exactly, over all T terms, or estimated from a few.

    L = L_T + sum over t > 1 of L_{t-1} + L_0                          (Ho et al. 2020, eq. 5)

L_T compares the last noisy image with N(0, I), each L_{t-1} a reverse step with the true posterior, and L_0
codes 8-bit pixels with the last reverse step (eq. 13). In the arrays here the entry of timestep t (counted
from 0) is the rate of the step from x_{t+1} to x_t in the paper's count, so entry 0 is L_0.

L_1 .. L_T are the rate and L_0 the distortion of the lossy code of section 4.3; `rate` and `x0_mse` by
timestep are its rate-distortion curve.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.diffusion.process import GaussianDiffusion
from trainer.diffusion.samplers import Denoise, all_at

_HALF_BIN = 1.0 / 255.0  # half the distance of two 8-bit levels in [-1, 1]
_ROUNDING = 1e-5
_LEAST_PROBABILITY = 1e-12


@dataclass(frozen=True)
class TimestepBits:
    """What one timestep contributes, each tensor float32 [N].

    Attributes:
        t: The timestep, in [0, T).
        rate: Its term of the bound in bits/dim; at t = 0 the decoder's.
        x0_mse: Mean squared error of the estimate of x_0.
        eps_mse: Mean squared error of the noise that this estimate implies.
    """

    t: int
    rate: Tensor
    x0_mse: Tensor
    eps_mse: Tensor


@dataclass(frozen=True)
class BitsPerDim:
    """The bound of N images, in bits/dim where nothing else is said; float32.

    Attributes:
        total: [N], the bound: `prior` and the sum of `rate`.
        prior: [N], L_T.
        rate: [N, T], the terms by timestep; [:, 0] is the decoder's, L_0.
        x0_mse: [N, T], mean squared error of the estimate of x_0.
        eps_mse: [N, T], mean squared error of the noise that this estimate implies.
    """

    total: Tensor
    prior: Tensor
    rate: Tensor
    x0_mse: Tensor
    eps_mse: Tensor


@dataclass(frozen=True)
class BitsEstimate:
    """An unbiased estimate of the bound, in bits/dim.

    Attributes:
        per_image: [N], each an unbiased estimate of that image's bound.
        mean: Their mean.
        standard_error: Of the mean, as an estimate for the images' whole population: it covers the chosen
            timesteps, the noise and that these N images are a sample. NaN for a single image.
    """

    per_image: Tensor
    mean: float
    standard_error: float

    @classmethod
    def of(cls, per_image: Tensor) -> "BitsEstimate":
        """Sums up the estimates of independent images, which may come from several batches.

        Args:
            per_image: [N], N >= 1.

        Returns:
            The estimate.
        """
        values = per_image.double()
        error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return cls(per_image, float(values.mean()), error)


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor | float, log_variance2: Tensor) -> Tensor:
    """KL divergence KL(N(mean1, exp log_variance1) || N(mean2, exp log_variance2)), elementwise.

    Args:
        mean1: Mean of the first.
        log_variance1: Logarithm of its variance.
        mean2: Mean of the second.
        log_variance2: Logarithm of its variance.

    Returns:
        Nats, of the shape the arguments broadcast to.
    """
    log_ratio = log_variance1 - log_variance2
    # expm1: most steps have almost equal variances, whose difference exp(x) - 1 would round away.
    spread = torch.expm1(log_ratio) - log_ratio
    return 0.5 * (spread + (mean1 - mean2) ** 2 * torch.exp(-log_variance2))


def discretized_gaussian_log_likelihood(x: Tensor, means: Tensor, log_scales: Tensor) -> Tensor:
    """Log-probability of 8-bit pixels under a Gaussian integrated over their bins (eq. 13).

    The bins of the levels 0 and 255 reach to infinity. The normal distribution function is approximated by
    tanh, and probabilities below 1e-12 count as 1e-12, both as in the paper's code.

    Args:
        x: Pixels in [-1, 1], level / 127.5 - 1.
        means: Means of the Gaussian, like x or broadcastable to it.
        log_scales: Logarithm of its standard deviations, likewise.

    Returns:
        Nats, like x.
    """
    centred, precision = x - means, torch.exp(-log_scales)
    below_upper = _normal_cdf(precision * (centred + _HALF_BIN))
    below_lower = _normal_cdf(precision * (centred - _HALF_BIN))
    inner = torch.where(x > 0.999, 1.0 - below_lower, below_upper - below_lower)
    probability = torch.where(x < -0.999, below_upper, inner)
    return probability.clamp_min(_LEAST_PROBABILITY).log()


def prior_bits(diffusion: GaussianDiffusion, x0: Tensor) -> Tensor:
    """L_T = KL(q(x_T | x_0) || N(0, I)) in bits/dim (eq. 5).

    Args:
        diffusion: The process.
        x0: float32 [N, ...] clean images in [-1, 1].

    Returns:
        [N], like x0.

    Raises:
        ValueError: On wrong precision or range.
    """
    check_images(x0)
    abar = float(diffusion.schedule.alphas_cumprod[-1])
    # The part of the variance is 1e-10: as a difference of float32 numbers it would be rounding alone.
    of_variance = 0.5 * (-math.log1p(-abar) - abar) if abar > 0 else 0.0
    return (0.5 * abar * x0.square().flatten(1).mean(1) + of_variance) / math.log(2.0)


def vb_terms(
    diffusion: GaussianDiffusion, model_output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, clip_x0: bool
) -> tuple[Tensor, Tensor]:
    """The term of the bound at each image's timestep: L_{t-1}, or L_0 at the first (eq. 5, 13).

    Args:
        diffusion: The process and the meaning of the network's output.
        model_output: The network's output.
        x0: float32 [B, ...] clean images in [-1, 1].
        x_t: Noisy images, like x0.
        t: int64 [B] timesteps.
        clip_x0: Clip the estimate of x_0 to [-1, 1], as the paper's code does when it evaluates, and not
            when it trains.

    Returns:
        Bits/dim [B] and the estimate of x_0, like x0.

    Raises:
        ValueError: On wrong shapes, precision, range or timesteps.
    """
    check_images(x0)
    true_mean = diffusion.q_posterior_mean(x0, x_t, t)
    true_log_variance = diffusion.gather("posterior_log_variance_clipped", t, x0)
    step = diffusion.p_mean_variance(model_output, x_t, t, clip_x0)
    # Both forms are computed for all images. The decoder bears any variance; where it counts, the KL is given
    # a harmless one, lest its overflow turn the gradient into NaN.
    first = (t == 0).view(-1, *[1] * (x0.ndim - 1))
    log_variance = torch.where(first, true_log_variance, step.log_variance)
    kl = normal_kl(true_mean, true_log_variance, step.mean, log_variance)
    decoder = -discretized_gaussian_log_likelihood(x0, step.mean, 0.5 * step.log_variance)
    nats = torch.where(first, decoder, kl).flatten(1).mean(1)
    return nats / math.log(2.0), step.x0_hat


def bits_by_timestep(
    diffusion: GaussianDiffusion,
    denoise: Denoise,
    x0: Tensor,
    noise_fn: Callable[[int], Tensor],
    clip_x0: bool = True,
) -> Iterator[TimestepBits]:
    """The T terms of the bound, from the last timestep down; nothing is recorded for gradients.

    Args:
        diffusion: The process and the meaning of the network's output.
        denoise: The network.
        x0: float32 [N, ...] clean images in [-1, 1].
        noise_fn: Timestep -> standard normal noise for x_t, like x0.
        clip_x0: Clip each estimate of x_0 to [-1, 1].

    Returns:
        An iterator over the timesteps T-1, ..., 0.

    Raises:
        ValueError: On wrong precision or range of the images; while iterating, if the network or the noise
            has a wrong shape or precision.
    """
    check_images(x0)
    return _bits_by_timestep(diffusion, denoise, x0, noise_fn, clip_x0)


@torch.no_grad()
def _bits_by_timestep(
    diffusion: GaussianDiffusion,
    denoise: Denoise,
    x0: Tensor,
    noise_fn: Callable[[int], Tensor],
    clip_x0: bool,
) -> Iterator[TimestepBits]:
    for timestep in reversed(range(diffusion.num_timesteps)):
        t = all_at(x0, timestep)
        noise = noise_fn(timestep)
        x_t = diffusion.q_sample(x0, t, noise)
        rate, x0_hat = vb_terms(diffusion, denoise(x_t, t), x0, x_t, t, clip_x0)
        eps_hat = diffusion.eps_from_x0(x_t, t, x0_hat)
        yield TimestepBits(timestep, rate, _mse(x0_hat, x0), _mse(eps_hat, noise))


def bits_per_dim(
    diffusion: GaussianDiffusion,
    denoise: Denoise,
    x0: Tensor,
    noise_fn: Callable[[int], Tensor],
    clip_x0: bool = True,
    progress: Callable[[int], None] | None = None,
) -> BitsPerDim:
    """The bound of each image over all T terms, with one draw of the noise per term.

    Args:
        diffusion: The process and the meaning of the network's output.
        denoise: The network.
        x0: float32 [N, ...] clean images in [-1, 1].
        noise_fn: Timestep -> standard normal noise for x_t, like x0.
        clip_x0: Clip each estimate of x_0 to [-1, 1], as the paper's code does.
        progress: Told after each timestep how many are done.

    Returns:
        Bound and terms.

    Raises:
        ValueError: On wrong shapes, precision or range.
    """
    terms = []
    for term in bits_by_timestep(diffusion, denoise, x0, noise_fn, clip_x0):
        terms.append(term)
        if progress is not None:
            progress(len(terms))
    terms.reverse()
    rate = torch.stack([term.rate for term in terms], dim=1)
    prior = prior_bits(diffusion, x0)
    return BitsPerDim(
        total=(rate.double().sum(1) + prior).to(x0.dtype),
        prior=prior,
        rate=rate,
        x0_mse=torch.stack([term.x0_mse for term in terms], dim=1),
        eps_mse=torch.stack([term.eps_mse for term in terms], dim=1),
    )


@torch.no_grad()
def estimate_bits_per_dim(
    diffusion: GaussianDiffusion,
    denoise: Denoise,
    x0: Tensor,
    uniforms: Tensor,
    noise_fn: Callable[[int], Tensor],
    clip_x0: bool = True,
) -> BitsEstimate:
    """An unbiased estimate of the bound from 1 + K network evaluations per image.

    The terms of t = 0, by far the largest, and of the prior are taken as they are. The other T - 1 are
    estimated by their number times the mean over K stratified timesteps: draw k falls into the k-th of K
    equal parts of them.

    Args:
        diffusion: The process and the meaning of the network's output.
        denoise: The network.
        x0: float32 [N, ...] clean images in [-1, 1].
        uniforms: float64 [N, K], independent and uniform on [0, 1), K >= 1.
        noise_fn: k -> standard normal noise, like x0, for t = 0 if k = 0, else for draw k of 1..K.
        clip_x0: Clip each estimate of x_0 to [-1, 1], as the paper's code does.

    Returns:
        The estimate of each image and of the mean.

    Raises:
        ValueError: On wrong shapes, precision or range.
    """
    check_images(x0)
    count = len(x0)
    if uniforms.dtype != torch.float64 or uniforms.ndim != 2 or uniforms.shape[0] != count:
        raise ValueError(
            f"uniforms must be float64 of shape [{count}, K], got {uniforms.dtype} {list(uniforms.shape)}"
        )
    draws, others = uniforms.shape[1], diffusion.num_timesteps - 1
    if draws < 1:
        raise ValueError("uniforms must hold at least one draw per image, got none")

    def term(k: int, t: Tensor) -> Tensor:
        x_t = diffusion.q_sample(x0, t, noise_fn(k))
        return vb_terms(diffusion, denoise(x_t, t), x0, x_t, t, clip_x0)[0].double()

    total = prior_bits(diffusion, x0).double()
    total += term(0, all_at(x0, 0))
    for k in range(draws if others else 0):
        place = ((k + uniforms[:, k]) * (others / draws)).long()
        total += term(k + 1, 1 + place.clamp(0, others - 1)) * (others / draws)
    return BitsEstimate.of(total)


def check_images(x0: Tensor) -> None:
    """Demands images as the decoder knows them: full precision, scaled to [-1, 1].

    Args:
        x0: The images.

    Raises:
        ValueError: If they are not. The range is looked at on a CPU only.
    """
    if x0.dtype not in (torch.float32, torch.float64) or x0.ndim < 2:
        raise ValueError(
            f"the likelihood needs float32 images [N, ...], got {x0.dtype} {list(x0.shape)}: "
            "scale 8-bit pixels by x / 127.5 - 1"
        )
    if x0.device.type == "cpu" and x0.numel():
        low, high = (float(bound) for bound in torch.aminmax(x0.detach()))
        if not (low >= -1 - _ROUNDING and high <= 1 + _ROUNDING):
            raise ValueError(
                f"the likelihood needs images in [-1, 1], got {low:g}..{high:g}: "
                "scale 8-bit pixels by x / 127.5 - 1"
            )


def _normal_cdf(x: Tensor) -> Tensor:
    """Distribution function of N(0, 1) by Page's tanh formula: off by at most 1.8e-4."""
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def _mse(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).square().flatten(1).mean(1)
