"""DeepSpeed's configuration: ours, the user's merged in, contradictions named."""

import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.errors import UserError
from tests.support import tiny_recipe
from trainer.deepspeed_check import check_config
from trainer.deepspeed_config import LARGEST_BUCKET, LARGEST_REDUCED, build_config

MIB = 2**20


def built(
    *overrides: str, micro_steps: int = 1, parameters: int = MIB, on_gpu: bool = False
) -> dict[str, object]:
    return build_config(tiny_recipe(overrides), micro_steps, parameters, on_gpu=on_gpu)


def test_the_recipe_decides() -> None:
    config = built("optimizer.clip_norm=0.5", "deepspeed.zero_stage=2", micro_steps=3)
    assert config["gradient_clipping"] == 0.5
    assert config["gradient_accumulation_steps"] == 3
    assert "fp16" not in config
    assert "bf16" not in config, "autocast is ours"
    zero = config["zero_optimization"]
    assert isinstance(zero, dict)
    assert zero["stage"] == 2
    assert zero["reduce_bucket_size"] == MIB, "no larger than the network"


def test_communication_overlaps_on_gpus() -> None:
    for stage, overlap in ((0, False), (1, True), (3, True)):
        zero = built(f"deepspeed.zero_stage={stage}", on_gpu=True)["zero_optimization"]
        assert isinstance(zero, dict)
        assert zero["overlap_comm"] is overlap
    zero = built(parameters=10**9)["zero_optimization"]
    assert isinstance(zero, dict)
    assert zero["reduce_bucket_size"] == LARGEST_REDUCED
    assert zero["allgather_bucket_size"] == LARGEST_BUCKET


def test_nothing_is_timed_at_the_cost_of_waiting_for_the_device() -> None:
    assert built()["timers"] == {"throughput": {"enabled": False}}


def test_both_of_deepspeeds_names_may_be_given() -> None:
    for name in ("prefetch_bucket_size", "stage3_prefetch_bucket_size"):
        raw = f"{{zero_optimization: {{{name}: 5000}}}}"
        recipe = tiny_recipe(["deepspeed.zero_stage=3", f"deepspeed.config={raw}"])
        check_config(recipe)
        zero = build_config(recipe, 1, MIB, on_gpu=False)["zero_optimization"]
        assert [zero[key] for key in zero if key.endswith("prefetch_bucket_size")] == [5000]


def test_at_stage_0_we_clip_ourselves() -> None:
    assert built("deepspeed.zero_stage=0")["gradient_clipping"] == 0.0


def test_raw_keys_are_merged_into_ours() -> None:
    raw = "{wall_clock_breakdown: true, zero_optimization: {reduce_bucket_size: 5000}}"
    config = built(f"deepspeed.config={raw}")
    assert config["wall_clock_breakdown"] is True
    zero = config["zero_optimization"]
    assert isinstance(zero, dict)
    assert zero["reduce_bucket_size"] == 5000
    assert zero["stage"] == 1


def test_deepspeed_says_nothing_on_stdout_when_it_is_asked() -> None:
    program = """
from tests.support import tiny_recipe
from trainer.deepspeed_check import check_config
check_config(tiny_recipe(["deepspeed.config={zero_optimization: {overlap_comm: true}}"]))
import sys
assert "deepspeed" in sys.modules
"""
    asked = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert (asked.returncode, asked.stdout) == (0, ""), asked.stderr


@pytest.mark.parametrize(
    ("raw", "key", "remedy"),
    [
        ("{train_batch_size: 64}", "deepspeed.config.train_batch_size", "batch.total"),
        ("{gradient_clipping: 1.0}", "deepspeed.config.gradient_clipping", "optimizer.clip_norm"),
        ("{bf16: {enabled: true}}", "deepspeed.config.bf16", "precision"),
        ("{fp16: {enabled: true}}", "deepspeed.config.fp16.enabled", "precision"),
        (
            "{zero_optimization: {stage: 3}}",
            "deepspeed.config.zero_optimization.stage",
            "deepspeed.zero_stage",
        ),
        ("{communication_data_type: bf16}", "deepspeed.config.communication_data_type", "float32"),
        (
            "{zero_optimization: {offload_optimizer: {device: nvme}}}",
            "deepspeed.config.zero_optimization.offload_optimizer.device",
            "deepspeed.offload_optimizer",
        ),
        ("{fp16: {loss_scale: 1024}}", "deepspeed.config.fp16.loss_scale", "dynamic"),
        (
            "{fp16: {fp16_master_weights_and_grads: true}}",
            "deepspeed.config.fp16.fp16_master_weights_and_grads",
            "float32",
        ),
        ("{fp16: {loss_scale_window: 5}}", "deepspeed.config.fp16", "precision=fp16"),
        ("{fp16: true}", "deepspeed.config.fp16", "{KEY: VALUE}"),
        ("{zero_optimization: 3}", "deepspeed.config.zero_optimization", "{KEY: VALUE}"),
        (
            "{zero_optimization: {reduce_bucket_size: auto}}",
            "deepspeed.config.zero_optimization.reduce_bucket_size",
            "leave the key out",
        ),
        (
            "{zero_optimization: {cpu_offload_param: true}}",
            "deepspeed.config.zero_optimization.cpu_offload_param",
            "zero_stage=3",
        ),
        (
            "{wall_clock_breakdwn: true}",
            "deepspeed.config.wall_clock_breakdwn",
            "nearest: wall_clock_breakdown",
        ),
    ],
)
def test_contradictions_and_unknown_keys_are_refused_by_name(raw: str, key: str, remedy: str) -> None:
    with pytest.raises(UserError) as caught:
        tiny_recipe([f"deepspeed.config={raw}"])
    assert key in str(caught.value)
    assert remedy in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["deepspeed.zero_stage=0", "deepspeed.offload_optimizer=true"], "deepspeed.offload_optimizer"),
        (["train.compile=true", "deepspeed.zero_stage=3"], "train.compile=true"),
        (["precision=fp64"], "deepspeed.zero_stage=0"),
        (["precision=fp16", "deepspeed.zero_stage=0"], "precision=fp16"),
        (["deepspeed.zero_stage=4"], "deepspeed.zero_stage"),
        (["precision=fp8"], "precision"),
    ],
)
def test_impossible_combinations_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        tiny_recipe(overrides)
    assert message in str(caught.value)
