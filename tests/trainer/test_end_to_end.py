"""A small model really learns: the golden losses of the quick start, and the moments of a toy data set."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from data_pipeline.build import build
from data_pipeline.sources.digits import DigitsSource
from tests.support import metric_rows, start_training
from trainer.diffusion.losses import l_simple
from trainer.diffusion.process import GaussianDiffusion, Variance
from trainer.diffusion.samplers import ddim, final
from trainer.diffusion.schedule import linear
from trainer.randomness import Purpose, normal, timesteps
from trainer.run import Run
from trainer.unet import UNet, UNetConfig

GOLDEN = Path(__file__).parent / "golden"
STEPS = 50
BATCH = 64
BLOBS = UNetConfig(
    image_size=8,
    in_channels=1,
    out_channels=1,
    base_channels=16,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(4,),
    norm_groups=8,
)


def golden(name: str) -> list[float]:
    return [float(line) for line in (GOLDEN / name).read_text().split()]


def test_golden_losses_of_the_quick_start(tmp_path: Path) -> None:
    """The first 50 steps as users run them; the file changes only together with its reason."""
    shards, run = str(tmp_path / "shards"), Run(str(tmp_path / "run"))
    build(DigitsSource(), shards)
    settings = [f"train.images={STEPS * BATCH}", f"logging.every_images={BATCH}", "logging.tensorboard=false"]
    process = start_training(run, shards, settings)
    log, _ = process.communicate(timeout=200)
    assert process.returncode == 0, log
    rows = metric_rows(run)
    losses = [row["loss"] for row in rows]
    assert losses == pytest.approx(golden("quickstart-50-losses.txt"), abs=1e-4)
    quartiles = {f"loss_q{index}" for index in range(4)}
    assert all(quartiles <= row.keys() for row in rows)


def blobs(n: Tensor) -> Tensor:
    """One bright Gaussian spot at a random place: float32 [B, 1, 8, 8] in [-1, 1]."""
    centre = 3.5 + normal(7, Purpose.CODEC, n, (2,))
    grid = torch.arange(8.0)
    rows, columns = ((grid - centre[:, axis, None]).square() / 3 for axis in (0, 1))
    return 2 * torch.exp(-rows[:, :, None] - columns[:, None, :]).unsqueeze(1) - 1


def test_a_small_model_learns_the_moments_of_its_data() -> None:
    diffusion = GaussianDiffusion(linear(), variance=Variance.FIXED_LARGE)
    model = UNet(BLOBS, torch.Generator().manual_seed(0))
    adam = torch.optim.Adam(model.parameters(), lr=4e-3)
    losses = []
    for step in range(300):
        # Falling to 0: at a high rate the last few updates alone would decide how good the samples are.
        adam.param_groups[0]["lr"] = 4e-3 * min(1.0, (300 - step) / 150)
        n = torch.arange(32 * step, 32 * (step + 1))
        x0, t, noise = blobs(n), timesteps(0, n, 1000), normal(0, Purpose.NOISE, n, (1, 8, 8))
        x_t = diffusion.q_sample(x0, t, noise)
        loss = l_simple(diffusion, model(x_t, t), x0, x_t, t, noise).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()
        adam.zero_grad()
        losses.append(float(loss.detach()))
    mean_of_30 = torch.tensor(losses).view(10, 30).mean(1)
    assert mean_of_30.tolist() == pytest.approx(golden("blobs-300-losses.txt"), abs=5e-3)

    x_T = normal(1, Purpose.SAMPLE_NOISE, torch.arange(256), (1, 8, 8))
    samples = final(ddim(diffusion, model.eval(), x_T, steps=25))
    data = blobs(torch.arange(2**20, 2**20 + 4096))
    assert all(near < bar for near, bar in zip(distances(samples, data), (0.15, 0.4), strict=True))
    assert all(far > 0.9 for far in distances(x_T, data)), "noise must be told from the data"


def distances(x: Tensor, data: Tensor) -> tuple[float, float]:
    """How far means and covariances lie apart, relative to the data's size and covariance."""
    x, data = x.flatten(1), data.flatten(1)
    mean = (x.mean(0) - data.mean(0)).square().mean().sqrt() / data.square().mean().sqrt()
    spread = torch.cov(data.T)
    return float(mean), float(torch.linalg.matrix_norm(torch.cov(x.T) - spread) / spread.norm())
