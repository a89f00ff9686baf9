import math
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from data_pipeline.errors import UserError
from data_pipeline.index import load_index
from data_pipeline.split_reader import read_split
from eval.bits import BitsJob, SplitBits, bits_of_split, chunk_bits
from eval.team import AGREED, Stopped, Team
from tests.eval.helpers import start_run
from tests.trainer.thread_ranks import on_ranks
from trainer.diffusion.likelihood import BitsEstimate, bits_per_dim, estimate_bits_per_dim
from trainer.distributed import Ranks
from trainer.randomness import Purpose, bits, normal
from trainer.run import Run
from trainer.weights import Loaded, load_for_inference

CPU = torch.device("cpu")
T, CHUNK, SEED = 12, 4, 5


class ThreadTeam(Team):
    """One of several threads that share an evaluation."""

    device, rank, size = CPU, 0, 0

    def __init__(self, ranks: Ranks, stop: threading.Event | None = None) -> None:
        self.stop, self._ranks = stop or threading.Event(), ranks
        self.rank, self.size = ranks.rank, ranks.world  # type: ignore[misc]

    def together(self, work: Callable[[], Any]) -> Any:
        result, error = None, None
        try:
            result = work()
        except AGREED as caught:
            error = caught
        for found in self._ranks.gather(error):
            if found is not None:
                raise found
        return result

    def gather(self, value: Tensor) -> Tensor:
        return torch.cat(self._ranks.gather(value))


@pytest.fixture(scope="module")
def short_run(tmp_path_factory: pytest.TempPathFactory, data_url: str) -> Run:
    """A checkpoint of a process of few timesteps."""
    overrides = (f"diffusion.num_timesteps={T}", "diffusion.beta_end=0.5", "evaluation.quick.steps=2")
    return start_run(tmp_path_factory.mktemp("bits") / "run", data_url, (64,), overrides)


@pytest.fixture(scope="module")
def loaded(short_run: Run) -> Loaded:
    return load_for_inference(short_run, short_run.checkpoints()[0], ema="main", device=CPU)


@pytest.fixture
def exact(data_url: str) -> BitsJob:
    """Three chunks, the last of one picture."""
    return BitsJob(data_url, "train", images=9, draws=None, seed=SEED, chunk=CHUNK)


def _with_model(loaded: Loaded, model: nn.Module) -> Loaded:
    return Loaded(loaded.recipe, loaded.manifest, model, loaded.diffusion)  # type: ignore[arg-type]


def _x0(data_url: str, first: int, count: int) -> Tensor:
    """Grey pictures of the training split as the network sees them."""
    end = first + count
    (images,) = read_split(data_url, "train", channels=1, image_size=8, batch=end, limit=end)
    return torch.from_numpy(images[first:, None, :, :, 0]).to(torch.float32) / 127.5 - 1


def _noise(first: int, draw: int) -> Tensor:
    return normal(SEED, Purpose.LIKELIHOOD, torch.arange(first, first + CHUNK), (1, 8, 8), draw=draw)


def test_exact_is_the_bound_of_the_mathematics(
    loaded: Loaded, exact: BitsJob, data_url: str, team: Team
) -> None:
    found = bits_of_split(team, loaded, replace(exact, images=8))
    wholes = []
    for first in (0, CHUNK):
        noise = partial(_noise, first)
        wholes.append(bits_per_dim(loaded.diffusion, loaded.model, _x0(data_url, first, CHUNK), noise))
    prior, rate, mse = (
        torch.cat([getattr(whole, name) for whole in wholes]).double() for name in ("prior", "rate", "x0_mse")
    )
    per_image = rate.sum(1) + prior
    expected = BitsEstimate.of(per_image)
    assert torch.cat([whole.total for whole in wholes]).tolist() == per_image.float().tolist()
    assert (found.images, found.not_finite, found.draws) == (8, 0, None)
    assert found.checkpoint == loaded.manifest.name
    assert found.pictures.index_sha256 == load_index(data_url).sha256
    assert found.mean == pytest.approx(expected.mean, rel=1e-13)
    assert found.standard_error == pytest.approx(expected.standard_error, rel=1e-12)
    assert found.prior == pytest.approx(float(prior.mean()), rel=1e-13)
    assert found.distortion == pytest.approx(float(rate[:, 0].mean()), rel=1e-13)
    assert found.rate + found.distortion == pytest.approx(found.mean, rel=1e-14)
    # The curve: x_T for the prior alone, then each x_t for one term more; the last point is the whole's.
    assert found.curve is not None
    root = 127.5 * mse.mean(0).sqrt()
    assert found.curve.rmse == pytest.approx(root.tolist(), rel=1e-12)
    assert found.curve.terms == pytest.approx(rate.mean(0).tolist(), rel=1e-12)
    told = [float(prior.mean() + rate[:, t + 1 :].sum(1).mean()) for t in range(T)]
    assert found.curve.rate == pytest.approx(told, rel=1e-12)
    assert found.curve.rate[-1] == found.prior
    assert found.rate == pytest.approx(found.curve.rate[0], rel=1e-13)
    assert found.rmse == pytest.approx(found.curve.rmse[0], rel=1e-13)
    assert list(found.curve.rate) == sorted(found.curve.rate, reverse=True)


def test_an_estimate_is_that_of_the_mathematics(
    loaded: Loaded, exact: BitsJob, data_url: str, team: Team
) -> None:
    draws = 70  # more than a picture has pixels: their uniform numbers take two draws
    job = replace(exact, images=4, draws=draws)
    found = bits_of_split(team, loaded, job)
    ids = torch.arange(CHUNK)
    words = [bits(SEED, Purpose.LIKELIHOOD, ids, 64, draw=draws + 1 + more) for more in range(2)]
    expected = estimate_bits_per_dim(
        loaded.diffusion,
        loaded.model,
        _x0(data_url, 0, CHUNK),
        torch.cat(words, dim=1)[:, :draws].double() / 2**32,
        lambda k: _noise(0, k),
    )
    assert found.mean == pytest.approx(expected.mean, rel=1e-13)
    assert found.standard_error == pytest.approx(expected.standard_error, rel=1e-12)
    assert (found.curve, found.draws) == (None, draws)
    # What is not estimated is that of the exact bound: the noise of t = 0 is the same.
    whole = bits_of_split(team, loaded, replace(job, draws=None))
    for name in ("prior", "distortion", "rmse"):
        assert getattr(found, name) == pytest.approx(getattr(whole, name), rel=1e-13)
    assert found.rate + found.distortion == pytest.approx(found.mean, rel=1e-14)
    assert found.rate != whole.rate


def test_the_estimate_is_unbiased(loaded: Loaded, exact: BitsJob, data_url: str) -> None:
    """Under many seeds, each with its noise and timesteps, its mean is that of the bound itself."""

    class Shrink(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return 0.9 * x

    shrinking = _with_model(loaded, Shrink())
    (images,) = read_split(data_url, "train", channels=1, image_size=8, batch=24, limit=24)

    def means(draws: int | None, seeds: int) -> tuple[float, float]:
        jobs = [replace(exact, draws=draws, chunk=24, seed=seed) for seed in range(seeds)]
        values = [float(chunk_bits(shrinking, 0, images, job, CPU).per_image[:, 0].mean()) for job in jobs]
        return float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(seeds)

    bound, error_of_bound = means(None, 20)
    estimate, error_of_estimate = means(5, 120)
    assert abs(estimate - bound) < 4 * math.hypot(error_of_bound, error_of_estimate)
    assert 0 < error_of_bound < error_of_estimate < 0.01 * bound


@pytest.mark.parametrize("draws", [None, 3])
def test_neither_the_pictures_nor_the_chunks_before_move_a_value(
    loaded: Loaded, exact: BitsJob, data_url: str, draws: int | None
) -> None:
    job = replace(exact, draws=draws)
    (images,) = read_split(data_url, "train", channels=1, image_size=8, batch=4, limit=4)
    full = chunk_bits(loaded, 1, images, job, CPU).per_image
    part = chunk_bits(loaded, 1, images[:3], job, CPU).per_image
    assert torch.equal(part[:3], full[:3])
    assert (part[3] == 0).all()
    assert full.unique(dim=0).shape == full.shape  # all are different
    assert not torch.equal(chunk_bits(loaded, 2, images, job, CPU).per_image[:, 0], full[:, 0])
    other = chunk_bits(loaded, 1, images, replace(job, seed=6), CPU).per_image
    assert not torch.equal(other[:, 0], full[:, 0])
    assert torch.equal(other[:, 1], full[:, 1])  # the prior has no noise


def test_every_picture_counts_once(loaded: Loaded, exact: BitsJob, data_url: str, team: Team) -> None:
    done: list[int] = []
    found = bits_of_split(team, loaded, replace(exact, draws=1, images=None), done.append)
    total = load_index(data_url).index.samples("train")
    assert total % CHUNK != 0, "the last chunk must be padded for this test to mean something"
    assert found.images == total == done[-1]
    assert done == [min(CHUNK * (i + 1), total) for i in range(len(done))]
    mean_square = _x0(data_url, 0, total).double().square().mean()
    abar = loaded.diffusion.schedule.alphas_cumprod[-1]
    prior = 0.5 * (abar * float(mean_square) - np.log1p(-abar) - abar) / np.log(2)
    assert found.prior == pytest.approx(prior, rel=1e-6)
    assert bits_of_split(team, loaded, replace(exact, draws=1, images=10**9)) == found


def test_three_members_equal_one(loaded: Loaded, exact: BitsJob, team: Team) -> None:
    """A round that all take part in; two rounds, and the last chunk of one; a round of only one member."""
    cases: list[tuple[int, int, int | None]] = [(9, CHUNK, None), (11, 2, None), (7, 2, 2), (3, CHUNK, 2)]
    jobs = [replace(exact, images=images, chunk=chunk, draws=draws) for images, chunk, draws in cases]
    alone = [bits_of_split(team, loaded, job) for job in jobs]
    for found in on_ranks(3, lambda ranks: [bits_of_split(ThreadTeam(ranks), loaded, job) for job in jobs]):
        assert found == alone


def test_a_stop_of_one_member_ends_all(loaded: Loaded, exact: BitsJob) -> None:
    def member(ranks: Ranks) -> None:
        stop = threading.Event()
        if ranks.rank == 1:
            stop.set()
        with pytest.raises(Stopped):
            bits_of_split(ThreadTeam(ranks, stop), loaded, exact)

    on_ranks(3, member)


@pytest.mark.parametrize(("draws", "evaluations"), [(None, T), (3, 4)])
def test_it_stops_between_network_evaluations(
    loaded: Loaded, exact: BitsJob, draws: int | None, evaluations: int
) -> None:
    calls = 0

    class Interrupted(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            if calls == evaluations + 2:
                stop.set()
            output: Tensor = loaded.model(x, t)
            return output

    stop = threading.Event()
    with Team(stop) as team, pytest.raises(Stopped):
        bits_of_split(team, _with_model(loaded, Interrupted()), replace(exact, draws=draws))
    assert calls == evaluations + 2  # a chunk takes T or 1 + K of them; the second is left at its second


def test_what_is_not_finite_is_counted(loaded: Loaded, exact: BitsJob, team: Team) -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            output: Tensor = loaded.model(x, t)
            output[2] = torch.nan
            return output

    found = bits_of_split(team, _with_model(loaded, Broken()), exact)
    assert found.not_finite == 2  # the third of each whole chunk; the padding does not count
    assert np.isnan([found.mean, found.standard_error, found.rate, found.distortion, found.rmse]).all()
    assert found.prior > 0
    written = found.to_json()
    assert b'"mean": null' in written
    again = SplitBits.from_json(written, "bits.json")
    assert np.isnan(again.mean)
    assert again.to_json() == written


def test_the_padding_is_in_no_sum(loaded: Loaded, exact: BitsJob, team: Team) -> None:
    found = bits_of_split(team, loaded, exact)
    assert found.curve is not None
    assert found.curve.rate[0] == pytest.approx(found.rate, rel=1e-12)
    assert found.curve.terms[0] == pytest.approx(found.distortion, rel=1e-12)
    assert found.curve.rmse[0] == pytest.approx(found.rmse, rel=1e-12)


def test_it_is_stored_as_it_is(loaded: Loaded, exact: BitsJob, team: Team) -> None:
    found = bits_of_split(team, loaded, exact)
    written = found.to_json()
    assert written.startswith(b'{\n  "schema": "bits/1"')
    assert SplitBits.from_json(written, "bits.json") == found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "test"}, r"no split 'test'; it has train, val"),
        ({"images": 1}, r"split 'train' gives 1 picture\(s\), .* need two or more; .*--val-fraction"),
        ({"url": "/nowhere"}, r"/nowhere/index\.json: no such file"),
    ],
)
def test_mistakes_are_one_clear_line(
    loaded: Loaded, exact: BitsJob, team: Team, changes: dict[str, str | int], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        bits_of_split(team, loaded, replace(exact, **changes))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_pictures_of_another_shape_are_refused(loaded: Loaded, exact: BitsJob, team: Team) -> None:
    image = loaded.recipe.image.model_copy(update={"channels": 3})
    other = replace(loaded, recipe=loaded.recipe.model_copy(update={"image": image}))
    with pytest.raises(UserError, match="holds pictures of size 8 with 1 channel"):
        bits_of_split(team, other, exact)
