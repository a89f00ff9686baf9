"""The quick start: stopped by Ctrl-C it leaves nothing behind; whole, it learns (slow)."""

import os
import re
import signal
import subprocess
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

MARK = "DDPM_TEST_MARK"


def start(options: Sequence[str], mark: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "launch.quickstart", *options],
        env={**os.environ, MARK: mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # Tests that a shell runs in its background have Ctrl-C ignored, and their children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def left_behind(mark: str) -> list[str]:
    """Command lines of all processes that descend from a start with this mark."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark:
                found.append(" ".join(process.cmdline()))
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return found


def interrupt_after(
    text: str, options: Sequence[str], number: signal.Signals = signal.SIGINT
) -> tuple[int, list[str], list[str]]:
    """Start, send a signal when a line holds `text`; return exit code, processes before and after."""
    mark = uuid.uuid4().hex
    process = start(options, mark)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            break
    else:
        raise AssertionError("".join(lines))
    before = left_behind(mark)
    process.send_signal(number)
    rest, _ = process.communicate(timeout=100)
    assert "Traceback" not in "".join(lines) + rest, "".join(lines) + rest
    return process.returncode, before, left_behind(mark)


def test_ctrl_c_leaves_no_process(tmp_path: Path) -> None:
    code, before, after = interrupt_after("waiting for the run", ["--folder", str(tmp_path / "run")])
    assert code == 130
    for part in ("weed", "trainer supervise", "eval watch"):
        assert any(part in command for command in before), (part, before)
    assert after == []


@pytest.mark.slow
def test_ctrl_c_while_training_leaves_no_process(tmp_path: Path) -> None:
    code, before, after = interrupt_after("attempt 1 of run", ["--folder", str(tmp_path / "run")])
    assert code == 130
    for part in ("weed", "trainer supervise", "deepspeed.launcher.launch", "trainer worker", "eval watch"):
        assert any(part in command for command in before), (part, before)
    assert after == []


@pytest.mark.slow
def test_a_terminated_quick_start_ends_its_parts_too(tmp_path: Path) -> None:
    code, _, after = interrupt_after("attempt 1 of run", ["--folder", str(tmp_path / "run")], signal.SIGTERM)
    assert code == 130
    assert after == []


@pytest.mark.slow
@pytest.mark.parametrize("text", ["data | build", "features of train", "train: "])
def test_ctrl_c_at_other_moments(tmp_path: Path, text: str) -> None:
    code, before, after = interrupt_after(text, ["--folder", str(tmp_path / "run")])
    assert code == 130
    assert before
    assert after == []


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_whole_quick_start_learns(tmp_path: Path) -> None:
    mark = uuid.uuid4().hex
    process = start(["--folder", str(tmp_path / "run")], mark)
    output, _ = process.communicate(timeout=1400)
    assert process.returncode == 0, output
    assert len(re.findall(r"^ok ", output, flags=re.MULTILINE)) == 3
    assert left_behind(mark) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "cats"], "--data cats"),
        (["--data", "folder:/nowhere"], "/nowhere"),
        (["--data", "folder:/", "--size", "30"], "--size 30"),
    ],
)
def test_mistakes(tmp_path: Path, options: list[str], message: str) -> None:
    mark = uuid.uuid4().hex
    process = start([*options, "--store", str(tmp_path / "store"), "--folder", str(tmp_path / "run")], mark)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 2, output
    assert message in output
    assert "Traceback" not in output
    assert left_behind(mark) == []


def test_a_used_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    process = start(["--folder", str(tmp_path)], uuid.uuid4().hex)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 2, output
    assert "name a new folder" in output
