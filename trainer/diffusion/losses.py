"""Training losses, per sample."""

from torch import Tensor

from trainer.diffusion.process import GaussianDiffusion, Prediction


def l_simple(
    diffusion: GaussianDiffusion, model_output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor
) -> Tensor:
    """L_simple of Ho et al. 2020, eq. 14: squared error of the prediction, averaged over the pixels.

    Args:
        diffusion: Says what the network predicts.
        model_output: The network's output [B, ...], of any floating precision; widened to x0's.
        x0: float32 [B, ...] clean images in [-1, 1].
        x_t: Noisy images, like x0.
        t: int64 [B] timesteps.
        noise: The noise in x_t, like x0.

    Returns:
        float32 [B], one loss per sample.

    Raises:
        ValueError: If the shapes do not agree.
    """
    for name, tensor in (("model_output", model_output), ("x_t", x_t), ("noise", noise)):
        if tensor.shape != x0.shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, x0 {list(x0.shape)}")
    if t.shape != x0.shape[:1]:
        raise ValueError(f"t has shape {list(t.shape)}, but there are {x0.shape[0]} images")
    match diffusion.prediction:
        case Prediction.EPS:
            target = noise
        case Prediction.X0:
            target = x0
    return (model_output.to(x0.dtype) - target).square().flatten(1).mean(1)
