"""Training losses, one number per sample.

L_simple, the variational bound and their hybrid; the first may be weighted by timestep. A weighting is
defined once, on the error of x_0, and divided by the factor that turns this error into that of the
network's own target, so that the same x0_hat costs the same whatever the network predicts.
"""

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import torch
from torch import Tensor

from trainer.diffusion.likelihood import vb_terms
from trainer.diffusion.process import GaussianDiffusion, Prediction
from trainer.diffusion.schedule import Table


class LossKind(StrEnum):
    """What is minimised."""

    SIMPLE = "simple"  # L_simple (Ho et al. 2020, eq. 14)
    VB = "vb"  # the bound's term of the timestep (eq. 5), in bits/dim
    HYBRID = "hybrid"  # L_simple for the mean, the bound for the variance (Nichol & Dhariwal 2021, eq. 16)


class Weighting(StrEnum):
    """Weight of a timestep's squared error in L_simple."""

    NONE = "none"  # the network's target as it is
    MIN_SNR = "min-snr"  # min(SNR, gamma) on x_0 (Hang et al. 2023, arXiv 2303.09556)
    P2 = "p2"  # 1 / (k + SNR)^gamma on eps (Choi et al. 2022, arXiv 2204.00227)


@dataclass(frozen=True)
class LossConfig:
    """What a recipe says about the loss. Defaults: the paper's L_simple.

    Attributes:
        kind: What is minimised.
        weighting: Weights by timestep, of L_simple and of its part in the hybrid.
        min_snr_gamma: gamma of min-SNR, > 0.
        p2_gamma: gamma of P2, >= 0; 0 is L_simple of eps.
        p2_k: k of P2, > 0.
        hybrid_weight: Weight lambda of the full bound (T times a timestep's term) in the hybrid, > 0.

    Raises:
        ValueError: At construction, if a number is out of its range.
    """

    kind: LossKind = LossKind.SIMPLE
    weighting: Weighting = Weighting.NONE
    min_snr_gamma: float = 5.0
    p2_gamma: float = 1.0
    p2_k: float = 1.0
    hybrid_weight: float = 0.001

    def __post_init__(self) -> None:
        for name in ("min_snr_gamma", "p2_k", "hybrid_weight"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not self.p2_gamma >= 0:
            raise ValueError(f"p2_gamma must not be negative, got {self.p2_gamma}")


def check_loss(diffusion: GaussianDiffusion, config: LossConfig) -> None:
    """Refuses a loss that cannot train this network.

    Args:
        diffusion: The process and the meaning of the network's output.
        config: The loss.

    Raises:
        ValueError: If the loss leaves a learned variance or the last timestep without gradient, wants a
            learned variance where there is none, or weights the bound.
    """
    learned = diffusion.variance.is_learned
    if config.kind is LossKind.SIMPLE and learned:
        raise ValueError(
            f"loss = simple gives variance = {diffusion.variance} no gradient: use loss = hybrid or vb, or a "
            "fixed variance"
        )
    if config.kind is LossKind.HYBRID and not learned:
        raise ValueError(
            f"loss = hybrid is for a learned variance, but variance = {diffusion.variance}: use loss = simple"
        )
    if config.kind is LossKind.VB and config.weighting is not Weighting.NONE:
        raise ValueError(
            f"loss = vb has its own weights, so weighting = {config.weighting} cannot go with it: use "
            "weighting = none, or loss = simple"
        )
    if config.weighting is not Weighting.NONE and diffusion.schedule.alphas_cumprod[-1] == 0:
        raise ValueError(
            f"weighting = {config.weighting} gives the last timestep no weight where the schedule ends in "
            "pure noise (abar_T = 0), and sampling begins there: use weighting = none, or another schedule"
        )


def training_losses(
    diffusion: GaussianDiffusion,
    model_output: Tensor,
    x0: Tensor,
    x_t: Tensor,
    t: Tensor,
    noise: Tensor,
    config: LossConfig,
) -> Tensor:
    """The configured loss of each sample.

    Args:
        diffusion: The process and the meaning of the network's output.
        model_output: The network's output, of any floating precision; widened to x0's.
        x0: float32 [B, ...] clean images in [-1, 1].
        x_t: Noisy images, like x0.
        t: int64 [B] timesteps.
        noise: The noise in x_t, like x0.
        config: Which loss.

    Returns:
        float32 [B], one loss per sample.

    Raises:
        ValueError: If the loss cannot go with the process, or on wrong shapes, precision or range.
    """
    check_loss(diffusion, config)
    if config.kind is LossKind.VB:
        return vb_terms(diffusion, model_output, x0, x_t, t, clip_x0=False)[0]
    loss = l_simple(diffusion, model_output, x0, x_t, t, noise)
    if config.weighting is not Weighting.NONE:
        loss = loss * diffusion.lookup(config, lambda: timestep_weights(diffusion, config), t, loss)
    if config.kind is LossKind.HYBRID:
        prediction, values = diffusion.split_output(model_output, x0)
        assert values is not None
        # The bound would overwhelm L_simple in the mean, which therefore is held fast.
        frozen = torch.cat([prediction.detach(), values], dim=1)
        bits, _ = vb_terms(diffusion, frozen, x0, x_t, t, clip_x0=False)
        loss = loss + config.hybrid_weight * diffusion.num_timesteps * bits
    return loss


def l_simple(
    diffusion: GaussianDiffusion, model_output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor
) -> Tensor:
    """L_simple of Ho et al. 2020, eq. 14: squared error of the prediction, averaged over the pixels.

    Args:
        diffusion: Says what the network predicts.
        model_output: The network's output, of any floating precision; widened to x0's. What it says of a
            learned variance is not looked at.
        x0: float32 [B, ...] clean images in [-1, 1].
        x_t: Noisy images, like x0.
        t: int64 [B] timesteps.
        noise: The noise in x_t, like x0.

    Returns:
        float32 [B], one loss per sample.

    Raises:
        ValueError: If the shapes do not agree.
    """
    prediction, _ = diffusion.split_output(model_output, x0)
    for name, tensor in (("x_t", x_t), ("noise", noise)):
        if tensor.shape != x0.shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, x0 {list(x0.shape)}")
    if t.shape != x0.shape[:1]:
        raise ValueError(f"t has shape {list(t.shape)}, but there are {x0.shape[0]} images")
    return (prediction - diffusion.target(x0, x_t, t, noise)).square().flatten(1).mean(1)


def timestep_weights(diffusion: GaussianDiffusion, config: LossConfig) -> Table:
    """What L_simple is multiplied by at each timestep.

    Args:
        diffusion: The process and the meaning of the network's output.
        config: The weighting.

    Returns:
        float64 [T], at least 0; 0 only where nothing is left of the signal (`check_loss` refuses that).
    """
    schedule = diffusion.schedule
    snr = schedule.snr
    match config.weighting:
        case Weighting.NONE:
            return np.ones_like(snr)
        case Weighting.MIN_SNR:
            on_x0 = np.minimum(snr, config.min_snr_gamma)
        case Weighting.P2:
            on_x0 = snr / (config.p2_k + snr) ** config.p2_gamma
    # Squared error of the target over that of x_0, for the x_t at hand.
    match diffusion.prediction:
        case Prediction.EPS:
            factor = snr  # eq. 4 solved for eps
        case Prediction.X0:
            factor = np.ones_like(snr)
        case Prediction.MU:
            factor = schedule.posterior_mean_coef_x0**2  # eq. 7
        case Prediction.V:
            factor = snr + 1.0  # v = (sqrt(abar) x_t - x_0) / sqrt(1 - abar)
    weights: Table = on_x0 / factor
    return weights
