"""The bytes said equal the bytes that real tensors take."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support import tiny_recipe
from tests.trainer.unet_support import SMALL, TINY, inputs, random_unet
from trainer import extensions
from trainer.activations import Activations, measure_activations, observe, walk_back
from trainer.collectives import bytes_sent
from trainer.ema import PartitionedEma
from trainer.memory import (
    RankMemory,
    largest_micro_batch,
    memory_by_stage,
    network_of,
    rank_memory,
)
from trainer.partition import of_whole_model
from trainer.recipe import Recipe, load_recipe
from trainer.recipe_sections import Precision
from trainer.unet import UNet, UNetConfig

DROPOUT = dataclasses.replace(SMALL, dropout=0.1)
RECOMPUTED = dataclasses.replace(SMALL, checkpoint_activations=True)
NONE = Activations(0, 0)
Case = tuple[list[str], int]
"""Overrides of a recipe, and micro-steps per update."""


def real(
    config: UNetConfig, precision: Precision, backward: Callable[..., object] | None = None
) -> Activations:
    """What a real network on this CPU holds for a batch of 4."""
    network = UNet(config)
    if backward is by_autograd:
        for parameter in network.parameters():
            parameter.register_post_accumulate_grad_hook(forget)  # type: ignore[no-untyped-call]
    return observe(network, *inputs(config), precision=precision, backward=backward)


def forget(parameter: Tensor) -> None:
    parameter.grad = None


def by_autograd(output: Tensor, gradient: Tensor) -> None:
    """PyTorch's own backward pass."""
    output.backward(gradient)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16])
@pytest.mark.parametrize("config", [TINY, SMALL, DROPOUT], ids=["tiny", "small", "dropout"])
def test_fake_tensors_hold_what_real_ones_do(config: UNetConfig, precision: Precision) -> None:
    fake, true = measure_activations(config, precision, 4, "cpu"), real(config, precision)
    # A CPU's group normalisation of bfloat16 has its means in float32; fake tensors expect bfloat16.
    slack = 0 if precision is Precision.FP32 else 0.005
    assert fake.kept == pytest.approx(true.kept, rel=slack)
    assert fake.peak == pytest.approx(true.peak, rel=slack)


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16])
def test_what_is_kept_is_what_is_saved_for_backward(precision: Precision) -> None:
    """Summed by hooks of our own, without a ledger: the storages beside the parameters' own and the input."""
    network, saved = UNet(DROPOUT), {}
    x, t = inputs(DROPOUT)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*network.parameters(), x, t)}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", precision.autocast, enabled=precision.autocast is not None):
            output = network(x, t)
        total = sum(size for place, size in saved.items() if place not in own)
    assert output.requires_grad
    assert total > 0
    slack = 0 if precision is Precision.FP32 else 0.005
    assert measure_activations(DROPOUT, precision, 4, "cpu").kept == pytest.approx(total, rel=slack)


def test_walking_back_finds_autograds_gradients() -> None:
    network = random_unet(SMALL, torch.float64).train()
    output = network(*inputs(SMALL, torch.float64))
    gradient = torch.randn(output.shape, dtype=torch.float64)
    parameters = list(network.parameters())
    expected = torch.autograd.grad(output, parameters, gradient, retain_graph=True)
    found = walk_back(output.grad_fn, gradient, parameters)
    for name, ours, theirs in zip(dict(network.named_parameters()), found, expected, strict=True):
        assert ours is not None, name
        torch.testing.assert_close(ours, theirs)
    assert float(expected[0].abs().max()) > 0


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16])
@pytest.mark.parametrize("config", [SMALL, DROPOUT, RECOMPUTED], ids=["small", "dropout", "recomputed"])
def test_the_peak_is_that_of_pytorchs_own_backward_pass(config: UNetConfig, precision: Precision) -> None:
    """And of its own checkpointing. Ours holds gradients longer where branches meet, and recomputing."""
    theirs = real(config, precision, by_autograd)
    ours = measure_activations(config, precision, 4, "cpu")
    assert theirs.peak > theirs.kept > 0
    assert 0.99 * theirs.peak <= ours.peak <= (1.15 if config is RECOMPUTED else 1.03) * theirs.peak


def test_every_further_image_keeps_the_same() -> None:
    for device in ("cpu", "cuda"):
        one, two, five = (
            measure_activations(DROPOUT, Precision.BF16, batch, device).kept for batch in (1, 2, 5)
        )
        assert five - two == 3 * (two - one) > 0


def test_recomputing_keeps_less() -> None:
    plain, recomputed = (measure_activations(config, Precision.BF16, 4) for config in (SMALL, RECOMPUTED))
    assert recomputed.kept < 0.5 * plain.kept
    assert recomputed.peak < plain.peak


def test_a_gpus_dropout_keeps_a_byte_for_each_number() -> None:
    numbers = 0

    def count(module: torch.nn.Module, _: object, output: Tensor) -> None:
        nonlocal numbers
        numbers += output.numel()

    network = UNet(SMALL)
    for level in [*network.down, *network.up]:
        for block in level.blocks:
            block.dropout.register_forward_hook(count)
    network.mid.block1.dropout.register_forward_hook(count)
    network.mid.block2.dropout.register_forward_hook(count)
    network(*inputs(SMALL))
    with_masks, without = (measure_activations(config, Precision.FP32, 4) for config in (DROPOUT, SMALL))
    assert with_masks.kept - without.kept == numbers


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16])
def test_a_gpus_attention_keeps_no_scores(precision: Precision) -> None:
    """For 4,096 pixels they would be at least 32 MiB an image."""
    config = dataclasses.replace(TINY, image_size=64, attention_resolutions=(64,))
    one, two = (measure_activations(config, precision, batch).kept for batch in (1, 2))
    assert two - one < 20 << 20 < measure_activations(config, precision, 1, "cpu").kept


def test_autocast_keeps_the_weights_in_half_precision_too() -> None:
    """They are what bf16 holds beyond images, beside fp16, whose parameters are halves already."""
    one, two = (measure_activations(SMALL, Precision.BF16, batch).kept for batch in (1, 2))
    half = 2 * sum(parameter.numel() for parameter in UNet(SMALL).parameters() if parameter.ndim > 1)
    assert 2 * one - two == pytest.approx(half, rel=0.02)
    assert measure_activations(SMALL, Precision.FP16, 1).kept < one


def test_measuring_leaves_torch_as_it_was() -> None:
    before = torch.get_rng_state()
    measure_activations(RECOMPUTED, Precision.FP16, 3)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_default_dtype() is torch.float32
    assert not torch.is_autocast_enabled("cuda")
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("ranks", [1, 3])
def test_state_takes_what_real_tensors_take(ranks: int) -> None:
    recipe = tiny_recipe(
        ["deepspeed.zero_stage=0", "ema.paper={decay: 0.9999, per_images: 128}", f"batch.total={ranks}"]
    )
    said = rank_memory(recipe, ranks, 1, NONE)
    averages = []
    for rank in range(ranks):
        network = UNet(recipe.unet_config())
        adam = torch.optim.Adam(network.parameters())
        network(torch.zeros(1, 1, 8, 8), torch.tensor([0])).sum().backward()
        masters = of_whole_model(network, adam, rank, ranks).masters
        adam.step()
        averages.append(
            size_of(flat for flats in PartitionedEma(recipe.ema, masters).flats.values() for flat in flats)
        )
        assert said.parameters == size_of(network.parameters())
        assert said.gradients == size_of([p.grad for p in network.parameters()])
        moments = [state[key] for state in adam.state.values() for key in ("exp_avg", "exp_avg_sq")]
        assert said.moments == size_of(moments)
    assert max(averages) == said.averages
    assert sum(averages) == 2 * said.parameters


def size_of(tensors: Any) -> int:
    """Each storage once: the gradients of query, key and value share one."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


@given(ranks=st.integers(1, 64), steps=st.integers(1, 3), precision=st.sampled_from(["fp32", "bf16", "fp16"]))
@settings(max_examples=30, deadline=None)
def test_the_more_is_partitioned_the_less_a_rank_holds(ranks: int, steps: int, precision: str) -> None:
    recipe = load_recipe("quickstart", [f"precision={precision}"])
    network = network_of(recipe.unet_config(), recipe.precision)
    rows = {(row.zero_stage, row.offload_optimizer): row for row in memory_by_stage(recipe, ranks, steps, 1)}
    assert set(rows) == {
        (stage, offload)
        for stage in range(4)
        for offload in (False, True)
        if not (stage == 0 and (offload or precision == "fp16"))
    }
    for (stage, offload), row in rows.items():
        assert row.host == 0 or offload
        state = row.masters + row.moments + row.averages
        if offload:
            assert state == 0 < row.host
        elif stage:
            # A master, two moments and an average for every number, divided among the ranks.
            assert (
                16 * network.numel <= ranks * state <= 16 * (network.numel + 2 * ranks * len(network.sizes))
            )
    at = {stage: rows[stage, False] for stage in (1, 2, 3)}
    assert at[2].gradients <= 2 * at[1].gradients
    assert at[3].gradients <= at[1].gradients


def test_the_largest_micro_batch_fits_and_one_more_does_not() -> None:
    recipe = load_recipe("quickstart")
    memory = rank_memory(recipe, 4, 1, NONE)
    room = 1 << 30

    def held(batch: int) -> int:
        return rank_memory(
            recipe, 4, 1, measure_activations(recipe.unet_config(), recipe.precision, batch)
        ).device

    most = largest_micro_batch(recipe, memory, room)
    assert most > 100
    assert held(most) <= room < held(most + 2)
    assert largest_micro_batch(recipe, memory, memory.fixed) == 0


STAGES = [(stage, offload) for offload in (False, True) for stage in range(4) if stage or not offload]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_deepspeed_holds_and_sends_what_is_said(ranks: int) -> None:
    """Real engines on this CPU, every stage, with and without accumulation, three updates each."""
    layouts = [
        [f"deepspeed.zero_stage={stage}", f"deepspeed.offload_optimizer={str(offload).lower()}"]
        for stage, offload in STAGES
    ]
    # Buckets smaller than the network; parameters gathered for a whole step, and for no longer than needed.
    zero = "reduce_bucket_size: 100000, param_persistence_threshold: 0"
    hasty = f"{zero}, max_reuse_distance: 0, prefetch_bucket_size: 1000"
    for stage, more in ((1, zero), (2, zero), (3, zero), (3, hasty)):
        config = f"deepspeed.config={{zero_optimization: {{{more}}}}}"
        layouts.append([f"deepspeed.zero_stage={stage}", config])
    cases: list[Case] = [(layout, micro_steps) for layout in layouts for micro_steps in (1, 2)]
    for case, (peak, sent) in zip(cases, run_engines(ranks, cases), strict=True):
        overrides, micro_steps = case
        recipe = load_recipe("quickstart", overrides)
        assert 0.99 * peak <= total(recipe, ranks, micro_steps) <= 1.3 * peak, case
        said = bytes_sent(recipe, ranks, micro_steps)
        # What is let go in haste may still be there for the backward pass.
        assert 0.99 * sent <= said <= (1.3 if "max_reuse_distance" in overrides[1] else 1.01) * sent, case


def total(recipe: Recipe, ranks: int, micro_steps: int) -> int:
    activations = measure_activations(recipe.unet_config(), recipe.precision, 4, "cpu")
    row: RankMemory = rank_memory(recipe, ranks, micro_steps, activations, on_gpu=False)
    whole = network_of(recipe.unet_config(), recipe.precision).numel * 4
    # gloo copies what it reduces and scatters, which NCCL does not.
    return row.device + row.host + (whole if recipe.deepspeed.zero_stage == 3 else 0)


def run_engines(ranks: int, cases: list[Case]) -> list[tuple[int, float]]:
    """Run `memory_program` on so many ranks; return the bytes that rank 0 held and sent in each case."""
    extensions.prepare()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "DS_ACCELERATOR": "cpu",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.trainer.memory_program", json.dumps(cases)],
            env={
                **os.environ,
                **extensions.environment(),
                **common,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        logs = [process.communicate(timeout=250)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * ranks, logs[0][-3000:]
    return json.loads(logs[0].splitlines()[-1])  # type: ignore[no-any-return]
