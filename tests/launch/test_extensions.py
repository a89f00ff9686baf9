"""The pre-built DeepSpeed operator: locks of the dead, time limits, races. Uses what set-up has built."""

import importlib.metadata
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from data_pipeline.errors import UserError
from trainer import extensions
from trainer.extensions import BuildError

# torch's own lock, without the seconds that importing torch takes.
FileBaton = runpy.run_path(
    str(importlib.metadata.distribution("torch").locate_file("torch/utils/file_baton.py"))
)["FileBaton"]


@pytest.fixture(scope="session", autouse=True)
def _built() -> None:
    extensions.prepare()


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A private copy of the built folder, in use."""
    source = extensions.folder()
    monkeypatch.setenv(extensions.FOLDER_VARIABLE, str(tmp_path))
    shutil.copytree(source, extensions.folder())
    return extensions.folder()


@pytest.fixture
def nothing_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in use, and no built one to copy from."""
    monkeypatch.setenv(extensions.FOLDER_VARIABLE, str(tmp_path / "new"))
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    return tmp_path


def test_ready_costs_nothing(copy: Path) -> None:
    assert extensions.ready()
    started = time.monotonic()
    assert extensions.prepare() == copy
    assert time.monotonic() - started < 1
    assert extensions.environment()["TORCH_EXTENSIONS_DIR"] == str(copy)


def test_baton_of_a_killed_process_is_removed_and_a_live_one_is_not(copy: Path) -> None:
    lock = copy / "deepspeed_shm_comm" / "lock"
    baton = FileBaton(str(lock))
    assert baton.try_acquire()
    extensions.prepare()
    assert lock.exists()
    os.close(baton.fd)  # what the kernel does for a killed process; the file stays
    assert not FileBaton(str(lock)).try_acquire()  # and every later run would wait for it
    started = time.monotonic()
    extensions.prepare()
    assert time.monotonic() - started < 2
    assert FileBaton(str(lock)).try_acquire()


def test_a_run_compiles_nothing(copy: Path) -> None:
    # ninja alone decides that at each start: the one on the PATH of workers must know the build's records.
    done = subprocess.run(
        ["ninja", "-n", "-d", "explain"],
        cwd=copy / "deepspeed_shm_comm",
        env=extensions.environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert "no work to do" in done.stdout, done.stdout + done.stderr


def test_read_only_installation_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = extensions.folder()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(extensions, "_is_writable", lambda path: False)  # root may write anywhere
    target = extensions.prepare()
    assert target.is_relative_to(tmp_path)
    assert target != installed
    assert extensions.ready()


def test_build_is_killed_at_the_limit(nothing_built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A build that hangs in its compiler, leaving torch's lock behind.
    hanging = f"mkdir op; touch op/lock; sleep 600 & echo $! > {nothing_built}/pid; wait"
    script = f"cd $TORCH_EXTENSIONS_DIR; {hanging}"
    monkeypatch.setattr(extensions, "tethered", lambda command: ["sh", "-c", script])
    with pytest.raises(BuildError, match="not built in time"):
        extensions.prepare(timeout=1)
    pid = int((nothing_built / "pid").read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    assert list(nothing_built.glob("**/op"))
    assert not extensions.ready()
    assert not list(nothing_built.glob("**/lock"))


@pytest.mark.usefixtures("nothing_built")
def test_failing_build_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extensions, "tethered", lambda command: [command[0], "-c", "exit('no such header')"])
    with pytest.raises(BuildError, match=r"(?s)exit code 1.*build\.log.*no such header"):
        extensions.prepare()
    assert not extensions.ready()


@pytest.mark.usefixtures("nothing_built")
def test_missing_compiler_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"apt-get install -y g\+\+"):
        extensions.prepare()


def test_waits_for_another_build_only_until_the_limit(copy: Path) -> None:
    holder = subprocess.Popen(
        ["flock", str(copy / ".flock"), "sh", "-c", "echo locked; exec sleep 600"],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(BuildError, match="another process"):
            extensions.prepare(timeout=0.2)
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
        holder.communicate()
    assert extensions.prepare(timeout=5) == copy  # the lock died with its owner
