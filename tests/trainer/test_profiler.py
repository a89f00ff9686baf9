"""Real traces of a small model: which steps they hold, and what becomes of them when training fails."""

import gzip
import json
import logging
import re
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from data_pipeline.errors import UserError
from trainer.profiler import StepProfiler, parse_profile
from trainer.run import Run


@pytest.mark.parametrize(("text", "steps"), [("steps=20:25", range(20, 25)), ("steps=0:1", range(1))])
def test_parsed(text: str, steps: range) -> None:
    assert parse_profile(text) == steps


@pytest.mark.parametrize(
    "text",
    [
        "",
        "20:25",
        "steps=25",
        "steps=25:20",
        "steps=5:5",
        "steps=-1:2",
        "steps=1:2:3",
        "step=1:2",
        "steps=0:1001",
    ],
)
def test_nonsense_is_named(text: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"--profile {text}: ")) as caught:
        parse_profile(text)
    assert "steps=" in str(caught.value) or "choose fewer" in str(caught.value)
    assert "\n" not in str(caught.value)


def train(run: Run, steps: range | None, total: int, fail_at: int | None = None, rank: int = 3) -> None:
    model = nn.Linear(4, 2)
    with StepProfiler(run, 7, rank, steps) as profiler:
        for step in range(total):
            with profiler.span("forward"):
                loss = model(torch.ones(5, 4)).sum()
            with profiler.span("backward"):
                loss.backward()
            if step == fail_at:
                raise ArithmeticError("diverged")
            profiler.step()


def events(run: Run, path: str = "profile/000007/rank-0003.json.gz") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(gzip.decompress(run.storage.read(path)))["traceEvents"]
    return [event for event in found if event.get("ph") == "X"]


def names(traced: Sequence[dict[str, Any]], start: str) -> list[str]:
    return sorted(event["name"] for event in traced if event["name"].startswith(start))


@pytest.mark.parametrize(("steps", "total"), [(range(2, 4), 6), (range(0, 1), 2), (range(1, 3), 3)])
def test_the_trace_holds_the_steps_and_their_spans(tmp_path: Path, steps: range, total: int) -> None:
    run = Run(str(tmp_path / "run"))
    train(run, steps, total)
    traced = events(run)
    assert names(traced, "ProfilerStep") == [f"ProfilerStep#{step}" for step in steps]
    for name in ("forward", "backward", "aten::linear"):
        spans = [event for event in traced if event["name"] == name and event["cat"] != "ac2g"]
        assert len(spans) == len(steps)
        parents = sorted((e for e in traced if e["name"].startswith("ProfilerStep")), key=lambda e: e["ts"])
        for span, parent in zip(sorted(spans, key=lambda e: e["ts"]), parents, strict=True):
            assert parent["ts"] <= span["ts"]
            assert span["ts"] + span["dur"] <= parent["ts"] + parent["dur"] + 1
    shapes = [event["args"].get("Input Dims") for event in traced if event["name"] == "aten::linear"]
    assert shapes[0][0] == [5, 4]


def test_the_trace_is_written_while_training_goes_on(tmp_path: Path) -> None:
    run = Run(str(tmp_path / "run"))
    with StepProfiler(run, 1, 0, range(1, 2)) as profiler:
        profiler.step()
        assert run.storage.list("profile") == []
        torch.ones(3).sum()
        profiler.step()
        assert names(events(run, "profile/000001/rank-0000.json.gz"), "aten::sum")
        profiler.step()
        assert isinstance(profiler.span("late"), nullcontext)


def test_training_that_ends_early(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = Run(str(tmp_path / "cut"))
    train(run, range(2, 9), total=4)
    assert names(events(run), "ProfilerStep")[:2] == ["ProfilerStep#2", "ProfilerStep#3"]
    assert len(names(events(run), "forward")) == 2
    run = Run(str(tmp_path / "before"))
    with caplog.at_level(logging.WARNING):
        for steps, total in ((range(9, 12), 4), (range(4, 5), 4)):
            caplog.clear()
            train(run, steps, total=total)
            assert f"training ended before step {steps.start}" in caplog.text
    assert run.storage.list("profile") == []


def test_a_loop_that_fails_writes_no_trace_and_is_heard(tmp_path: Path) -> None:
    run = Run(str(tmp_path / "run"))
    with pytest.raises(ArithmeticError, match="diverged"):
        train(run, range(1, 4), total=9, fail_at=2)
    assert run.storage.list("profile") == []
    train(run, range(1, 4), total=5)  # and leaves nothing behind that would hinder another profile
    assert len(names(events(run), "ProfilerStep")) == 3


def test_a_trace_that_cannot_be_written_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(str(tmp_path / "run"))
    tmp_path.joinpath("run").mkdir()
    tmp_path.joinpath("run", "profile").write_text("in the way")
    train(run, range(1, 4), total=9)
    assert caplog.text.count("the trace is lost, training goes on") == 1


def test_no_profile_is_nothing(tmp_path: Path) -> None:
    run = Run(str(tmp_path / "run"))
    train(run, None, total=3)
    assert run.storage.list("") == []
    with StepProfiler(run, 1, 0, None) as profiler:
        assert isinstance(profiler.span("forward"), nullcontext)
