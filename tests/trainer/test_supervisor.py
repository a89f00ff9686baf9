"""What the supervisor concludes from what its ranks left, without starting any."""

from pathlib import Path

import pytest

from data_pipeline.errors import ExitCode, UserError
from tests.support import make_run
from trainer.supervisor import Placement, _choose_port, _outcome, _record_failure


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ({}, ExitCode.FAILED),
        ({0: 0, 1: 0}, ExitCode.FINISHED),
        ({0: 75, 1: 75}, ExitCode.REQUEUE),
        ({1: 0}, ExitCode.FAILED),
        ({1: 2}, ExitCode.USER_MISTAKE),
        ({0: 1, 1: 2}, ExitCode.USER_MISTAKE),
    ],
)
def test_the_ranks_own_word_counts(tmp_path: Path, said: dict[int, int], code: ExitCode) -> None:
    for rank, value in said.items():
        (tmp_path / f"outcome-{rank}").write_text(str(value))
    assert _outcome(tmp_path) is code


def test_giving_up_is_recorded_once(tmp_path: Path) -> None:
    run = make_run(str(tmp_path), images_list=(64, 128))
    _record_failure(run)
    end = run.ended()
    assert end is not None
    assert (end.outcome, end.images, end.checkpoint) == ("failed", 128, "0000000128-000001")
    _record_failure(run)
    assert run.ended() == end


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        (Placement(num_nodes=2, node_rank=2, master_port=29500), "--node_rank 2"),
        (Placement(num_nodes=2), "--master_port"),
    ],
)
def test_impossible_placements(placement: Placement, message: str) -> None:
    with pytest.raises(UserError, match=message):
        _choose_port(placement)
