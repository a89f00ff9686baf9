"""`python -m benchmarks.trainer` end to end with a small network, and its parts."""

import io
import json
from pathlib import Path

import pytest

from benchmarks.harness import OURS, Precision
from benchmarks.network import CIFAR10, SMALL
from benchmarks.peers import diffusers_example
from benchmarks.process import AnsweringProcess, Hang
from benchmarks.trainer import job as jobs
from benchmarks.trainer.bars import bars, remarks
from benchmarks.trainer.command import TrainerResult, main, read
from benchmarks.trainer.contenders import BARE, EXAMPLE
from benchmarks.trainer.job import RUN_IN_S3, Job, Turn, job_name
from benchmarks.trainer.pace import Ended, Pace
from benchmarks.trainer.site import Crew, site
from benchmarks.trainer.turns import StepTimes

BF16, FP32 = Precision.BF16, Precision.FP32
EVERYONE = [
    "bare bf16",
    "bare fp32",
    "ours bf16",
    "ours bf16, run in S3",
    "diffusers-example bf16",
    "diffusers-example fp32",
    "ours bf16, 2 ranks",
]


@pytest.mark.slow
def test_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "trainer.json"
    arguments = ["--small", "--run-in-s3", "--steps", "40", "--repeats", "2"]
    result = main([*arguments, "--folder", str(tmp_path), "--json", str(file)])
    assert TrainerResult.from_json(file.read_bytes(), file.name) == result
    content = json.loads(file.read_bytes())
    assert content["schema"] == "trainer-benchmark/1"
    assert content["settings"]["batch"] == 8
    assert 1800 < content["settings"]["pictures"] < 2000
    times = {each["name"]: each for each in content["times"]}
    assert list(times) == EVERYONE
    for each in times.values():
        assert len(each["wall"]) == len(each["cpu"]) == len(each["steps"]) == 2
        steps = 40 if each["name"] in ("ours bf16", "ours bf16, run in S3") else 10
        assert [len(turn) for turn in each["steps"]] == [steps, steps]
        assert min(each["wall"] + each["cpu"]) > 0
    assert len(times["ours bf16"]["ema"]) == 80, "every update averages"
    assert len(times["ours bf16, 2 ranks"]["ema"]) == 2 * 20, "on both ranks"
    assert len(times["diffusers-example fp32"]["losses"]) == 5 + 20, "those of the warm-up too"
    assert times["bare bf16"]["ema"] == times["bare bf16"]["losses"] == []
    assert content["checks"][0]["difference"] < content["checks"][0]["atol"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1:2] + line.split()[3:] for line in lines[-3:]] == [
        ["small-goodput-1-rank", "0.93", "short"],
        ["small-end-to-end-fp32-default", "1.5", "short"],
        ["small-end-to-end-bf16", "1.05", "short"],
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["trainer.json"], "all else is removed again"


def test_the_peer_trains_in_its_own_process(tmp_path: Path) -> None:
    with site(tmp_path, 60, small=True, threads=1) as place:
        assert 40 < place.pictures <= 60
        with place.start(place.job(EXAMPLE, BF16)) as crew:
            (first,) = crew.steps(2)
            (then,) = crew.steps(10)  # into the second epoch
    assert (len(first.steps), len(then.steps)) == (2, 10)
    assert then.wall == pytest.approx(sum(then.steps))
    assert then.cpu > 0
    losses = [*first.notes["loss"], *then.notes["loss"]]
    assert len(losses) == 12
    assert all(0.5 < loss < 2.0 for loss in losses), "noise is predicted as well as nothing can"


def test_crews_end_what_hangs_or_fails(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    job = Job(contender=OURS, precision=BF16, overrides=("data.url=", f"run={run}"), out=run)
    crew = Crew(job, {"OMP_NUM_THREADS": "1"})
    with pytest.raises(Hang, match="ours bf16, rank 0: no answer to 'steps' in 0 s"), crew:
        crew.steps(1, seconds=0.0)
    crew = Crew(job.model_copy(update={"contender": "nobody"}), {})
    with pytest.raises(ChildProcessError, match="KeyError: 'nobody'"), crew:
        crew.steps(1)


def test_a_process_tells_and_answers(tmp_path: Path) -> None:
    job = Job(contender="nobody", precision=BF16, overrides=()).model_dump_json()
    process = AnsweringProcess("benchmarks.trainer.worker", "nobody", job, {}, tmp_path / "log")
    with process, pytest.raises(ChildProcessError, match="nobody has ended at 'steps'"):
        process.ask("steps", steps=1)


def test_a_loop_is_held_back_until_its_steps_are_wanted() -> None:
    answers = io.StringIO()
    asked = iter(json.dumps({"do": "steps", "steps": steps}) for steps in (2, 3))
    pace = Pace(asked, answers)
    for number in range(1, 6):
        pace.before_step()
        pace.note("loss", float(number))
    with pytest.raises(Ended):
        pace.before_step()
    turns = [Turn.model_validate_json(line) for line in answers.getvalue().splitlines()]
    assert [len(turn.steps) for turn in turns] == [2, 3]
    assert [turn.notes["loss"] for turn in turns] == [[1.0, 2.0], [3.0, 4.0, 5.0]]
    assert all(turn.wall == pytest.approx(sum(turn.steps)) for turn in turns)


def test_the_recipe_is_the_one_that_is_measured(tmp_path: Path) -> None:
    recipe = Job(contender=OURS, precision=FP32, overrides=("batch.total=8",)).recipe()
    assert recipe.precision == "fp32"
    assert list(recipe.ema) == ["paper"]
    config = recipe.unet_config()
    assert (config.image_size, config.dropout) == (CIFAR10.image_size, CIFAR10.dropout)
    assert config.widths == CIFAR10.widths
    tiny = Job(contender=OURS, precision=BF16, overrides=jobs.SMALL).recipe().unet_config()
    assert (tiny.image_size, tiny.widths) == (SMALL.image_size, SMALL.widths)


def times(
    contender: str, precision: Precision, step: float, ranks: int = 1, repeats: int = 5, remark: str = ""
) -> StepTimes:
    """A contender of equal steps but for a last one that takes longer by half of all."""
    turn = [step / 1.5] * 9 + [step / 1.5 * 6]
    return StepTimes(
        wall=[step] * repeats,
        cpu=[2 * step] * repeats,
        name=job_name(contender, precision, ranks, remark),
        ranks=ranks,
        steps=[turn] * repeats,
        ema=[0.01 / ranks] * 20 if contender == OURS else [],
        losses=[1.0] * 60 if contender == EXAMPLE else [],
    )


def by_name(*found: StepTimes) -> dict[str, StepTimes]:
    return {each.name: each for each in found}


def test_bars() -> None:
    found = by_name(
        times(BARE, BF16, 0.48),
        times(OURS, BF16, 0.5),
        times(EXAMPLE, FP32, 0.9),
        times(EXAMPLE, BF16, 0.52),
    )
    assert [bar.line() for bar in bars(found)] == [
        "bar goodput-1-rank 0.960 0.93 ok",
        "bar end-to-end-fp32-default 1.800 1.5 ok",
        "bar end-to-end-bf16 1.040 1.05 short",
    ]
    assert "by processor time 0.960 s over 1.000 s = 0.960" in bars(found)[0].measured
    few = by_name(times(BARE, BF16, 0.5, repeats=4), times(OURS, BF16, 0.5))
    assert [bar.line() for bar in bars(few)] == [
        "bar goodput-1-rank 1.000 0.93 short",
        "bar end-to-end-fp32-default nan 1.5 short",
        "bar end-to-end-bf16 nan 1.05 short",
    ]


def test_remarks() -> None:
    found = by_name(
        times(BARE, BF16, 0.25),
        times(OURS, BF16, 0.6),
        times(OURS, BF16, 0.75, remark=RUN_IN_S3),
        times(OURS, BF16, 0.3, ranks=2),
        times(OURS, FP32, 1.0),
        times(BARE, FP32, 0.9),
        times(EXAMPLE, FP32, 1.2),
    )
    said = remarks(found, threads=2)
    assert said[0] == (
        "ours bf16: 600.00 ms per step are 250.00 ms of the bare step, 150.00 ms of what every step has "
        "beside it (EMA 10.00 ms), and 200.00 ms of rows and checkpoint, spread over all steps"
    )
    in_s3 = "ours bf16, run in S3"
    assert said[1].startswith(f"{in_s3}: 750.00 ms per step are 250.00 ms of the bare step, 250.00 ms of")
    assert said[2] == (f"goodput-1-rank, run in S3: bare bf16 0.250 s per step over {in_s3} 0.750 s: 0.333")
    assert said[3].endswith(f"diffusers-example fp32 1.200 s per step over {in_s3} 0.750 s: 1.600")
    assert said[4] == "end-to-end-bf16, run in S3: diffusers-example bf16 was not measured"
    assert said[5].endswith("bare fp32 0.900 s per step over ours fp32 1.000 s: 0.900")
    assert said[6].endswith("diffusers-example fp32 1.200 s per step over ours fp32 1.000 s: 1.200")
    assert said[7].startswith("EMA at 1 rank: 10.00 ms per update (10.00 ms to 10.00 ms, 20 updates), 2.50 %")
    assert said[8].startswith("EMA at 2 ranks: 5.00 ms per update")
    assert said[9].startswith("scaling from 1 to 2 ranks: 2.000 times")


def test_what_does_not_train_is_refused() -> None:
    falls = times(EXAMPLE, FP32, 1.0).model_copy(update={"losses": [1.0] * 30 + [0.5] * 30})
    falls.check()
    for losses, message in (([1.0] * 60, "does not train"), ([1.0, float("nan")], "is not finite")):
        with pytest.raises(ValueError, match=message):
            falls.model_copy(update={"losses": losses}).check()
    falls.model_copy(update={"losses": [0.9, 1.0]}).check()  # too few to tell


def test_what_the_peer_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert diffusers_example.missing() == []
    monkeypatch.setattr(diffusers_example, "REQUIRES", ("diffusers", "no-such-distribution"))
    assert diffusers_example.missing() == ["no-such-distribution"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "every N must be at least 1"),
        (["--threads", "-1"], "every N must be at least 1"),
        (["--folder", "/no/such"], "/no/such: no such folder"),
    ],
)
def test_wrong_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        read(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
