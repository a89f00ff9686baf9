"""Checkpoint -> images: picture i is a pure function of (weights, settings, seed, i).

All noise of picture i comes from the counter-based generator at (seed, i), and pictures are computed in
fixed chunks aligned to multiples of the chunk size, the last one padded, so that neither the number of
processes nor N changes a bit of any picture (on the same device, build and thread count).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eval.statistics import Pictures
from trainer.diffusion.process import GaussianDiffusion
from trainer.diffusion.samplers import Denoise, Noise, Step, ancestral, ddim, evenly_spaced, final
from trainer.diffusion.solvers import dpm_solver, unipc
from trainer.randomness import Purpose, normal
from trainer.recipe_evaluation import SamplerName
from trainer.weights import Loaded


@dataclass(frozen=True)
class SamplerSettings:
    """How pictures are drawn.

    Attributes:
        sampler: `ancestral` (Ho et al. 2020, algorithm 2), `ddim` (Song et al. 2021), `dpm-solver++`
            (Lu et al. 2022, second order, multistep) or `unipc` (Zhao et al. 2023).
        steps: Network evaluations per picture, evenly spaced timesteps; the paper takes all T.
        eta: DDIM's stochasticity, 0 is deterministic.
        seed: Seed of the pictures' noise.
        chunk: Pictures per network call.
    """

    sampler: SamplerName
    steps: int
    eta: float
    seed: int
    chunk: int


def quantise(x: Tensor) -> Tensor:
    """Map [-1, 1] to pixels as the paper's code does: clip, scale to 0..255, drop the fraction.

    Args:
        x: Any shape, float32; NaN becomes 0.

    Returns:
        uint8 of the same shape.
    """
    pixels = (x.clamp(-1.0, 1.0) + 1.0) * 127.5
    return torch.nan_to_num(pixels, nan=0.0).to(torch.uint8)


def sample_chunk(
    loaded: Loaded,
    index: int,
    settings: SamplerSettings,
    device: torch.device,
    check: Callable[[], None] = lambda: None,
) -> Pictures:
    """Draw the pictures with ids [index * chunk, (index + 1) * chunk).

    Args:
        loaded: Network and diffusion of one checkpoint, on `device`.
        index: Number of the chunk, from 0.
        settings: How to draw.
        device: Where the network lives.
        check: Called before every network evaluation; may raise to end the work early.
    """
    first = index * settings.chunk
    ids = torch.arange(first, first + settings.chunk, dtype=torch.int64, device=device)
    image = loaded.recipe.image
    shape = (image.channels, image.size, image.size)

    def noise(draw: int) -> Tensor:
        return normal(settings.seed, Purpose.SAMPLE_NOISE, ids, shape, draw=draw)  # the samplers count from 1

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        check()
        output: Tensor = loaded.model(x_t, t)
        return output

    with torch.inference_mode():
        x_T = normal(settings.seed, Purpose.SAMPLE_NOISE, ids, shape, draw=0)
        x_0 = final(_reverse_process(loaded.diffusion, denoise, x_T, noise, settings))
        finite = torch.isfinite(x_0).flatten(1).all(dim=1)
        images = quantise(x_0).permute(0, 2, 3, 1).contiguous()
    return Pictures(images.cpu().numpy(), finite.cpu().numpy())


def _reverse_process(
    diffusion: GaussianDiffusion, denoise: Denoise, x_T: Tensor, noise: Noise, settings: SamplerSettings
) -> Iterator[Step]:
    match settings.sampler:
        case SamplerName.ANCESTRAL:
            total = diffusion.num_timesteps
            visited = None if settings.steps == total else evenly_spaced(total, settings.steps)
            return ancestral(diffusion, denoise, x_T, noise, visited)
        case SamplerName.DDIM:
            return ddim(diffusion, denoise, x_T, steps=settings.steps, eta=settings.eta, noise_fn=noise)
        case SamplerName.DPM_SOLVER:
            return dpm_solver(diffusion, denoise, x_T, steps=settings.steps)
        case SamplerName.UNIPC:
            return unipc(diffusion, denoise, x_T, steps=settings.steps)


def sample_images(
    loaded: Loaded,
    *,
    ids: Sequence[int],
    settings: SamplerSettings,
    device: torch.device,
    progress: Callable[[int], None] = lambda done: None,
) -> Pictures:
    """Draw the pictures with the given ids, in the order given.

    Args:
        loaded: Network and diffusion of one checkpoint, on `device`.
        ids: Numbers of the pictures, each >= 0.
        settings: How to draw.
        device: Where the network lives.
        progress: Told after each chunk how many pictures have been drawn.

    Returns:
        [len(ids), H, W, C] uint8 pictures and which of them are finite.
    """
    wanted = np.asarray(ids, dtype=np.int64)
    chunk_of = wanted // settings.chunk
    image = loaded.recipe.image
    images = np.empty((len(wanted), image.size, image.size, image.channels), dtype=np.uint8)
    finite = np.empty(len(wanted), dtype=np.bool_)
    done = 0
    for index in np.unique(chunk_of):
        drawn = sample_chunk(loaded, int(index), settings, device)
        rows = np.flatnonzero(chunk_of == index)
        places = wanted[rows] % settings.chunk
        images[rows], finite[rows] = drawn.images[places], drawn.finite[places]
        done += len(rows)
        progress(done)
    return Pictures(images, finite)
