"""Bits per dimension of real pictures under a checkpoint: the bound of Ho et al. 2020, eq. 5, over a split.

`trainer.diffusion.likelihood` holds the mathematics of a batch; this module feeds it a split. Picture n of
the split, in the order of the index and not mirrored, has its random numbers at (seed, n), and pictures go
through the network in fixed chunks aligned to multiples of the chunk size, the last one padded. So neither
the number of processes nor that of pictures moves a picture's value (on the same device, build and thread
count).

The draws of (seed, n, `Purpose.LIKELIHOOD`) are: draw 0 the noise of t = 0, for the exact bound and for the
estimate alike; then, for the exact bound, draw t that of timestep t; for an estimate from K timesteps, draw k
the noise of the k-th, and the draws after K the uniform numbers that choose them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.documents import Document
from data_pipeline.errors import UserError
from data_pipeline.index import LoadedIndex, load_index
from eval.metrics.rate_distortion import LEVELS_PER_UNIT, Number, RateDistortion, rmse_in_levels
from eval.moments import MomentSums
from eval.protocol import PictureSet
from eval.reference import RealPictures
from eval.statistics import Job
from eval.team import Team
from trainer.diffusion.likelihood import bits_by_timestep, estimate_bits_per_dim, prior_bits, vb_terms
from trainer.diffusion.samplers import Denoise, Noise, all_at
from trainer.randomness import Purpose, bits, normal
from trainer.weights import Loaded

_TOTAL, _PRIOR, _DISTORTION, _MSE = range(4)
_COLUMNS: Final = 4


@dataclass(frozen=True)
class BitsJob:
    """Which pictures to take the bound of, and how.

    Attributes:
        url: The data set.
        split: Name of the split.
        images: At most so many pictures, the first of the index; None for all.
        draws: None for the bound itself: all T timesteps, with one draw of the noise each, so T network
            evaluations per picture. K >= 1 for an unbiased estimate of it from K stratified timesteps
            and t = 0, so 1 + K evaluations.
        seed: Seed of the noise and of the choice of timesteps.
        chunk: Pictures per network call.
    """

    url: str
    split: str
    images: int | None
    draws: int | None
    seed: int
    chunk: int

    def __post_init__(self) -> None:
        assert self.draws is None or self.draws >= 1, self.draws
        assert self.chunk >= 1, self.chunk


class SplitBits(Document):
    """The bound of a split's pictures under one checkpoint, in bits/dim.

    The mean is the sum of the lossy code's two parts, rate and distortion. If the bound of one picture is not
    finite, neither are the numbers that it is part of: they are NaN or infinite, in JSON null.

    Attributes:
        checkpoint: Name of the checkpoint.
        pictures: The split.
        images: N, how many of its pictures were used, the first ones.
        draws: Timesteps per picture of an estimate; None for the bound itself.
        seed: Seed of the noise and of the choice of timesteps.
        not_finite: How many pictures have a bound that is not finite: the network's output was not.
        mean: Mean of the pictures' bounds.
        standard_error: Of the mean, as that of the population the pictures come from: it covers that they are
            a sample, the noise and, for an estimate, the choice of timesteps.
        prior: L_T.
        rate: L_T and L_{T-1} to L_1, what a receiver is told of x_0 but for its last detail.
        distortion: L_0, the bits of this detail; exact up to its noise, for an estimate too.
        rmse: Root of the mean squared error of the estimate of x_0 without it, over all pixels of all
            pictures, on the scale 0..255.
        curve: Rate and distortion by timestep; None for an estimate.
    """

    SCHEMA: ClassVar[str] = "bits/1"

    checkpoint: str
    pictures: PictureSet
    images: int
    draws: int | None
    seed: int
    not_finite: int
    mean: Number
    standard_error: Number
    prior: Number
    rate: Number
    distortion: Number
    rmse: Number
    curve: RateDistortion | None


@dataclass(frozen=True)
class ChunkBits:
    """The bound of one chunk's pictures, in bits/dim; float64 on the CPU.

    Attributes:
        per_image: [chunk, 4], by picture: its bound, L_T, L_0 and, on the scale [-1, 1], the mean squared
            error at t = 0 of the estimate of x_0. Zeros where the chunk is padded.
        by_timestep: [T, 2], by timestep: the term of the bound and that error, each summed over the pictures.
            [0, 2] for an estimate.
    """

    per_image: Tensor
    by_timestep: Tensor


def bits_of_split(
    team: Team, loaded: Loaded, job: BitsJob, progress: Callable[[int], None] = lambda done: None
) -> SplitBits:
    """Take the bound of a split's pictures; every process calls this alike.

    Chunk c belongs to process c mod P; numbers are gathered and added in chunk order everywhere, so every
    process ends with the same result, and with the same bits as one process alone. Memory does not grow with
    the number of pictures.

    Args:
        team: The processes.
        loaded: Network and diffusion of the checkpoint, on this process's device.
        job: Which pictures, and how.
        progress: Told after each round how many pictures are done.

    Returns:
        The result, the same in every process.

    Raises:
        Stopped: The team was asked to stop; looked at before every network evaluation.
        UserError: The split is missing, has fewer than two pictures, or pictures of another shape.
        StorageFault: Storage kept failing.
    """
    index, total = team.together(lambda: _pictures(job))
    image = loaded.recipe.image
    plan = Job(total, job.chunk, (image.size, image.size, image.channels))
    source = RealPictures(job.url, job.split, plan)

    def work(number: int) -> ChunkBits:
        team.check_stop()
        count = plan.size_of(number)
        images = source(number).images[:count] if count else np.empty((0, *plan.shape), dtype=np.uint8)
        return chunk_bits(loaded, number, images, job, team.device, team.check_stop)

    sums = _Sums(loaded.diffusion.num_timesteps if job.draws is None else 0)
    for base in plan.rounds(team.size):
        own = team.together(lambda base=base: work(base + team.rank))  # type: ignore[misc]
        per_image = team.gather(own.per_image)
        by_timestep = team.gather(own.by_timestep) if len(own.by_timestep) else own.by_timestep
        for member, rows in plan.members(base, team.size):
            steps = slice(member * sums.timesteps, (member + 1) * sums.timesteps)
            sums.add(per_image[rows], by_timestep[steps])
        progress(min((base + team.size) * job.chunk, total))
    return sums.result(loaded.manifest.name, index, job)


def chunk_bits(
    loaded: Loaded,
    index: int,
    images: NDArray[np.uint8],
    job: BitsJob,
    device: torch.device,
    check: Callable[[], None] = lambda: None,
) -> ChunkBits:
    """Take the bound of the pictures with numbers index * chunk and following.

    Args:
        loaded: Network and diffusion of one checkpoint, on `device`.
        index: Number of the chunk, from 0.
        images: [n, H, W, C] uint8, n <= chunk; for n = 0 the network is not asked.
        job: How.
        device: Where the network lives.
        check: Called before every network evaluation; may raise to end the work early.
    """
    count = len(images)
    per_image = torch.zeros(job.chunk, _COLUMNS, dtype=torch.float64)
    if count == 0:
        timesteps = loaded.diffusion.num_timesteps if job.draws is None else 0
        return ChunkBits(per_image, torch.zeros(timesteps, 2, dtype=torch.float64))
    padded = np.zeros((job.chunk, *images.shape[1:]), dtype=np.uint8)
    padded[:count] = images
    pixels = torch.from_numpy(padded).to(device).permute(0, 3, 1, 2).contiguous()
    x0 = pixels.float() / LEVELS_PER_UNIT - 1.0
    first = index * job.chunk
    ids = torch.arange(first, first + job.chunk, dtype=torch.int64, device=device)
    shape = tuple(x0.shape[1:])

    def noise(draw: int) -> Tensor:
        return normal(job.seed, Purpose.LIKELIHOOD, ids, shape, draw=draw)

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        check()
        output: Tensor = loaded.model(x_t, t)
        return output

    with torch.inference_mode():
        if job.draws is None:
            columns, by_timestep = _exact(loaded, denoise, x0, noise, count)
        else:
            uniforms = _uniforms(job.seed, ids, job.draws, x0[0].numel())
            columns, by_timestep = _estimate(loaded, denoise, x0, noise, uniforms)
        per_image[:count] = columns[:count].cpu()
        return ChunkBits(per_image, by_timestep.cpu())


def _exact(loaded: Loaded, denoise: Denoise, x0: Tensor, noise: Noise, count: int) -> tuple[Tensor, Tensor]:
    """All T terms: [B, 4] by picture, [T, 2] summed over the first `count` pictures."""
    diffusion = loaded.diffusion
    prior = prior_bits(diffusion, x0).double()
    by_timestep = torch.zeros(diffusion.num_timesteps, 2, dtype=torch.float64, device=x0.device)
    rate = torch.zeros_like(prior)
    term = None
    for term in bits_by_timestep(diffusion, denoise, x0, noise):
        rate += term.rate.double()
        by_timestep[term.t, 0] = term.rate[:count].double().sum()
        by_timestep[term.t, 1] = term.x0_mse[:count].double().sum()
    assert term is not None
    assert term.t == 0, "the terms come from the last timestep down"
    columns = (prior + rate, prior, term.rate.double(), term.x0_mse.double())
    return torch.stack(columns, dim=1), by_timestep


def _estimate(
    loaded: Loaded, denoise: Denoise, x0: Tensor, noise: Noise, uniforms: Tensor
) -> tuple[Tensor, Tensor]:
    """L_0 and K other terms: [B, 4] by picture, and nothing by timestep."""
    calls: list[tuple[Tensor, Tensor]] = []

    def recording(x_t: Tensor, t: Tensor) -> Tensor:
        output = denoise(x_t, t)
        if not calls:
            calls.append((x_t, output))
        return output

    estimate = estimate_bits_per_dim(loaded.diffusion, recording, x0, uniforms, noise)
    # Its first call is for t = 0: L_0 and the estimate of x_0 are told from that again, at no evaluation.
    x_t, output = calls[0]
    distortion, x0_hat = vb_terms(loaded.diffusion, output, x0, x_t, all_at(x0, 0), clip_x0=True)
    mse = (x0_hat - x0).square().flatten(1).mean(1)
    prior = prior_bits(loaded.diffusion, x0)
    columns = (estimate.per_image, prior.double(), distortion.double(), mse.double())
    return torch.stack(columns, dim=1), torch.zeros(0, 2, dtype=torch.float64)


def _uniforms(seed: int, ids: Tensor, draws: int, numel: int) -> Tensor:
    """[B, K] float64 on [0, 1), multiples of 2^-32, from draws behind those of the noise."""
    # Every draw of a purpose takes as many words, here those of a picture; usually one draw is enough.
    rounds = -(-draws // numel)
    words = [bits(seed, Purpose.LIKELIHOOD, ids, numel, draw=draws + 1 + place) for place in range(rounds)]
    return torch.cat(words, dim=1)[:, :draws].double() / 2**32


def _pictures(job: BitsJob) -> tuple[LoadedIndex, int]:
    """Read the index and count the pictures to use."""
    index = load_index(job.url)
    total = index.samples(job.split)
    total = total if job.images is None else min(total, job.images)
    if total < 2:
        raise UserError(
            f"{job.url}: split {job.split!r} gives {total} picture(s), bits/dim with an error need two or "
            "more; build the data set with a larger --val-fraction, or ask for more pictures or another split"
        )
    return index, total


class _Sums:
    """Sums over pictures, added chunk by chunk in a fixed order: O(T) memory."""

    def __init__(self, timesteps: int) -> None:
        self.timesteps = timesteps
        self._per_image = MomentSums(_COLUMNS)
        self._by_timestep = torch.zeros(timesteps, 2, dtype=torch.float64)
        self._not_finite = 0

    def add(self, per_image: Tensor, by_timestep: Tensor) -> None:
        """Add a chunk: [n, 4] by picture and [T, 2] by timestep."""
        self._per_image.add(per_image)
        self._by_timestep += by_timestep
        self._not_finite += int((~torch.isfinite(per_image[:, _TOTAL])).sum())

    def result(self, checkpoint: str, index: LoadedIndex, job: BitsJob) -> SplitBits:
        """The numbers of all pictures added so far."""
        moments = self._per_image.result()
        count = moments.count
        total, prior, distortion, mse = (float(value) for value in moments.mean)
        variance_of_mean = moments.covariance[_TOTAL, _TOTAL] / count
        terms, x0_mse = (self._by_timestep / count).numpy().T
        return SplitBits(
            checkpoint=checkpoint,
            pictures=PictureSet(index_sha256=index.sha256, split=job.split),
            images=count,
            draws=job.draws,
            seed=job.seed,
            not_finite=self._not_finite,
            mean=total,
            standard_error=float(variance_of_mean.sqrt()),
            prior=prior,
            rate=total - distortion,
            distortion=distortion,
            rmse=rmse_in_levels(mse),
            curve=RateDistortion.of(prior, terms, x0_mse) if self.timesteps else None,
        )
