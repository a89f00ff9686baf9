"""What a machine without GPUs cannot check; `tests/run.sh -m gpu tests/test_gpu.py`, see docs/training.md.

Every test fails where there is no GPU; they are left out unless asked for.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline import ImageStream
from data_pipeline.build import build
from data_pipeline.device import DeviceStream
from data_pipeline.sources.digits import DigitsSource
from tests.support import tiny_recipe
from tests.trainer.layout_support import (
    BATCH,
    FEW,
    STAGES,
    assert_same_trajectory,
    case,
    relative_l2,
    train,
    weights,
)
from trainer.randomness import Purpose, bits, normal
from trainer.run import Run
from trainer.unet import UNet, compile_blocks

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)
QUICK = f"train.images={2 * FEW * BATCH}"
"""Long enough for a checkpoint to resume from."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    assert torch.cuda.is_available(), "these tests are about GPUs, and there is none"
    url = str(tmp_path_factory.mktemp("shards"))
    build(DigitsSource(), url)
    return url


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, shards: str) -> Path:
    """One GPU, on which nothing is partitioned: every precision, compiled and eager, offloaded."""
    folder = tmp_path_factory.mktemp("runs")
    eager = ("train.compile=false", "train.deterministic=true", QUICK)
    cases = [
        case("fp32", *eager, "precision=fp32"),
        *(case(name, *eager, f"precision={name}") for name in ("tf32", "bf16", "fp16")),
        case("compiled", QUICK, "precision=fp32", "train.compile=true"),
        case("offloaded", *eager, "precision=fp32", "deepspeed.offload_optimizer=true"),
        case(
            "fp16-overflow",
            *eager,
            "precision=fp16",
            "deepspeed.config={fp16: {initial_scale_power: 24, hysteresis: 1}}",
        ),
    ]
    found = train(folder, shards, 1, cases)
    (folder / "found.json").write_text(json.dumps(found))
    return folder


@pytest.mark.parametrize(
    ("name", "distance"), [("tf32", 1e-2), ("bf16", 2e-2), ("fp16", 2e-2), ("compiled", 1e-3)]
)
def test_precisions_stay_near_float32(runs: Path, name: str, distance: float) -> None:
    difference = relative_l2(*(weights(Run(str(runs / which)), steps=FEW) for which in (name, "fp32")))
    assert 0 < difference <= distance


def test_the_offloaded_optimizer_trains_the_same(runs: Path) -> None:
    assert_same_trajectory(Run(str(runs / "offloaded")), Run(str(runs / "fp32")), FEW)


def test_fp16_overflows_are_skipped_and_recorded(runs: Path) -> None:
    run = Run(str(runs / "fp16-overflow"))
    manifest = run.manifest(run.live_checkpoints()[-1])
    assert manifest.skips, "a loss scale of 2^24 must overflow"
    assert manifest.position - manifest.images == sum(stop - start for start, stop in manifest.skips)
    assert manifest.loss_scale is not None
    assert manifest.loss_scale["cur_scale"] < 2**24
    assert all(tensor.dtype == torch.float32 for tensor in weights(run, steps=2 * FEW).values())


def test_deterministic_kernels_resume_bit_for_bit(runs: Path, tmp_path: Path, shards: str) -> None:
    whole = Run(str(runs / "fp32"))
    settings = ("train.compile=false", "train.deterministic=true", "precision=fp32")
    for images in (FEW * BATCH, 2 * FEW * BATCH):
        train(tmp_path, shards, 1, [case("resumed", *settings, f"train.images={images}")])
    resumed = Run(str(tmp_path / "resumed"))
    assert len(resumed.attempts()) == 2
    theirs = weights(whole, "state", 2 * FEW)
    assert all(torch.equal(value, theirs[key]) for key, value in weights(resumed, "state", 2 * FEW).items())


def test_all_gpus_of_the_machine_train_what_one_does(runs: Path, tmp_path: Path, shards: str) -> None:
    count = torch.cuda.device_count()
    assert count >= 2, "needs two GPUs"
    settings = ("train.compile=false", "train.deterministic=true", "precision=fp32", QUICK)
    cases = [case(f"zero{stage}", *settings, f"deepspeed.zero_stage={stage}") for stage in STAGES]
    train(tmp_path, shards, 2, cases)
    for stage in STAGES:
        assert_same_trajectory(Run(str(tmp_path / f"zero{stage}")), Run(str(runs / "fp32")), FEW)


def test_the_generator_gives_the_cpus_numbers() -> None:
    n = torch.arange(64)
    words = [bits(7, Purpose.NOISE, n.to(device), 8).cpu() for device in ("cpu", GPU)]
    assert torch.equal(*words)
    noise = [normal(7, Purpose.NOISE, n.to(device), (3, 32, 32)).cpu() for device in ("cpu", GPU)]
    torch.testing.assert_close(*noise, rtol=1e-6, atol=1e-6)


def test_batches_are_copied_ahead_on_a_side_stream(shards: str) -> None:
    with (
        ImageStream(shards, seed=0, global_batch=32) as one,
        ImageStream(shards, seed=0, global_batch=32) as other,
    ):
        for _, device in zip(range(20), DeviceStream(one, GPU), strict=False):
            host = next(other)
            assert device.images.device == GPU
            assert np.array_equal(device.images.cpu().numpy(), host.images)
            assert np.array_equal(device.positions.cpu().numpy(), host.positions)


def test_a_forward_and_backward_pass_never_waits_for_the_gpu() -> None:
    """What waits for the device raises here: only the guard's look at the loss may, and it comes after."""
    recipe = tiny_recipe()
    model = UNet(recipe.unet_config()).to(GPU)
    diffusion = recipe.build_diffusion()
    x0, t = torch.zeros(4, 1, 8, 8, device=GPU), torch.arange(4, device=GPU)

    def step() -> None:
        noise = normal(0, Purpose.NOISE, t, (1, 8, 8))
        output = model(diffusion.q_sample(x0, t, noise), t)
        (output - noise).square().mean().backward()  # type: ignore[no-untyped-call]

    step()  # tables are made and kernels loaded
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_activations_are_channels_last() -> None:
    seen: list[bool] = []
    model = UNet(tiny_recipe().unet_config()).to(GPU)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(
                lambda _module, _inputs, output: seen.append(
                    output.is_contiguous(memory_format=torch.channels_last)
                )
            )
    model(torch.zeros(4, 1, 8, 8, device=GPU), torch.zeros(4, dtype=torch.int64, device=GPU))
    assert seen
    assert all(seen)
    assert all(parameter.is_contiguous() for parameter in model.parameters())


def test_compiled_blocks_compute_the_same() -> None:
    config = tiny_recipe().unet_config()
    model, compiled = (UNet(config, torch.Generator().manual_seed(0)).to(GPU).eval() for _ in range(2))
    compile_blocks(compiled)
    x, t = torch.randn(4, 1, 8, 8, device=GPU), torch.arange(4, device=GPU)
    torch.testing.assert_close(compiled(x, t), model(x, t), rtol=1e-4, atol=1e-4)
