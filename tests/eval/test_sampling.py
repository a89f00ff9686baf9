from dataclasses import replace

import numpy as np
import pytest
import torch

from eval.sampling import SamplerSettings, quantise, sample_chunk, sample_images
from eval.team import Stopped
from tests.support import make_run
from trainer.diffusion.samplers import ddim, final
from trainer.randomness import Purpose, normal
from trainer.recipe_evaluation import SamplerName
from trainer.run import Run
from trainer.weights import Loaded, load_for_inference

CPU = torch.device("cpu")
DDIM = SamplerSettings(SamplerName.DDIM, steps=3, eta=0.5, seed=7, chunk=4)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    run: Run = make_run(str(tmp_path_factory.mktemp("runs") / "run"), images_list=[64])
    return load_for_inference(run, run.checkpoints()[0], ema="main", device=CPU)


@pytest.mark.parametrize("sampler", list(SamplerName))
def test_a_picture_depends_on_its_number_alone(loaded: Loaded, sampler: SamplerName) -> None:
    settings = replace(DDIM, sampler=sampler)
    whole = sample_images(loaded, ids=range(10), settings=settings, device=CPU)
    assert whole.images.shape == (10, 8, 8, 1)
    assert whole.finite.all()
    assert len({image.tobytes() for image in whole.images}) == 10
    some = sample_images(loaded, ids=[9, 2, 5], settings=settings, device=CPU)
    assert np.array_equal(some.images, whole.images[[9, 2, 5]])
    assert np.array_equal(sample_chunk(loaded, 1, settings, CPU).images, whole.images[4:8])


def test_seed_and_sampler_matter(loaded: Loaded) -> None:
    first = sample_chunk(loaded, 0, DDIM, CPU).images
    for other in (
        SamplerSettings(SamplerName.DDIM, 3, 0.5, seed=8, chunk=4),
        SamplerSettings(SamplerName.DDIM, 3, 0.0, seed=7, chunk=4),
        *(SamplerSettings(name, 3, 0.0, seed=7, chunk=4) for name in SamplerName if name != DDIM.sampler),
    ):
        assert not np.array_equal(sample_chunk(loaded, 0, other, CPU).images, first)


def test_each_step_has_its_own_noise(loaded: Loaded) -> None:
    ids = torch.arange(4, 8)

    def noise(draw: int) -> torch.Tensor:
        return normal(DDIM.seed, Purpose.SAMPLE_NOISE, ids, (1, 8, 8), draw=draw)

    assert not torch.equal(noise(1), noise(2))
    with torch.inference_mode():
        steps = ddim(loaded.diffusion, loaded.model, noise(0), steps=3, eta=0.5, noise_fn=noise)
        expected = quantise(final(steps)).permute(0, 2, 3, 1).numpy()
    drawn = sample_chunk(loaded, 1, DDIM, CPU).images.astype(int)
    assert np.abs(drawn - expected.astype(int)).max() <= 1  # memory formats round differently


def test_pixels_as_the_papers_code_makes_them() -> None:
    x = torch.tensor([-2.0, -1.0, -0.999, 0.0, 0.5, 1.0, 2.0, torch.inf, -torch.inf, torch.nan])
    assert quantise(x).tolist() == [0, 0, 0, 127, 191, 255, 255, 255, 0, 0]
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(quantise((every.float() + 0.5) / 127.5 - 1), every)


def test_non_finite_pictures_are_marked(loaded: Loaded) -> None:
    class Broken(torch.nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            out = loaded.model(x, t)
            out[2] = torch.nan
            return out

    broken = Loaded(loaded.recipe, loaded.manifest, Broken(), loaded.diffusion)  # type: ignore[arg-type]
    drawn = sample_chunk(broken, 0, DDIM, CPU)
    assert drawn.finite.tolist() == [True, True, False, True]
    assert (drawn.images[2] == 0).all()


def test_sampling_can_be_stopped_between_steps(loaded: Loaded) -> None:
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise Stopped

    with pytest.raises(Stopped):
        sample_chunk(loaded, 0, DDIM, CPU, check)
    assert calls == 2
