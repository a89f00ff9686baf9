"""L_simple against its definition."""

import numpy as np
import pytest
import torch

from trainer.diffusion.losses import l_simple
from trainer.diffusion.process import GaussianDiffusion, Prediction
from trainer.diffusion.schedule import linear


def batch(n: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0, noise, output = (torch.randn(n, 3, 4, 6, generator=generator) for _ in range(3))
    return x0, noise, output, torch.arange(n) * 200


@pytest.mark.parametrize("prediction", list(Prediction))
def test_per_sample_mean_square(prediction: Prediction) -> None:
    d = GaussianDiffusion(linear(), prediction)
    x0, noise, output, t = batch()
    loss = l_simple(d, output, x0, d.q_sample(x0, t, noise), t, noise)
    target = (noise if prediction is Prediction.EPS else x0).double().numpy()
    expected = ((output.double().numpy() - target) ** 2).reshape(5, -1).mean(axis=1)
    assert loss.dtype == torch.float32
    np.testing.assert_allclose(loss.numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("prediction", list(Prediction))
def test_a_perfect_network_has_no_loss(prediction: Prediction) -> None:
    d = GaussianDiffusion(linear(), prediction)
    x0, noise, _, t = batch()
    x_t = d.q_sample(x0, t, noise)
    perfect = d.predict_eps(x_t, t, noise) if prediction is Prediction.EPS else d.predict_x0(x_t, t, x0)
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


def test_wrong_shapes() -> None:
    d = GaussianDiffusion(linear())
    x0, noise, output, t = batch()
    with pytest.raises(ValueError, match=r"model_output has shape \[5, 6, 4, 6\]"):
        l_simple(d, torch.cat([output, output], dim=1), x0, x0, t, noise)
    with pytest.raises(ValueError, match="noise has shape"):
        l_simple(d, output, x0, x0, t, noise[:1])
    with pytest.raises(ValueError, match=r"t has shape \[1\], but there are 5 images"):
        l_simple(d, output, x0, x0, t[:1], noise)
