"""`python -m benchmarks.checkpoint` end to end with a small network, and its parts."""

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.checkpoint import command
from benchmarks.checkpoint.bars import read_bar, stall_bars, stall_remarks, stall_rows, torn_bar
from benchmarks.checkpoint.command import CheckpointResult, main, read
from benchmarks.checkpoint.crew import Crew
from benchmarks.checkpoint.reading import Layout, Read, Transition, Written, check, counted
from benchmarks.checkpoint.saves import SIDES, Diary, run_of
from benchmarks.checkpoint.stall import Episode, Stall, compare_state, compare_weights
from benchmarks.checkpoint.torn import Trial, our_damage, summary
from benchmarks.checkpoint.training import Job
from benchmarks.harness import OURS, Load, Samples
from benchmarks.network import CIFAR10
from benchmarks.peers.deepspeed_checkpoint import Held, damage, size
from benchmarks.report import most_bar
from data_pipeline.storage import Storage
from tests.support import tiny_recipe
from tests.trainer.checkpoint_support import State, draft
from tests.trainer.thread_ranks import alone
from trainer.partition import Partition, Piece
from trainer.run import Run
from trainer.saving import Job as WriterJob
from trainer.telemetry import MetricsLog

DEEPSPEED = SIDES[1]


@pytest.mark.slow
def test_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "checkpoint.json"
    arguments = ["--small", "--repeats", "2", "--kills", "2", "--folder", str(tmp_path), "--json", str(file)]
    result = main(arguments)
    assert CheckpointResult.from_json(file.read_bytes(), file.name) == result
    content = json.loads(file.read_bytes())
    assert content["schema"] == "checkpoint-benchmark/1"
    assert [(each["writer"]["stage"], each["reader"]["ranks"]) for each in content["transitions"]] == [
        (1, 3),
        (3, 3),
        (1, 3),
        (3, 3),
        (1, 1),
        (3, 1),
    ]
    for each in content["transitions"]:
        assert sum(each["read"]) >= each["part_bytes"], "every byte is verified by somebody"
    assert [each["side"] for each in content["trials"]] == [*SIDES, *SIDES]
    assert [each["torn"] for each in content["trials"] if each["side"] == OURS] == [None, None]
    assert content["trials"][0]["share"] == content["trials"][1]["share"], "one killer"
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("torn: DeepSpeed ") for line in lines)
    assert [line.split()[1:2] + line.split()[3:4] for line in lines[-4:]] == [
        ["small-checkpoint-stall", "0.2"],
        ["small-checkpoint-cost", "0.5"],
        ["small-checkpoint-read-share", "1.1"],
        ["small-checkpoint-torn", "0"],
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.json"], "all else is removed again"


def test_both_save_the_same_and_are_timed(tmp_path: Path) -> None:
    with Crew(Job(small=True), 1, 1, tmp_path) as crew:
        (answer,) = crew.ask("stall", folder=str(tmp_path), repeats=2)
    stall = Stall.model_validate(answer)
    assert stall.compared == 5 * stall.parameters, "masters, moments, the average, and the weights"
    assert [len(turn) for turn in stall.undisturbed] == [10, 10]
    assert [len(each) for each in (stall.ours, stall.deepspeed.wall, stall.deepspeed.cpu)] == [2, 2, 2]
    for episode in stall.ours:
        assert len(episode.steps) > 3
        assert 0 < episode.stall < episode.published
        assert episode.cpu > 0
    assert stall.our_bytes > 6 * 4 * stall.parameters, "weights and average are there as whole tensors, too"
    assert stall.deepspeed_bytes > 5 * 4 * stall.parameters
    assert not list(tmp_path.rglob("*.safetensors")), "old checkpoints are removed"
    assert not list(tmp_path.rglob("*.pt"))


def test_the_recipe_is_the_one_that_is_measured() -> None:
    recipe = Job(small=False).recipe(3)
    assert (recipe.precision, recipe.batch.total, list(recipe.ema)) == ("bf16", 8, ["paper"])
    assert recipe.deepspeed.zero_stage == 3
    assert recipe.unet_config().widths == CIFAR10.widths


def partition() -> SimpleNamespace:
    """A training as far as a comparison looks at it: two parameters in one span."""
    pieces = [Piece("a", 0, 3, 0, 0), Piece("b", 1, 5, 0, 3)]
    return SimpleNamespace(engine=SimpleNamespace(partition=Partition([], {}, pieces)))


def ours() -> dict[str, Tensor]:
    return {
        f"{role}/{name}": torch.arange(first, last).float() * factor
        for factor, role in ((1, "master"), (2, "ema.paper"))
        for name, first, last in (("a:0:3", 0, 3), ("b:1:5", 3, 7))
    }


def theirs(**changes: Tensor) -> Held:
    flat = torch.arange(8.0)  # the last one is padding
    roles: Mapping[str, Tensor] = {"master": flat, "ema.paper": 2 * flat, **changes}
    return Held({"a": flat}, {role: [each] for role, each in roles.items()})


def test_different_state_is_refused() -> None:
    training: Any = partition()
    assert compare_state(training, ours(), theirs()) == 14
    wrong = torch.arange(8.0)
    wrong[6] += 1e-6
    with pytest.raises(ValueError, match="different numbers of master/b:1:5"):
        compare_state(training, ours(), theirs(master=wrong))
    with pytest.raises(ValueError, match="different numbers of exp_avg/a:0:3"):
        compare_state(training, ours(), theirs(exp_avg=wrong))
    with pytest.raises(ValueError, match="ours holds what DeepSpeed's does not: exp_avg/a:0:3"):
        compare_state(training, ours() | {"exp_avg/a:0:3": wrong[:3]}, theirs())
    assert compare_weights({"a": torch.arange(8.0)}, theirs()) == 8
    with pytest.raises(ValueError, match="different weights of a"):
        compare_weights({"a": torch.zeros(8)}, theirs())
    with pytest.raises(ValueError, match="lacks some"):
        compare_weights({"b": torch.zeros(8)}, theirs())


def stall(still: float, steps: list[float], repeats: int = 5) -> Stall:
    return Stall(
        parameters=10,
        compared=50,
        undisturbed=[[0.5, 0.5, 0.6]] * repeats,
        undisturbed_cpu=[1.0] * repeats,
        ours=[Episode(stall=still, steps=steps, published=1.5, cpu=6.0)] * repeats,
        deepspeed=Samples(wall=[2.0] * repeats, cpu=[2.5] * repeats),
        our_bytes=2_000_000,
        deepspeed_bytes=1_000_000,
        load=Load(before=0.0, after=0.0, others=0.0, processors=2),
    )


def test_stall_bars() -> None:
    found = stall(0.2, [0.8, 0.7, 0.5, 0.5])
    assert found.costs == pytest.approx([0.7] * 5)
    assert found.cpus == pytest.approx([2.0] * 5)
    assert [bar.line() for bar in stall_bars(found)] == [
        "bar checkpoint-stall 0.100 0.2 ok",
        "bar checkpoint-cost 0.350 0.5 ok",
    ]
    fast = stall(0.5, [0.4, 0.4])
    assert fast.slowdowns == [0.0] * 5, "faster steps are no gain"
    assert [bar.line() for bar in stall_bars(fast)] == [
        "bar checkpoint-stall 0.250 0.2 short",
        "bar checkpoint-cost 0.250 0.5 ok",
    ]
    assert [bar.ok for bar in stall_bars(stall(0.2, [0.5], repeats=4))] == [False, False]
    assert [row[0] for row in stall_rows(found)][-1] == "deepspeed"
    assert stall_rows(found)[2][1:] == ("0.700", "0.700–0.700", "2.000", "2.0")
    assert (
        "slowdown 0.500 s in 4 steps of 0.500 s; seen to be published after 1.50 s" in stall_remarks(found)[1]
    )


def test_bars_that_must_not_be_passed() -> None:
    assert most_bar("x", 0.5, 0.5, "x").ok
    assert not most_bar("x", 0.5, 0.501, "x").ok
    assert most_bar("x", 0.5, 0.1, "x", "why not").measured == "x; why not"
    assert not most_bar("x", 0.5, 0.1, "x", "why not").ok


def transition(*read: int) -> Transition:
    reader = Layout(ranks=len(read), stage=1)
    return Transition(writer=Layout(ranks=2, stage=3), reader=reader, part_bytes=3000, read=list(read))


def test_read_bar() -> None:
    bar = read_bar([transition(1000, 1010, 1000), transition(1500, 1530), transition(3000)])
    assert bar.line() == "bar checkpoint-read-share 1.020 1.1 ok"
    assert bar.measured == "written by 2 ranks, ZeRO 3, read by 2 ranks, ZeRO 1: 1,530 bytes of 1,500"
    assert read_bar([transition(1000, 1101, 1000)]).line() == "bar checkpoint-read-share 1.101 1.1 short"


def test_what_was_not_saved_is_not_loaded() -> None:
    written = Written(part_bytes=3000, fingerprint={"master": 5, "exp_avg": 7})
    right = Read(bytes=1, fingerprint={"exp_avg": 7, "master": 5, "weights": 5})
    check(transition(1, 1), written, [right, right])
    for role in right.fingerprint:
        wrong = Read(bytes=1, fingerprint={**right.fingerprint, role: 0})
        with pytest.raises(ValueError, match="1 rank, ZeRO 1 loaded something else than 2 ranks, ZeRO 3"):
            check(transition(1), written, [right, wrong])


def test_bytes_are_counted_on_every_thread(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.write("file", bytes(100))
    with counted() as count:
        storage.child("..", tmp_path.name).read("file")
        thread = threading.Thread(target=lambda: storage.read_range("file", 10, 30))
        thread.start()
        thread.join()
        assert count() == 120
    storage.read("file")
    assert count() == 120


def trial(side: str, *, hit: bool = True, torn: str | None = None) -> Trial:
    return Trial(side=side, share=0.5, usual=0.1, hit=hit, torn=torn)


def test_torn_bar() -> None:
    trials = [trial(OURS) for _ in range(5)] + [trial(DEEPSPEED, hit=n > 0, torn="x" * n) for n in range(2)]
    assert torn_bar(trials).line() == "bar checkpoint-torn 0.000 0 ok"
    assert summary(trials) == ("torn: DeepSpeed 2 of 2, ours 0 of 5 (1 and 5 of the kills fell into a save)")
    assert torn_bar([*trials, trial(OURS, torn="x")]).line() == "bar checkpoint-torn 1.000 0 short"
    missed = [trial(OURS, hit=n < 2) for n in range(5)]
    assert torn_bar(missed).measured.endswith("only 2 of 5 kills fell into a save")
    assert not torn_bar(missed).ok
    assert not torn_bar([trial(OURS)] * 4).ok, "too few"


def save_like_deepspeed(folder: Path, tag: str, ranks: int = 2) -> list[Path]:
    (folder / tag).mkdir(parents=True)
    names = ["mp_rank_00_model_states", *(f"zero_pp_rank_{n}_mp_rank_00_optim_states" for n in range(ranks))]
    files = [folder / tag / f"{name}.pt" for name in names]
    for file in files:
        torch.save({"numbers": torch.ones(1000)}, file)
    (folder / "latest").write_text(tag)
    return files


def test_torn_checkpoints_of_deepspeed_are_found(tmp_path: Path) -> None:
    assert damage(tmp_path, 2) == "latest is missing"
    save_like_deepspeed(tmp_path, "before")
    assert damage(tmp_path, 2) is None
    assert size(tmp_path, "before") > 3 * 4000
    files = save_like_deepspeed(tmp_path, "now")
    for file in files:
        whole = file.read_bytes()
        for length in (0, 10, len(whole) // 2, len(whole) - 1):
            file.write_bytes(whole[:length])
            assert str(damage(tmp_path, 2)).startswith(f"now/{file.name} does not load"), length
        file.unlink()
        assert "is missing" in str(damage(tmp_path, 2))
        file.write_bytes(whole)
    assert "zero_pp_rank_2" in str(damage(tmp_path, 3))
    (tmp_path / "latest").write_text("")
    assert damage(tmp_path, 2) == "latest is empty"
    (tmp_path / "latest").write_text("before")
    files[0].unlink()
    assert damage(tmp_path, 2) is None, "what is being written counts for nothing yet"


def test_torn_checkpoints_of_ours_are_found(tmp_path: Path) -> None:
    run = Run(str(run_of(tmp_path)))
    run.adopt_recipe(tiny_recipe())
    run.claim_attempt(None, "test", tiny_recipe(), "")
    assert our_damage(tmp_path) == "nothing is published any more"
    state = State(1000)
    writer = state.writer(run, alone(), MetricsLog(run, 1, 0))
    for images in (64, 128):
        state.train_to(images)
        writer.start(WriterJob(draft(images), {}, checkpoint=True, snapshot=False))
        writer.wait()
    assert our_damage(tmp_path) is None
    newest = sorted(run_of(tmp_path).glob("checkpoints/*"))[-1]
    part = newest / "weights.safetensors"
    whole = part.read_bytes()
    part.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "SHA-256 differs" in str(our_damage(tmp_path))
    part.write_bytes(whole[:-1])
    assert our_damage(tmp_path) == f"{newest.name} is published, but not whole"
    part.write_bytes(whole)
    manifest = newest / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-20])
    assert our_damage(tmp_path) == f"{newest.name} is published, but not whole"
    manifest.unlink()
    assert our_damage(tmp_path) is None, "it is not published, and the one before is whole"


def test_a_diary_outlives_its_writer(tmp_path: Path) -> None:
    diary = Diary(tmp_path / "trial", 0)
    for what in ("begin", "end", "begin"):
        diary.note(what)
    read_again = Diary(tmp_path / "trial", 0)
    assert read_again.is_saving()
    assert len(read_again.seconds()) == 1
    assert read_again.seconds()[0] >= 0
    diary.note("end")
    assert not read_again.is_saving()


def test_without_the_peer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = SimpleNamespace(name="deepspeed", distribution="no-such-distribution", version=None)
    monkeypatch.setattr(command, "DEEPSPEED", absent)
    result = main(["--folder", str(tmp_path)])
    assert result.missing == ["no-such-distribution"]
    assert capsys.readouterr().out.splitlines()[-4:] == [
        "bar checkpoint-stall nan 0.2 short",
        "bar checkpoint-cost nan 0.5 short",
        "bar checkpoint-read-share nan 1.1 short",
        "bar checkpoint-torn nan 0 short",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kills", "0"], "every N must be at least 1"),
        (["--repeats", "-1"], "every N must be at least 1"),
        (["--folder", "/no/such"], "/no/such: no such folder"),
    ],
)
def test_wrong_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        read(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
