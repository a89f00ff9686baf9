"""What the supervisor concludes from what its ranks left, without starting any."""

from pathlib import Path

import pytest
import torch

from data_pipeline.errors import ExitCode, UserError
from tests.support import make_run, tiny_recipe
from trainer.preflight import check_inputs
from trainer.run import Run
from trainer.supervisor import Placement, _choose_port, _outcome, _visible_devices, supervise


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
    run.fail_attempt(1)
    end = run.ended()
    assert end is not None
    assert (end.outcome, end.images, end.checkpoint) == ("failed", 128, "0000000128-000001")
    run.fail_attempt(1)
    assert run.ended() == end


@pytest.mark.parametrize(
    ("given", "ranks", "devices"),
    [
        (None, 2, ["0", "1"]),
        ("4,5,6", 2, ["4", "5"]),
        ("GPU-8a1c,GPU-77f0", 2, ["GPU-8a1c", "GPU-77f0"]),
    ],
)
def test_ranks_get_the_devices_that_the_user_has_chosen(
    monkeypatch: pytest.MonkeyPatch, given: str | None, ranks: int, devices: list[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8 if given is None else given.count(",") + 1)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert _visible_devices(ranks) == devices


def test_without_a_device_none_is_shown_to_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert _visible_devices(2) == ["-1", "-1"]


@pytest.mark.parametrize(
    ("precision", "capability", "refused"),
    [("bf16", (7, 5), True), ("tf32", (7, 0), True), ("bf16", (8, 0), False), ("fp32", (7, 5), False)],
)
def test_what_a_gpu_would_only_emulate_is_refused(
    monkeypatch: pytest.MonkeyPatch, precision: str, capability: tuple[int, int], refused: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    run = Run("/no/such/run")
    # The data are looked at next.
    message = f"precision={precision}: Tesla T4" if refused else "/no/such/data/index.json"
    with pytest.raises(UserError, match=message):
        check_inputs(tiny_recipe(["data.url=/no/such/data", f"precision={precision}"]), run, 1)


def test_more_ranks_than_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="--ranks 4: a rank needs a GPU of its own, and this node has 2"):
        supervise("quickstart", ["run=/no/such", "data.url=/no/such"], Placement(ranks=4))


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
