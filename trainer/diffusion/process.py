"""The Gaussian diffusion process: a schedule together with the meaning of the network's output.

Equation numbers are of Ho et al. 2020 (arXiv 2006.11239v2).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from trainer.diffusion.forward import ForwardProcess
from trainer.diffusion.schedule import Schedule, Table


class Prediction(StrEnum):
    """What the network's output means."""

    EPS = "eps"  # the noise (eq. 11)
    X0 = "x0"  # the clean image
    MU = "mu"  # the mean of x_{t-1} given x_t and x_0 (eq. 8)
    V = "v"  # the velocity sqrt(abar) eps - sqrt(1 - abar) x_0 (Salimans & Ho 2022)


class Variance(StrEnum):
    """Variance of the reverse steps: the two extreme choices of section 3.2, or learned per pixel."""

    FIXED_SMALL = "fixed-small"  # the posterior's, optimal for data of a single point
    FIXED_LARGE = "fixed-large"  # beta_t, optimal for x_0 ~ N(0, I)
    LEARNED = "learned"  # the output's second half is log Sigma itself (the paper's Table 2)
    LEARNED_RANGE = "learned-range"  # it says where between the extremes (Nichol & Dhariwal 2021, eq. 15)

    @property
    def is_learned(self) -> bool:
        """Whether the network has output channels for the variance."""
        return self in (Variance.LEARNED, Variance.LEARNED_RANGE)

    def output_channels(self, channels: int) -> int:
        """Channels the network must put out for images of `channels` channels."""
        return 2 * channels if self.is_learned else channels


@dataclass(frozen=True)
class ReverseStep:
    """The model's p(x_{t-1} | x_t) = N(mean, variance I).

    Attributes:
        mean: [B, ...] like x_t.
        variance: [B, 1, ...], broadcastable to x_t; like x_t if it is learned.
        log_variance: Its logarithm; at t = 0, where posterior variance vanishes, a finite stand-in.
        x0_hat: [B, ...] the estimate of x_0 the mean was made from.
    """

    mean: Tensor
    variance: Tensor
    log_variance: Tensor
    x0_hat: Tensor


# What it takes to read an output that means something of the step from t to t - 1: it must come from the
# process the network was trained on, also where that process is observed at some timesteps only.
_OF_THE_STEP = (
    "posterior_mean_coef_x0",
    "posterior_mean_coef_xt",
    "posterior_log_variance_clipped",
    "log_variance_range",
)


class GaussianDiffusion(ForwardProcess):
    """A schedule together with the meaning of the network's output.

    In all methods images are float32 [B, ...] in [-1, 1] for x_0, t is int64 [B] in [0, T), and a network
    output of lower precision (under autocast) is widened before use. The output is like the images; with a
    learned variance it is [B, 2C, ...], the prediction first.

    Attributes:
        schedule: The tables.
        prediction: What the network predicts.
        variance: Variance of the reverse steps.

    Raises:
        ValueError: At construction, for a network that predicts eps where the last x_t is pure noise: it
            tells nothing of x_0 there.
    """

    def __init__(
        self,
        schedule: Schedule,
        prediction: Prediction = Prediction.EPS,
        variance: Variance = Variance.FIXED_SMALL,
    ) -> None:
        super().__init__(schedule)
        if prediction is Prediction.EPS and schedule.alphas_cumprod[-1] == 0:
            raise ValueError(
                "prediction = eps cannot go with a schedule that ends in pure noise (abar_T = 0): eps tells "
                "nothing of x_0 there; let the network predict x0, mu or v, or take another schedule"
            )
        self.prediction = prediction
        self.variance = variance
        self._trained: dict[str, Table] | None = None

    def respaced(self, timesteps: Sequence[int]) -> "GaussianDiffusion":
        """The process observed at some of its timesteps only, for the same network.

        Its timestep i is `timesteps[i]` of this process, which is what the network must be given. Outputs
        keep their meaning: mu is turned into x_0 by the coefficients it was trained with, and a raw learned
        log-variance keeps its place, as a fraction in [0, 1], between the two extremes (the posterior's
        variance and beta), which both grow with the stride.

        Args:
            timesteps: Strictly increasing, in [0, T), not empty.

        Returns:
            A process of len(timesteps) timesteps; this one, if that is all of them.

        Raises:
            ValueError: If the timesteps are none, out of range or not increasing.
        """
        schedule = self.schedule.respaced(timesteps)
        if schedule.num_timesteps == self.num_timesteps:
            return self
        diffusion = GaussianDiffusion(schedule, self.prediction, self.variance)
        diffusion._trained = {name: self._of_the_step(name)[list(timesteps)] for name in _OF_THE_STEP}
        return diffusion

    def split_output(self, model_output: Tensor, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """The network's output as prediction and what it says of the variance.

        Args:
            model_output: The network's output.
            like: float32 [B, C, ...] the images it belongs to; gives shape and precision.

        Returns:
            The prediction, like the images, and the same for the variance if that is learned, else None.

        Raises:
            ValueError: If the output's shape is another.
        """
        expected = list(like.shape)
        if self.variance.is_learned:
            if like.ndim < 2:
                raise ValueError(f"a learned variance needs images [B, C, ...], got {expected}")
            expected[1] = self.variance.output_channels(expected[1])
        if list(model_output.shape) != expected:
            why = "twice the channels, for the variance" if self.variance.is_learned else "as the images"
            raise ValueError(f"model_output has shape {list(model_output.shape)}, expected {expected}: {why}")
        output = model_output.to(like.dtype)
        if not self.variance.is_learned:
            return output, None
        channels = like.shape[1]
        return output[:, :channels], output[:, channels:]

    def predict_x0(self, x_t: Tensor, t: Tensor, model_output: Tensor, clip: bool = False) -> Tensor:
        """The estimate of x_0 in a network's output (eq. 15 for eps).

        Args:
            x_t: float32 [B, ...] noisy images.
            t: int64 [B] timesteps.
            model_output: The network's output.
            clip: Clip it to [-1, 1], as the paper's code does when it samples.

        Returns:
            x0_hat, like x_t.

        Raises:
            ValueError: On wrong shapes, precision or timesteps.
        """
        self.check(x_t, t)
        output, _ = self.split_output(model_output, x_t)
        match self.prediction:
            case Prediction.EPS:
                x0_hat = self.x0_from_eps(x_t, t, output)
            case Prediction.X0:
                x0_hat = output
            case Prediction.MU:
                weight_x0 = self._gather_of_the_step("posterior_mean_coef_x0", t, x_t)
                weight_xt = self._gather_of_the_step("posterior_mean_coef_xt", t, x_t)
                x0_hat = (output - weight_xt * x_t) / weight_x0
            case Prediction.V:
                x0_hat = self.x0_from_v(x_t, t, output)
        return x0_hat.clamp(-1.0, 1.0) if clip else x0_hat

    def predict_eps(self, x_t: Tensor, t: Tensor, model_output: Tensor) -> Tensor:
        """The estimate of the noise in a network's output.

        Args:
            x_t: float32 [B, ...] noisy images.
            t: int64 [B] timesteps.
            model_output: The network's output.

        Returns:
            eps_hat, like x_t.

        Raises:
            ValueError: On wrong shapes, precision or timesteps.
        """
        self.check(x_t, t)
        output, _ = self.split_output(model_output, x_t)
        match self.prediction:
            case Prediction.EPS:
                return output
            case Prediction.V:
                return self.eps_from_v(x_t, t, output)
            case Prediction.X0 | Prediction.MU:
                return self.eps_from_x0(x_t, t, self.predict_x0(x_t, t, model_output))

    def target(self, x0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What a perfect network would predict.

        Args:
            x0: float32 [B, ...] clean images.
            x_t: Noisy images, like x0.
            t: int64 [B] timesteps.
            noise: The noise in x_t, like x0.

        Returns:
            The noise, x_0, the posterior's mean or v, like x0.

        Raises:
            ValueError: On wrong shapes, precision or timesteps.
        """
        match self.prediction:
            case Prediction.EPS:
                return noise
            case Prediction.X0:
                return x0
            case Prediction.MU:
                return self.q_posterior_mean(x0, x_t, t)
            case Prediction.V:
                return self.v_from(x0, t, noise)

    def p_mean_variance(
        self, model_output: Tensor, x_t: Tensor, t: Tensor, clip_x0: bool = True
    ) -> ReverseStep:
        """The model's reverse step p(x_{t-1} | x_t) (eq. 1, 11).

        A network that predicts mu gives the mean itself, which clipping leaves alone (as in the paper's
        code); only a respaced process makes it from x0_hat.

        Args:
            model_output: The network's output.
            x_t: float32 [B, ...] noisy images.
            t: int64 [B] timesteps.
            clip_x0: Clip the estimate of x_0 to [-1, 1], as the paper's code does when it samples.

        Returns:
            Mean, variance and the estimate of x_0.

        Raises:
            ValueError: On wrong shapes, precision or timesteps.
        """
        x0_hat = self.predict_x0(x_t, t, model_output, clip_x0)
        output, values = self.split_output(model_output, x_t)
        variance, log_variance = self._reverse_variance(values, x_t, t)
        if self.prediction is Prediction.MU and self._trained is None:
            mean = output
        else:
            mean = self.q_posterior_mean(x0_hat, x_t, t)
        return ReverseStep(mean, variance, log_variance, x0_hat)

    def _reverse_variance(self, values: Tensor | None, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Variance of the reverse step and its logarithm."""
        match self.variance:
            case Variance.FIXED_SMALL:
                variance = self.gather("posterior_variance", t, x_t)
                return variance, self.gather("posterior_log_variance_clipped", t, x_t)
            case Variance.FIXED_LARGE:
                variance = self.gather("fixed_large_variance", t, x_t)
                return variance, self.gather("fixed_large_log_variance", t, x_t)
            case Variance.LEARNED:
                assert values is not None
                log_variance = values
                if self._trained is not None:
                    lower = self._gather_of_the_step("posterior_log_variance_clipped", t, x_t)
                    width = self._gather_of_the_step("log_variance_range", t, x_t)
                    # Where all noise is old noise the extremes meet; any fraction says the same there.
                    fraction = (values - lower) / width.clamp_min(torch.finfo(x_t.dtype).tiny)
                    log_variance = self._between_the_extremes(fraction.clamp(0.0, 1.0), x_t, t)
            case Variance.LEARNED_RANGE:
                assert values is not None
                log_variance = self._between_the_extremes((values + 1) / 2, x_t, t)
        return log_variance.exp(), log_variance

    def _between_the_extremes(self, fraction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The log-variance at a fraction of the way from the posterior's to log beta."""
        lower = self.gather("posterior_log_variance_clipped", t, x_t)
        return lower + fraction * self.gather("log_variance_range", t, x_t)

    def _of_the_step(self, name: str) -> Table:
        """A table of the process the network was trained on, at this process's timesteps."""
        table: Table = getattr(self.schedule, name) if self._trained is None else self._trained[name]
        return table

    def _gather_of_the_step(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        return self.lookup(("trained", name), lambda: self._of_the_step(name), t, like)
