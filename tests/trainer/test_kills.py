"""Training that is killed at random steps is the training that was not."""

import random
import signal
from pathlib import Path

import pytest
import torch

from tests.trainer.layout_support import BATCH, LAST, STAGES, WHOLE, Case, case, ids, losses, start, train
from trainer.parts import read_part
from trainer.run import Run

KINDS = [(stage, precision) for stage in STAGES for precision in ("fp32", "bf16")]


def kind_of(name: str, stage: int, precision: str) -> Case:
    return case(name, *WHOLE, f"deepspeed.zero_stage={stage}", f"precision={precision}")


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
