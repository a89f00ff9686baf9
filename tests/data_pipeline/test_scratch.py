import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.errors import UserError
from data_pipeline.scratch import ScratchFolder

HOLD = """
import sys
from data_pipeline.scratch import ScratchFolder
folder = ScratchFolder("job", "same")
(folder.path / "half").write_text("made")
print("held", flush=True)
sys.stdin.read()
"""


def test_found_again_after_a_kill_and_locked_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with subprocess.Popen(
        [sys.executable, "-c", HOLD],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="the same job is running on this machine"):
            ScratchFolder("job", "same")
        with ScratchFolder("job", "other") as other:
            assert list(other.path.iterdir()) == []
        process.kill()
    with ScratchFolder("job", "same") as folder:
        assert (folder.path / "half").read_text() == "made"
        folder.empty()
        assert list(folder.path.iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == [folder.path.parent.name]
    assert list(folder.path.parent.iterdir()) == []


def test_somebody_elses_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with ScratchFolder("job", "same") as folder:
        above = folder.path.parent
    above.rmdir()
    (tmp_path / "elsewhere").mkdir()
    above.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="belongs to somebody else; set TMPDIR"):
        ScratchFolder("job", "same")


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot be used .*set TMPDIR"):
        ScratchFolder("job", "same")
