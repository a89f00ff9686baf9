"""Training that goes on with other ranks at other stages is the training that did not."""

from pathlib import Path

from tests.trainer.layout_support import BATCH, LAST, WHOLE, case, ids, losses, train
from trainer.run import Run


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
