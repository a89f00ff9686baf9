"""One trajectory on any layout: ZeRO stages, precisions, ranks, accumulation; guards that all ranks share."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import metric_rows
from tests.trainer.layout_support import (
    BATCH,
    FEW,
    HASTY,
    STAGES,
    STEPS,
    assert_overflows_are_passed_over,
    assert_same_trajectory,
    case,
    loss_scale,
    relative_l2,
    train,
    weights,
)
from trainer.run import Run

POISONED = {
    "nan": {"positions": [6 * BATCH + 2, 6 * BATCH + 3], "factor": float("nan")},
    "spike": {"positions": [9 * BATCH, 10 * BATCH], "factor": 1e4},
    "rolled-back": {"positions": [8 * BATCH, 11 * BATCH], "factor": float("nan")},
    "diverged": {"positions": [7 * BATCH, 10**9], "factor": float("nan")},
    "fp16-harm": {"positions": [8 * BATCH, 12 * BATCH], "factor": 1e30},
}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory, shards: str) -> Path:
    """Every ZeRO stage in float32 and bf16 on two ranks, and more that needs two."""
    folder = tmp_path_factory.mktemp("two")
    few, more = f"train.images={FEW * BATCH}", f"train.images={2 * FEW * BATCH}"
    cases = [case(f"zero{stage}-fp32", f"deepspeed.zero_stage={stage}", reference=True) for stage in STAGES]
    cases += [
        case(f"zero{stage}-bf16", f"deepspeed.zero_stage={stage}", "precision=bf16", few) for stage in STAGES
    ]
    cases += [
        case(f"offload{stage}", f"deepspeed.zero_stage={stage}", "deepspeed.offload_optimizer=true", few)
        for stage in (1, 2, 3)
    ]
    cases += [
        case(name, "deepspeed.zero_stage=3", f"deepspeed.config={HASTY}", few, *also)
        for name, also in (("gathers", ()), ("recomputes", ("model.checkpoint_activations=true",)))
    ]
    cases += [
        case("accumulated", "batch.micro=2", few),
        case("fp64", "precision=fp64", "deepspeed.zero_stage=0"),
        case("nan", more, "deepspeed.zero_stage=3", poison=POISONED["nan"]),
        case("spike", more, "guard.warmup_updates=5", poison=POISONED["spike"]),
        case("rolled-back", more, "guard.skips=2", poison=POISONED["rolled-back"]),
        case("fp16", more, "precision=fp16", loss_scale(24)),
        case(
            "fp16-harm",
            more,
            "precision=fp16",
            loss_scale(2),
            "guard.skips=2",
            poison=POISONED["fp16-harm"],
        ),
        case("diverged", "guard.skips=1", "guard.rollbacks=2", poison=POISONED["diverged"]),
    ]
    found = train(folder, shards, 2, cases)
    (folder / "found.json").write_text(json.dumps(found))
    return folder


@pytest.fixture
def found(two_ranks: Path) -> dict[str, dict[str, Any]]:
    """What rank 0 of two found, by case."""
    content: dict[str, dict[str, Any]] = json.loads((two_ranks / "found.json").read_text())
    return content


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory, shards: str) -> Path:
    folder = tmp_path_factory.mktemp("one")
    cases = [
        case("fp32", "deepspeed.zero_stage=0"),
        case("bf16", "deepspeed.zero_stage=0", "precision=bf16", f"train.images={FEW * BATCH}"),
        case("fp64", "precision=fp64", "deepspeed.zero_stage=0"),
    ]
    train(folder, shards, 1, cases)
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_every_zero_stage_on_two_ranks_trains_what_one_rank_does(
    one_rank: Path, two_ranks: Path, stage: int
) -> None:
    run = Run(str(two_ranks / f"zero{stage}-fp32"))
    assert run.manifest(run.live_checkpoints()[-1]).topology.zero_stage == stage
    assert_same_trajectory(run, Run(str(one_rank / "fp32")))


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_is_the_same_at_every_zero_stage(one_rank: Path, two_ranks: Path, stage: int) -> None:
    run, first = (Run(str(two_ranks / f"zero{number}-bf16")) for number in (stage, 0))
    # Weights that differ in their last bit may be rounded to different numbers of 8 bits.
    assert_same_trajectory(run, first, FEW, distance=2e-3, loss=2e-3)
    # And one rank computes batches of 8, two of 4: products in bf16 are rounded by the shape they have.
    assert_same_trajectory(run, Run(str(one_rank / "bf16")), FEW, distance=1e-2, loss=1e-2)


@pytest.mark.parametrize("stage", STAGES)
def test_under_bf16_gradients_are_reduced_in_float32(found: dict[str, dict[str, Any]], stage: int) -> None:
    assert found[f"zero{stage}-bf16"]["reduced_in"] == ["torch.float32"]
    assert found[f"zero{stage}-bf16"]["computed_in"] == ["torch.bfloat16"]
    assert found[f"zero{stage}-fp32"]["computed_in"] == ["torch.float32"]


def test_bf16_is_not_float32(one_rank: Path) -> None:
    runs = [Run(str(one_rank / precision)) for precision in ("bf16", "fp32")]
    assert relative_l2(*(weights(run, steps=FEW) for run in runs)) > 1e-4


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_offloaded_optimizer_trains_the_same(one_rank: Path, two_ranks: Path, stage: int) -> None:
    assert_same_trajectory(Run(str(two_ranks / f"offload{stage}")), Run(str(one_rank / "fp32")), FEW)


@pytest.mark.parametrize("name", ["gathers", "recomputes"])
def test_parameters_that_are_gathered_for_their_use_train_the_same(
    one_rank: Path, two_ranks: Path, name: str
) -> None:
    assert_same_trajectory(Run(str(two_ranks / name)), Run(str(one_rank / "fp32")), FEW)


def test_accumulation_trains_the_same(one_rank: Path, two_ranks: Path) -> None:
    assert_same_trajectory(Run(str(two_ranks / "accumulated")), Run(str(one_rank / "fp32")), FEW)


def test_in_float64_only_the_order_of_sums_differs(one_rank: Path, two_ranks: Path) -> None:
    assert_same_trajectory(Run(str(two_ranks / "fp64")), Run(str(one_rank / "fp64")), STEPS, 1e-10, 1e-10)


@pytest.mark.parametrize("stage", STAGES)
def test_averages_equal_unpartitioned_ones(found: dict[str, dict[str, Any]], stage: int) -> None:
    assert found[f"zero{stage}-fp32"]["ema_difference"] <= 1e-6


def test_three_ranks_with_an_uneven_batch(tmp_path: Path, one_rank: Path, shards: str) -> None:
    few = f"train.images={FEW * BATCH}"
    cases = [case("zero1"), case("zero3", "deepspeed.zero_stage=3", "batch.micro=1", few)]
    train(tmp_path, shards, 3, cases)
    whole = Run(str(one_rank / "fp32"))
    assert_same_trajectory(Run(str(tmp_path / "zero1")), whole)
    assert_same_trajectory(Run(str(tmp_path / "zero3")), whole, FEW)


@pytest.mark.parametrize(("name", "dropped"), [("nan", 6), ("spike", 9)])
def test_harmful_updates_are_dropped_and_recorded(
    found: dict[str, dict[str, Any]], two_ranks: Path, name: str, dropped: int
) -> None:
    """NaN in one loss of update 6 or a spike in update 9, on two ranks: dropped, and all else applied."""
    assert found[name]["injected"] > 0, "the fault must have happened"
    assert found[name]["error"] is None
    run = Run(str(two_ranks / name))
    manifest = run.manifest(run.live_checkpoints()[-1])
    assert manifest.skips == [(dropped * BATCH, (dropped + 1) * BATCH)]
    assert (manifest.images, manifest.position) == (2 * FEW * BATCH, (2 * FEW + 1) * BATCH)
    assert all(torch.isfinite(value).all() for value in weights(run, steps=2 * FEW).values())


def test_beyond_the_budget_the_run_goes_back_and_passes_over(
    found: dict[str, dict[str, Any]], two_ranks: Path
) -> None:
    """Updates 8 to 10 are poisoned: the third drop rolls back to the checkpoint at 6, past all of them."""
    assert found["rolled-back"]["injected"] >= 3, "the fault must have happened"
    assert found["rolled-back"]["error"] is None
    run = Run(str(two_ranks / "rolled-back"))
    first, second = run.attempts()
    assert second.parent == f"{FEW * BATCH:010d}-000001"
    assert (first.rollbacks, second.rollbacks, second.position) == (0, 1, 11 * BATCH)
    manifest = run.manifest(run.live_checkpoints()[-1])
    assert manifest.attempt == 2
    assert manifest.skips == [(FEW * BATCH, 11 * BATCH)]
    assert (manifest.images, manifest.position) == (2 * FEW * BATCH, (FEW + 11) * BATCH)
    assert [row["images"] for row in metric_rows(run, [1])] == [BATCH * n for n in range(1, 9)], (
        "what led to the rollback stays readable"
    )
    assert found["rolled-back"]["networks_met"] == [0, 0], "memory would have to hold both attempts' states"


def test_fp16_passes_over_what_its_loss_scale_is_too_large_for(two_ranks: Path) -> None:
    assert_overflows_are_passed_over(Run(str(two_ranks / "fp16")))


def test_what_overflows_at_the_least_loss_scale_is_harm(
    found: dict[str, dict[str, Any]], two_ranks: Path
) -> None:
    """From update 8 on gradients are beyond float16: the scale falls from 4 to 1, then the guard counts."""
    assert found["fp16-harm"]["injected"] >= 4, "the fault must have happened"
    assert found["fp16-harm"]["error"] is None
    run = Run(str(two_ranks / "fp16-harm"))
    assert [attempt.rollbacks for attempt in run.attempts()] == [0, 1]
    manifest = run.manifest(run.live_checkpoints()[-1])
    assert manifest.skips == [(FEW * BATCH, 12 * BATCH)]
    assert all(torch.isfinite(value).all() for value in weights(run, steps=2 * FEW).values())


def test_when_going_back_does_not_help_training_ends_with_one_line(
    found: dict[str, dict[str, Any]], two_ranks: Path
) -> None:
    assert found["diverged"]["injected"] > 0, "the fault must have happened"
    error = found["diverged"]["error"]
    assert error.startswith("DivergedError: training diverged: 2 of the last 100 updates were dropped")
    assert "optimizer.learning_rate" in error
    assert "\n" not in error
    run = Run(str(two_ranks / "diverged"))
    assert [attempt.rollbacks for attempt in run.attempts()] == [0, 1, 2]
    end = run.ended()
    assert end is not None
    assert end.outcome == "failed"
