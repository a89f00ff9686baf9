"""DeepSpeed's configuration: ours, the user's merged in, contradictions named."""

import pytest

from data_pipeline.errors import UserError
from tests.support import tiny_recipe
from trainer.deepspeed_config import LARGEST_BUCKET, build_config

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
    assert zero["reduce_bucket_size"] == LARGEST_BUCKET


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
