"""One trainer a run: a live one is named, a dead one's place is taken."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.errors import UserError
from trainer.occupancy import occupied
from trainer.run import Run

HOLD = """
import sys
from trainer.occupancy import occupied
from trainer.run import Run
with occupied(Run(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> "subprocess.Popen[str]":
    """A process that holds the run until its stdin ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_run_in_use_is_refused_in_one_line(tmp_path: Path, holder: "subprocess.Popen[str]") -> None:
    with (
        holder,
        pytest.raises(UserError, match="in use by a live run") as caught,
        occupied(Run(str(tmp_path))),
    ):
        pytest.fail("two trainers hold one run")
    assert f"pid {holder.pid}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_was_given_up_is_free_at_once(
    tmp_path: Path, holder: "subprocess.Popen[str]", caplog: pytest.LogCaptureFixture
) -> None:
    holder.communicate(timeout=60)
    assert holder.returncode == 0
    with caplog.at_level(logging.INFO, "trainer.occupancy"), occupied(Run(str(tmp_path))):
        pass
    assert "watching" not in caplog.text


def test_a_dead_holders_place_is_taken_after_its_silence(
    tmp_path: Path, holder: "subprocess.Popen[str]", caplog: pytest.LogCaptureFixture
) -> None:
    holder.kill()
    holder.communicate(timeout=60)
    with (
        caplog.at_level(logging.INFO, "trainer.occupancy"),
        occupied(Run(str(tmp_path)), silence_seconds=3.0),
    ):
        pass
    assert f"pid {holder.pid}" in caplog.text, "it must have been watched"
