"""The Gaussian diffusion process: noising, its posterior, and what a network's output says about both.

Tables are gathered from float64 into the images' own precision, float32 in training (float64 is taken as
it is, for tests). Half precision is refused: in bfloat16 the first ten timesteps would add no noise at all
and a thousand noise levels would collapse to 190. Autocast does not touch any operation used here.

Equation numbers are of Ho et al. 2020 (arXiv 2006.11239v2).
"""

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from trainer.diffusion.schedule import Schedule


class Prediction(StrEnum):
    """What the network's output means."""

    EPS = "eps"  # the noise (eq. 11)
    X0 = "x0"  # the clean image


class Variance(StrEnum):
    """Variance of the reverse steps: the two extreme choices of section 3.2."""

    FIXED_SMALL = "fixed-small"  # the posterior's, optimal for data of a single point
    FIXED_LARGE = "fixed-large"  # beta_t, optimal for x_0 ~ N(0, I)


@dataclass(frozen=True)
class ReverseStep:
    """The model's p(x_{t-1} | x_t) = N(mean, variance I).

    Attributes:
        mean: [B, ...] like x_t.
        variance: [B, 1, ...], broadcastable to x_t.
        log_variance: Its logarithm; at t = 0, where posterior variance vanishes, a finite stand-in.
        x0_hat: [B, ...] the estimate of x_0 the mean was made from.
    """

    mean: Tensor
    variance: Tensor
    log_variance: Tensor
    x0_hat: Tensor


class GaussianDiffusion:
    """A schedule together with the meaning of the network's output.

    In all methods images are float32 [B, ...] in [-1, 1] for x_0, t is int64 [B] in [0, T), and a network
    output of lower precision (under autocast) is widened before use.

    Attributes:
        schedule: The tables.
        prediction: What the network predicts.
        variance: Variance of the reverse steps.
    """

    def __init__(
        self,
        schedule: Schedule,
        prediction: Prediction = Prediction.EPS,
        variance: Variance = Variance.FIXED_SMALL,
    ) -> None:
        self.schedule = schedule
        self.prediction = prediction
        self.variance = variance
        self._tables: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    @property
    def num_timesteps(self) -> int:
        """T, the number of timesteps."""
        return self.schedule.num_timesteps

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Draws x_t from q(x_t | x_0) (eq. 4).

        Args:
            x0: float32 [B, ...] clean images.
            t: int64 [B] timesteps.
            noise: Standard normal, like x0.

        Returns:
            x_t, like x0.

        Raises:
            ValueError: On wrong shapes, precision or timesteps.
        """
        self._check(x0, t)
        _check_like("noise", noise, x0)
        signal = self._gather("sqrt_alphas_cumprod", t, x0)
        sigma = self._gather("sqrt_one_minus_alphas_cumprod", t, x0)
        return signal * x0 + sigma * noise

    def predict_x0(self, x_t: Tensor, t: Tensor, model_output: Tensor) -> Tensor:
        """The estimate of x_0 in a network's output (eq. 15 for eps), not clipped.

        Args:
            x_t: float32 [B, ...] noisy images.
            t: int64 [B] timesteps.
            model_output: The network's output, like x_t.

        Returns:
            x0_hat, like x_t.

        Raises:
            ValueError: On wrong shapes, precision or timesteps.
        """
        self._check(x_t, t)
        _check_shape("model_output", model_output, x_t)
        output = model_output.to(x_t.dtype)
        match self.prediction:
            case Prediction.EPS:
                recip = self._gather("sqrt_recip_alphas_cumprod", t, x_t)
                return recip * x_t - self._gather("sqrt_recipm1_alphas_cumprod", t, x_t) * output
            case Prediction.X0:
                return output

    def predict_eps(self, x_t: Tensor, t: Tensor, model_output: Tensor) -> Tensor:
        """The estimate of the noise in a network's output.

        Args:
            x_t: float32 [B, ...] noisy images.
            t: int64 [B] timesteps.
            model_output: The network's output, like x_t.

        Returns:
            eps_hat, like x_t.

        Raises:
            ValueError: On wrong shapes, precision or timesteps.
        """
        self._check(x_t, t)
        _check_shape("model_output", model_output, x_t)
        output = model_output.to(x_t.dtype)
        match self.prediction:
            case Prediction.EPS:
                return output
            case Prediction.X0:
                return self.eps_from_x0(x_t, t, output)

    def eps_from_x0(self, x_t: Tensor, t: Tensor, x0: Tensor) -> Tensor:
        """The noise that leads from x_0 to x_t (eq. 4 solved for eps).

        Args:
            x_t: float32 [B, ...] noisy images.
            t: int64 [B] timesteps.
            x0: Clean images, like x_t.

        Returns:
            eps, like x_t.

        Raises:
            ValueError: On wrong shapes, precision or timesteps.
        """
        self._check(x_t, t)
        _check_like("x0", x0, x_t)
        recip = self._gather("sqrt_recip_alphas_cumprod", t, x_t)
        return (recip * x_t - x0) / self._gather("sqrt_recipm1_alphas_cumprod", t, x_t)

    def q_posterior_mean(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Mean of q(x_{t-1} | x_t, x_0) (eq. 7); at t = 0 it is x_0.

        Args:
            x0: float32 [B, ...] clean images, or an estimate of them.
            x_t: Noisy images, like x0.
            t: int64 [B] timesteps.

        Returns:
            The mean, like x0.

        Raises:
            ValueError: On wrong shapes, precision or timesteps.
        """
        self._check(x_t, t)
        _check_like("x0", x0, x_t)
        weight_x0 = self._gather("posterior_mean_coef_x0", t, x_t)
        return weight_x0 * x0 + self._gather("posterior_mean_coef_xt", t, x_t) * x_t

    def p_mean_variance(
        self, model_output: Tensor, x_t: Tensor, t: Tensor, clip_x0: bool = True
    ) -> ReverseStep:
        """The model's reverse step p(x_{t-1} | x_t) (eq. 1, 11).

        Args:
            model_output: The network's output, like x_t.
            x_t: float32 [B, ...] noisy images.
            t: int64 [B] timesteps.
            clip_x0: Clip the estimate of x_0 to [-1, 1], as the paper's code does when it samples.

        Returns:
            Mean, variance and the estimate of x_0.

        Raises:
            ValueError: On wrong shapes, precision or timesteps.
        """
        x0_hat = self.predict_x0(x_t, t, model_output)
        if clip_x0:
            x0_hat = x0_hat.clamp(-1.0, 1.0)
        match self.variance:
            case Variance.FIXED_SMALL:
                names = ("posterior_variance", "posterior_log_variance_clipped")
            case Variance.FIXED_LARGE:
                names = ("fixed_large_variance", "fixed_large_log_variance")
        variance, log_variance = (self._gather(name, t, x_t) for name in names)
        return ReverseStep(self.q_posterior_mean(x0_hat, x_t, t), variance, log_variance, x0_hat)

    def _gather(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        """A table's values at t, shaped [B, 1, ...] to go with images, in their precision."""
        key = (name, like.device, like.dtype)
        if key not in self._tables:
            table = torch.tensor(getattr(self.schedule, name), dtype=like.dtype, device="cpu")
            self._tables[key] = table.to(like.device)
        # index_select, unlike indexing, does not take a negative timestep for one counted from the end.
        return self._tables[key].index_select(0, t).view(-1, *[1] * (like.ndim - 1))

    def _check(self, x: Tensor, t: Tensor) -> None:
        """Raises ValueError unless t holds one timestep for each image of x in full precision."""
        if x.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"diffusion is computed in float32, got images of {x.dtype}: use .float() on them"
            )
        if t.dtype != torch.int64 or x.ndim == 0 or t.shape != x.shape[:1]:
            raise ValueError(f"t must be int64 of shape {list(x.shape[:1])}, got {t.dtype} {list(t.shape)}")
        # On an accelerator reading t would stop the pipeline; there index_select's own assertion guards.
        if t.device.type == "cpu" and t.numel():
            low, high = int(t.min()), int(t.max())
            if low < 0 or high >= self.num_timesteps:
                raise ValueError(f"timesteps must lie in [0, {self.num_timesteps}), got {low}..{high}")


def _check_shape(name: str, x: Tensor, like: Tensor) -> None:
    if x.shape != like.shape:
        raise ValueError(f"{name} has shape {list(x.shape)}, the images {list(like.shape)}")


def _check_like(name: str, x: Tensor, like: Tensor) -> None:
    _check_shape(name, x, like)
    if x.dtype != like.dtype:
        raise ValueError(f"{name} is {x.dtype}, the images are {like.dtype}: convert it")
