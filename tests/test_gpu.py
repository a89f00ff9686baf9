"""What a machine without GPUs cannot check; `tests/run.sh -m gpu tests/test_gpu.py`, see docs/training.md.

Every test fails where there is no GPU; they are left out unless asked for. Each recipe is trained in a
process of its own when the first test asks for it, so that one that fails takes no other test with it.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    HASTY,
    STAGES,
    assert_overflows_are_passed_over,
    assert_same_trajectory,
    case,
    loss_scale,
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
EXACT = ("train.compile=false", "train.deterministic=true", QUICK)
ONE_GPU: dict[str, dict[str, Any]] = {
    each["name"]: each
    for each in (
        *(case(name, *EXACT, f"precision={name}") for name in ("fp32", "tf32", "bf16", "fp16")),
        case("as-shipped", QUICK, "precision=bf16"),  # compiled
        case("compiled", QUICK, "precision=fp32", "train.compile=true"),
        case("accumulated", *EXACT, "precision=fp32", "batch.micro=2"),
        case("offloaded", *EXACT, "precision=fp32", "deepspeed.offload_optimizer=true"),
        case("fp16-overflow", *EXACT, "precision=fp16", loss_scale(24)),
        case("unwatched", *EXACT, "precision=bf16", never_waits=True),
    )
}
"""On one GPU nothing is partitioned."""
TWO_GPUS: dict[str, dict[str, Any]] = {
    each["name"]: each
    for each in (
        *(
            case(f"zero{stage}", *EXACT, "precision=fp32", f"deepspeed.zero_stage={stage}")
            for stage in STAGES
        ),
        case("gathers", *EXACT, "precision=fp32", "deepspeed.zero_stage=3", f"deepspeed.config={HASTY}"),
        case("zero1-bf16", *EXACT, "precision=bf16"),
        case("zero1-fp16", *EXACT, "precision=fp16"),
    )
}
Trained = Callable[[str], tuple[Run, dict[str, Any]]]
"""Gives a case's run and what rank 0 found in it."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    assert torch.cuda.is_available(), "these tests are about GPUs, and there is none"
    url = str(tmp_path_factory.mktemp("shards"))
    build(DigitsSource(), url)
    return url


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, shards: str) -> Trained:
    @functools.cache
    def one(name: str) -> tuple[Run, dict[str, Any]]:
        folder = tmp_path_factory.mktemp(name)
        world, listed = (1, ONE_GPU[name]) if name in ONE_GPU else (2, TWO_GPUS[name])
        assert torch.cuda.device_count() >= world, "needs two GPUs"
        found = train(folder, shards, world, [listed])[name]
        assert found["error"] is None
        return Run(str(folder / name)), found

    return one


@pytest.mark.parametrize(
    ("name", "distance"),
    [("tf32", 1e-2), ("bf16", 2e-2), ("fp16", 2e-2), ("as-shipped", 2e-2), ("compiled", 1e-3)],
)
def test_precisions_stay_near_float32(trained: Trained, name: str, distance: float) -> None:
    difference = relative_l2(*(weights(trained(which)[0], steps=FEW) for which in (name, "fp32")))
    assert 0 < difference <= distance


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("fp32", "float32"), ("bf16", "bfloat16"), ("fp16", "float16"), ("as-shipped", "bfloat16")],
)
def test_the_network_computes_in_the_recipes_precision(trained: Trained, name: str, dtype: str) -> None:
    assert trained(name)[1]["computed_in"] == [f"torch.{dtype}"]


@pytest.mark.parametrize("name", ["offloaded", "accumulated"])
def test_other_layouts_train_the_same(trained: Trained, name: str) -> None:
    assert_same_trajectory(trained(name)[0], trained("fp32")[0], FEW)


def test_fp16_overflows_are_skipped_and_recorded(trained: Trained) -> None:
    assert_overflows_are_passed_over(trained("fp16-overflow")[0])


def test_deterministic_kernels_resume_bit_for_bit(trained: Trained, tmp_path: Path, shards: str) -> None:
    whole = trained("fp32")[0]
    settings = ("train.compile=false", "train.deterministic=true", "precision=fp32")
    for images in (FEW * BATCH, 2 * FEW * BATCH):
        train(tmp_path, shards, 1, [case("resumed", *settings, f"train.images={images}")])
    resumed = Run(str(tmp_path / "resumed"))
    assert len(resumed.attempts()) == 2
    theirs = weights(whole, "state", 2 * FEW)
    assert all(torch.equal(value, theirs[key]) for key, value in weights(resumed, "state", 2 * FEW).items())


@pytest.mark.parametrize("name", [*(f"zero{stage}" for stage in STAGES), "gathers"])
def test_two_gpus_train_what_one_does(trained: Trained, name: str) -> None:
    assert_same_trajectory(trained(name)[0], trained("fp32")[0], FEW)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_two_gpus_train_what_one_does_nearly_in_low_precision(trained: Trained, precision: str) -> None:
    run, found = trained(f"zero1-{precision}")
    assert_same_trajectory(run, trained(precision)[0], FEW, distance=1e-2, loss=1e-2)
    assert found["reduced_in"] == [{"bf16": "torch.float32", "fp16": "torch.float16"}[precision]]


def test_the_forward_and_backward_pass_never_waits_for_the_gpu(trained: Trained) -> None:
    """In the real loop, DeepSpeed included. Only the guard's look at the loss may wait, which comes after."""
    assert trained("unwatched")[1]["watched"] > FEW, "what waits raises, from the third step on"


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
