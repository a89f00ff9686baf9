"""The harness: turns, samples, judgement of bars, the JSON file."""

import gc
import json
from pathlib import Path

import pytest

from benchmarks.harness import OURS, Contender, Label, Load, LoadMeter, Mode, Precision, Timing, interleave
from benchmarks.report import (
    Bar,
    Check,
    Result,
    best_bar,
    environment,
    fastest,
    finish,
    least_favourable,
    speed_bar,
    table,
)

FIVE = 5


def label(contender: str, mode: Mode = Mode.EAGER, precision: Precision = Precision.FP32) -> Label:
    return Label(contender=contender, precision=precision, mode=mode, batch=1)


def timing(
    contender: str,
    seconds: float,
    mode: Mode = Mode.EAGER,
    precision: Precision = Precision.FP32,
    repeats: int = FIVE,
) -> Timing:
    wall = [seconds] * repeats
    return Timing(label=label(contender, mode, precision), warm_up_seconds=0.0, wall=wall, cpu=wall)


def test_contenders_take_turns_and_nobody_keeps_a_place() -> None:
    calls: list[str] = []
    contenders = [Contender(label(name), lambda name=name: calls.append(name)) for name in "abc"]  # type: ignore[misc]
    measurement = interleave(contenders, repeats=3, say=lambda line: None)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"  # warm-up, then three rounds
    assert [t.label.contender for t in measurement.timings] == ["a", "b", "c"]
    for t in measurement.timings:
        assert len(t.wall) == len(t.cpu) == 3
        assert min(t.wall) > 0


def test_a_compiled_contender_is_warmed_up_twice() -> None:
    calls: list[None] = []
    contender = Contender(label("a", Mode.COMPILED), lambda: calls.append(None))
    interleave([contender], repeats=1, say=lambda line: None)
    assert len(calls) == 3  # compiles, runs once more, is timed


def test_a_wrong_answer_ends_the_run_before_anything_is_timed() -> None:
    calls: list[str] = []

    def refuse(answer: object) -> None:
        raise ValueError(f"{answer} is wrong")

    def run() -> int:
        calls.append("run")
        return 7

    with pytest.raises(ValueError, match="7 is wrong"):
        interleave([Contender(label("a"), run, refuse)], repeats=3, say=lambda line: None)
    assert calls == ["run"]


def test_no_repeats_are_refused() -> None:
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        interleave([], repeats=0)


def test_the_collector_runs_again_after_a_failure() -> None:
    calls: list[None] = []

    def fail_when_timed() -> None:
        calls.append(None)
        if len(calls) == 2:
            assert not gc.isenabled()
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        interleave([Contender(label("a"), fail_when_timed)], repeats=1, say=lambda line: None)
    assert gc.isenabled()


def test_statistics_of_a_timing() -> None:
    t = Timing(label=label("a"), warm_up_seconds=2.0, wall=[3.0, 1.0, 2.0], cpu=[6.0, 2.0, 4.0])
    assert (t.median, t.median_cpu) == (2.0, 4.0)
    assert t.row() == ("a fp32 eager b1", "2.000", "1.000–3.000", "4.000", "2.0")


def test_a_busy_machine_is_said() -> None:
    quiet = Load(before=0.1, after=0.2, others=0.05, processors=2)
    busy = Load(before=0.1, after=0.2, others=0.5, processors=2)
    assert not quiet.busy
    assert busy.busy
    assert "BUSY: others used 0.50 of 2 processors" in busy.note()
    assert "BUSY" not in quiet.note()


def test_own_work_is_not_load_of_others() -> None:
    meter = LoadMeter()
    load = meter.read()
    assert load.others >= 0
    assert load.processors >= 1


@pytest.mark.parametrize(
    ("ours", "theirs", "line"),
    [
        (timing(OURS, 1.0), timing("p", 1.1), "bar n 1.100 1.05 ok"),
        (timing(OURS, 1.0), timing("p", 1.05), "bar n 1.050 1.05 ok"),
        (timing(OURS, 1.0), timing("p", 1.04), "bar n 1.040 1.05 short"),
        (timing(OURS, 1.0), timing("p", 9.0, repeats=4), "bar n 9.000 1.05 short"),  # too few samples
        (timing(OURS, 1.0), None, "bar n nan 1.05 short"),  # a missing peer
        (None, timing("p", 1.0), "bar n nan 1.05 short"),
    ],
)
def test_bars(ours: Timing | None, theirs: Timing | None, line: str) -> None:
    assert speed_bar("n", 1.05, ours, theirs).line() == line


def test_best_against_best_needs_the_compiled_peer() -> None:
    timings = [timing(OURS, 1.0), timing("p", 2.0)]
    bar = best_bar("n", 1.05, timings, "p", Precision.FP32)
    assert bar.line() == "bar n 2.000 1.05 short"
    assert "p was not measured compiled" in bar.measured
    timings += [timing("p", 1.2, Mode.COMPILED), timing(OURS, 0.1, precision=Precision.BF16)]
    assert best_bar("n", 1.05, timings, "p", Precision.FP32).line() == "bar n 1.200 1.05 ok"


def test_fastest() -> None:
    timings = [
        timing(OURS, 3.0),
        timing(OURS, 2.0, Mode.COMPILED),
        timing(OURS, 1.0, precision=Precision.BF16),
        timing("p", 0.1),
    ]
    assert fastest(timings, OURS) == timings[2]
    assert fastest(timings, OURS, Precision.FP32) == timings[1]
    assert fastest(timings, OURS, Precision.FP32, (Mode.EAGER,)) == timings[0]
    assert fastest(timings, OURS, batch=2) is None
    assert fastest(timings, "q") is None


def test_least_favourable_comparison() -> None:
    timings = [
        timing(OURS, 1.0),
        timing("p", 2.0),
        timing(OURS, 1.1, Mode.BLOCKS),
        timing("p", 1.1, Mode.COMPILED),
        timing(OURS, 5.0, precision=Precision.BF16),
        timing("p", 5.2, precision=Precision.BF16),
    ]
    assert least_favourable(timings, "p") == (timings[2], timings[3])
    assert least_favourable(timings[4:], "p") == (timings[4], timings[5])
    # Equal modes decide even where the best is another one: here the peer's eager is faster than ours.
    eager_loses = [timing(OURS, 1.0), timing("p", 0.9), timing(OURS, 0.5, Mode.COMPILED)]
    assert least_favourable(eager_loses, "p") == (eager_loses[0], eager_loses[1])
    assert least_favourable(timings, "q") == (timings[0], None)


def result(bars: list[Bar]) -> Result:
    return Result(
        benchmark="b",
        network="small",
        settings={"repeats": FIVE},
        environment=environment(["torch", "no-such-distribution"]),
        checks=[
            Check(
                peer="p",
                version="1",
                source="https://example.org",
                parameters=1,
                same_parameters=False,
                difference=None,
                scale=None,
                atol=None,
            )
        ],
        missing=["q"],
        timings=[timing(OURS, 1.0)],
        loads=[Load(before=0.0, after=0.0, others=0.0, processors=1)],
        profiles={},
        bars=bars,
    )


def test_json_holds_every_sample_and_reads_back(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    written = result([speed_bar("n", 1.05, timing(OURS, 1.0), None)])
    finish(written, file)
    content = json.loads(file.read_bytes())
    assert content["schema"] == "benchmark/1"
    assert content["timings"][0]["wall"] == [1.0] * FIVE
    assert content["timings"][0]["cpu"] == [1.0] * FIVE
    assert content["timings"][0]["label"]["precision"] == "fp32"
    assert content["bars"] == [
        {"name": "n", "value": None, "target": 1.05, "ok": False, "measured": "the peer was not measured"}
    ]
    assert set(content["environment"]["packages"]) == {"torch"}
    assert content["environment"]["threads"] >= 1
    assert Result.from_json(file.read_bytes(), "r.json") == written


def test_bars_are_the_last_lines(capsys: pytest.CaptureFixture[str]) -> None:
    finish(
        result([speed_bar("n", 1.0, timing(OURS, 1.0), timing("p", 2.0)), speed_bar("m", 1.0, None, None)]),
        None,
    )
    assert capsys.readouterr().out.splitlines()[-2:] == ["bar n 2.000 1 ok", "bar m nan 1 short"]


def test_table() -> None:
    assert table(("a", "bb"), [("ccc", "d")]) == "a    bb\nccc   d"
