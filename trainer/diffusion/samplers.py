"""Samplers as generators: each yields every step of its process, `final` keeps the last.

No gradients are recorded. Randomness comes from the caller: `noise_fn(draw)` gives the noise of one step,
where draw counts 1, 2, ... in the order the steps are taken; draw 0 is left for x_T itself.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.diffusion.process import GaussianDiffusion

Denoise = Callable[[Tensor, Tensor], Tensor]
"""The network: (x_t [B, ...], t int64 [B]) -> its output."""
Noise = Callable[[int], Tensor]
"""draw -> standard normal numbers, like x_t."""


@dataclass(frozen=True)
class Step:
    """One step of a sampler.

    Attributes:
        t: Timestep the network saw, in [0, T).
        x: The image after the step, like x_T.
        x0_hat: The estimate of x_0 the step was made from, like x_T.
    """

    t: int
    x: Tensor
    x0_hat: Tensor


def evenly_spaced(num_timesteps: int, steps: int) -> list[int]:
    """`steps` of T timesteps, starting at 0: floor(i T / steps) for i = 0, 1, ...

    Where `steps` divides T these are the strides of DDIM's code ("uniform") and of OpenAI's "ddimN".

    Args:
        num_timesteps: T.
        steps: How many to choose, in [1, T].

    Returns:
        Strictly increasing timesteps.

    Raises:
        ValueError: If there are not that many.
    """
    if not 1 <= steps <= num_timesteps:
        raise ValueError(f"steps must lie in [1, {num_timesteps}], the number of timesteps, got {steps}")
    return [i * num_timesteps // steps for i in range(steps)]


def ancestral(
    diffusion: GaussianDiffusion,
    denoise: Denoise,
    x_T: Tensor,
    noise_fn: Noise,
    timesteps: Sequence[int] | None = None,
    *,
    clip_x0: bool = True,
) -> Iterator[Step]:
    """Ancestral sampling (Ho et al. 2020, algorithm 2).

    Args:
        diffusion: The process and the meaning of the network's output.
        denoise: The network.
        x_T: float32 [B, ...] standard normal.
        noise_fn: Noise of each step but the last one.
        timesteps: Strictly increasing subset to visit; the process is then respaced, see
            `GaussianDiffusion.respaced`. Default: all.
        clip_x0: Clip each estimate of x_0 to [-1, 1].

    Returns:
        An iterator over the steps, highest timestep first.

    Raises:
        ValueError: If the timesteps are none, out of range or not increasing; while iterating, if the
            network or the noise has a wrong shape or precision.
    """
    if timesteps is None:
        timesteps = range(diffusion.num_timesteps)
    diffusion = diffusion.respaced(timesteps)
    return _ancestral(diffusion, denoise, x_T, noise_fn, tuple(timesteps), clip_x0)


@torch.no_grad()
def _ancestral(
    diffusion: GaussianDiffusion,
    denoise: Denoise,
    x_T: Tensor,
    noise_fn: Noise,
    timesteps: tuple[int, ...],
    clip_x0: bool,
) -> Iterator[Step]:
    x = x_T
    for draw, index in enumerate(reversed(range(len(timesteps))), start=1):
        output = denoise(x, all_at(x, timesteps[index]))
        step = diffusion.p_mean_variance(output, x, all_at(x, index), clip_x0)
        x = step.mean
        if index > 0:
            x = x + (0.5 * step.log_variance).exp() * _noise(noise_fn, draw, x)
        yield Step(timesteps[index], x, step.x0_hat)


def ddim(
    diffusion: GaussianDiffusion,
    denoise: Denoise,
    x_T: Tensor,
    *,
    steps: int,
    eta: float = 0.0,
    noise_fn: Noise | None = None,
    clip_x0: bool = True,
) -> Iterator[Step]:
    """DDIM (Song, Meng, Ermon 2021, arXiv 2010.02502, eq. 12 and 16) on evenly spaced timesteps.

    With eta = 1 on all timesteps it is ancestral sampling with the fixed-small variance. Where an estimate
    of x_0 is clipped, the noise direction follows the clipped one.

    Args:
        diffusion: The process and the meaning of the network's output (its variance is not used).
        denoise: The network.
        x_T: float32 [B, ...] standard normal.
        steps: Timesteps to visit, see `evenly_spaced`.
        eta: Share of fresh noise, in [0, 1]; 0 is deterministic.
        noise_fn: Noise of each step but the last one; needed if eta > 0.
        clip_x0: Clip each estimate of x_0 to [-1, 1].

    Returns:
        An iterator over the steps, highest timestep first.

    Raises:
        ValueError: If there are not that many steps, or eta is out of range or lacks its noise; while
            iterating, if the network or the noise has a wrong shape or precision.
    """
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta must lie in [0, 1], got {eta}")
    if eta > 0.0 and noise_fn is None:
        raise ValueError(f"DDIM with eta = {eta} needs noise_fn: only eta = 0 is deterministic")
    timesteps = evenly_spaced(diffusion.num_timesteps, steps)
    return _ddim(diffusion, denoise, x_T, timesteps, eta, noise_fn, clip_x0)


@torch.no_grad()
def _ddim(
    diffusion: GaussianDiffusion,
    denoise: Denoise,
    x_T: Tensor,
    timesteps: list[int],
    eta: float,
    noise_fn: Noise | None,
    clip_x0: bool,
) -> Iterator[Step]:
    abar = diffusion.schedule.alphas_cumprod
    x = x_T
    for draw, index in enumerate(reversed(range(len(timesteps))), start=1):
        t = all_at(x, timesteps[index])
        x0_hat = diffusion.predict_x0(x, t, denoise(x, t), clip_x0)
        eps = diffusion.eps_from_x0(x, t, x0_hat)
        # Coefficients in Python's double precision; only their products are float32.
        now = float(abar[timesteps[index]])
        before = float(abar[timesteps[index - 1]]) if index > 0 else 1.0
        sigma = eta * math.sqrt((1 - before) / (1 - now) * (1 - now / before))
        # At eta = 1 rounding may leave a hair below zero.
        x = math.sqrt(before) * x0_hat + math.sqrt(max(0.0, 1 - before - sigma**2)) * eps
        if sigma > 0.0:
            assert noise_fn is not None
            x = x + sigma * _noise(noise_fn, draw, x)
        yield Step(timesteps[index], x, x0_hat)


def ddim_invert(
    diffusion: GaussianDiffusion, denoise: Denoise, x0: Tensor, *, steps: int, clip_x0: bool = False
) -> Iterator[Step]:
    """DDIM run towards noise: the latent from which `ddim` with as many steps leads back to x_0.

    Each step is that of `ddim` between the same two timesteps, backwards, with the noise estimated at its
    beginning (Song, Meng, Ermon 2021, section 4.3). x_0 is taken for an image of the first timestep. So the
    round trip is exact only in the limit of many steps.

    Args:
        diffusion: The process and the meaning of the network's output (its variance is not used).
        denoise: The network.
        x0: float32 [B, ...] clean images in [-1, 1].
        steps: Timesteps on the way, see `evenly_spaced`; at least 2. The last one is reached without asking
            the network there, so it is evaluated steps - 1 times.
        clip_x0: Clip each estimate of x_0 to [-1, 1]; that may lose what the way back needs.

    Returns:
        An iterator over the steps, lowest timestep first; the last x stands at the highest timestep of
        `evenly_spaced`.

    Raises:
        ValueError: If there are not that many steps, or only one; while iterating, if the network's output
            has a wrong shape or precision.
    """
    timesteps = evenly_spaced(diffusion.num_timesteps, steps)
    if steps < 2:
        raise ValueError(
            f"inversion leads from one timestep to another: steps must be 2 or more, got {steps}"
        )
    return _ddim_invert(diffusion, denoise, x0, timesteps, clip_x0)


@torch.no_grad()
def _ddim_invert(
    diffusion: GaussianDiffusion, denoise: Denoise, x0: Tensor, timesteps: list[int], clip_x0: bool
) -> Iterator[Step]:
    abar = diffusion.schedule.alphas_cumprod
    x = x0
    for now, after in itertools.pairwise(timesteps):
        t = all_at(x, now)
        x0_hat = diffusion.predict_x0(x, t, denoise(x, t), clip_x0)
        eps = diffusion.eps_from_x0(x, t, x0_hat)
        signal = float(abar[after])
        x = math.sqrt(signal) * x0_hat + math.sqrt(1.0 - signal) * eps
        yield Step(now, x, x0_hat)


def final(steps: Iterator[Step]) -> Tensor:
    """Runs a sampler to its end.

    Args:
        steps: A sampler's iterator.

    Returns:
        The image after the last step, float32 [B, ...]: the sampled x_0, or an inversion's latent.
    """
    last: Step | None = None
    for step in steps:
        last = step
    assert last is not None, "a sampler takes at least one step"
    return last.x


def all_at(x: Tensor, t: int) -> Tensor:
    """The timestep t for each image of x.

    Args:
        x: [B, ...] images.
        t: The timestep.

    Returns:
        int64 [B] on x's device.
    """
    return torch.full((x.shape[0],), t, dtype=torch.int64, device=x.device)


def _noise(noise_fn: Noise, draw: int, like: Tensor) -> Tensor:
    """The noise of one step, checked: a smaller shape would be broadcast without a word."""
    noise = noise_fn(draw)
    if noise.shape != like.shape or noise.dtype != like.dtype:
        raise ValueError(
            f"noise_fn gave {noise.dtype} {list(noise.shape)}, the images are {like.dtype} {list(like.shape)}"
        )
    return noise
