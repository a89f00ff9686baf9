"""Training that is killed at random steps, or goes on with other ranks, is the training that was not."""

import json
import random
import signal
from pathlib import Path

import pytest
import torch

from tests.support import metric_rows
from tests.trainer.layout_support import BATCH, STAGES, Case, case, start, train
from trainer.parts import read_part
from trainer.run import Run

LAST = 12
"""Steps of a training, with a checkpoint after every second one."""
KINDS = [(stage, precision) for stage in STAGES for precision in ("fp32", "bf16")]
WHOLE = (f"train.images={LAST * BATCH}", f"checkpoint.every_images={2 * BATCH}", "model.dropout=0.1")


def kind_of(name: str, stage: int, precision: str) -> Case:
    return case(name, *WHOLE, f"deepspeed.zero_stage={stage}", f"precision={precision}")


def ids(run: Run) -> dict[int, list[int]]:
    """The samples of each update of the run's lineage, by the images before it, over all ranks."""
    found: dict[int, dict[int, list[int]]] = {}
    for file in sorted(Path(run.url).parent.glob(f"{Path(run.url).name}.ids-*")):
        for line in file.read_text().splitlines():
            row = json.loads(line)
            found.setdefault(row["images"], {}).setdefault(row["attempt"], []).extend(row["ids"])
    limits = run.lineage()
    live = {images: max(a for a in by if _is_live(images, limits.get(a, -1))) for images, by in found.items()}
    return {images: sorted(found[images][attempt]) for images, attempt in live.items()}


def _is_live(images: int, limit: int | None) -> bool:
    return limit is None or images < limit


def losses(run: Run) -> dict[int, float]:
    """The loss of each update of the run's lineage, by the images after it."""
    found = {}
    for attempt, limit in sorted(run.lineage().items()):
        rows = {row["images"]: row["loss"] for row in metric_rows(run, [attempt])}
        found |= {images: loss for images, loss in rows.items() if limit is None or images <= limit}
    return found


def in_hex(values: dict[int, float]) -> dict[int, str]:
    return {images: value.hex() for images, value in values.items()}


def assert_bit_equal(run: Run, whole: Run) -> None:
    """Weights, averages, moments, losses of all steps and their samples."""
    manifests = [each.manifest(each.live_checkpoints()[-1]) for each in (run, whole)]
    assert [manifest.images for manifest in manifests] == [LAST * BATCH] * 2
    mine, theirs = (
        {(entry.path, key): value for entry in m.files for key, value in read_part(r, m, entry).items()}
        for r, m in zip((run, whole), manifests, strict=True)
    )
    roles = {key.partition("/")[0] for path, key in theirs if path.startswith("state/rank")}
    assert roles == {"master", "exp_avg", "exp_avg_sq", "ema.paper", "ema.main"}
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], value) for key, value in theirs.items())
    assert in_hex(losses(run)) == in_hex(losses(whole))
    assert len(losses(whole)) == LAST
    assert ids(run) == ids(whole)
    assert len(ids(whole)) == LAST


@pytest.mark.parametrize("trials", [1, pytest.param(50, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_killed_at_a_random_step_and_resumed(tmp_path: Path, shards: str, trials: int) -> None:
    """Two ranks; one of them is killed, up to a tenth of a second after a step has begun."""
    rng = random.Random(trials)
    kinds = KINDS[-1:] if trials == 1 else KINDS
    # The third checkpoint waits until the first one is published: from then on there is one to resume from.
    earliest = 6 if trials == 1 else 0
    train(tmp_path, shards, 2, [kind_of(f"zero{stage}-{p}", stage, p) for stage, p in kinds])
    before: list[Case] = []
    resumed = 0
    for trial in range(trials):
        stage, precision = kinds[trial % len(kinds)]
        moment = {
            "images": rng.randrange(earliest, LAST) * BATCH,
            "rank": rng.randrange(2),
            "seconds": rng.uniform(0, 0.1),
        }
        this = kind_of(f"trial{trial}", stage, precision)
        processes = start(tmp_path, shards, 2, [*before, {**this, "kill": moment}])
        victim = processes[int(moment["rank"])]
        victim.communicate(timeout=250)
        for process in processes:
            process.kill()
            process.communicate()
        assert victim.returncode == -signal.SIGKILL, "the rank was to be killed"
        before = [this]
    train(tmp_path, shards, 2, before)
    for trial in range(trials):
        stage, precision = kinds[trial % len(kinds)]
        run = Run(str(tmp_path / f"trial{trial}"))
        assert len(run.attempts()) == 2, "the kill must have cost an attempt"
        resumed += run.attempts()[1].parent is not None
        assert_bit_equal(run, Run(str(tmp_path / f"zero{stage}-{precision}")))
    print(f"{trials} kills, {resumed} of them resumed from a checkpoint")
    assert resumed >= trials / 3


def test_two_one_three_and_two_ranks_at_changing_stages_are_one_training(tmp_path: Path, shards: str) -> None:
    without = "model.dropout=0"  # whose masks are drawn by rank
    train(tmp_path, shards, 2, [case("whole", *WHOLE, without)])
    for world, stage, steps in ((2, 1, 2), (1, 1, 4), (3, 3, 8), (2, 1, LAST)):
        images = f"train.images={steps * BATCH}"
        train(
            tmp_path, shards, world, [case("moved", *WHOLE, without, f"deepspeed.zero_stage={stage}", images)]
        )
    moved, whole = Run(str(tmp_path / "moved")), Run(str(tmp_path / "whole"))
    layouts = [moved.manifest(name).topology for name in moved.live_checkpoints()]
    expected = [(2, 1), (1, 0), (3, 3), (3, 3), (2, 1), (2, 1)]
    assert [(each.world, each.zero_stage) for each in layouts] == expected
    assert ids(moved) == ids(whole)
    mine, theirs = losses(moved), losses(whole)
    assert len(mine) == len(theirs) == LAST
    assert max(abs(mine[images] / loss - 1) for images, loss in theirs.items()) <= 1e-4
