"""DeepSpeed's compiled CPU operator, built before a run needs it and never waited for without end.

On the CPU, DeepSpeed compiles its shared-memory collectives when the process group is made, in a folder
all processes of a user share. Older versions of torch guard that with a `FileBaton`: a file named `lock`
whose mere existence is waited for without a limit, so that a process killed in that moment makes every later
run hang; newer ones wait for each other's whole build. So the operator is built here, in a folder of our
own, under a lock the kernel drops with its owner and with a time limit; and batons of the dead are removed
before each use.

`python -m trainer.extensions` does what `prepare` does, for set-up scripts.
"""

import fcntl
import importlib.metadata
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Final

import psutil

from data_pipeline.errors import UserError
from trainer.tether import tethered

FOLDER_VARIABLE: Final = "DDPM_EXTENSIONS_DIR"
BUILD_SECONDS: Final = 600.0
"""A build takes 20 CPU seconds; a loaded machine may need many times that."""
_OPERATOR: Final = "deepspeed_shm_comm"
_STAMP: Final = "ready"
_POLL_SECONDS: Final = 0.05


class BuildError(RuntimeError):
    """The operator could not be built, or not in time; the message quotes the compiler."""


def folder() -> Path:
    """Return the extension folder of this Python, torch and DeepSpeed; it may not exist yet.

    `DDPM_EXTENSIONS_DIR` if set, else in the Python installation (virtual environment), else, where that
    is not writable, in `~/.cache/ddpm-foundry`.
    """
    chosen = os.environ.get(FOLDER_VARIABLE)
    if chosen:
        base = Path(chosen).absolute()
    else:
        base = _installed_base() if _is_writable(_installed_base()) else _home_base()
    return base / _build_name()


def ready() -> bool:
    """Tell, without importing torch or DeepSpeed, whether the operator is built."""
    return _is_built(folder())


def environment() -> dict[str, str]:
    """Return the variables that make a process and its children use the operator built here.

    PATH begins with this Python's folder: ninja decides whether anything is to be compiled, and another
    version of it than the one that built (the system's, when the virtual environment is not activated) cannot
    read its records and compiles everything again.
    """
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    return {"TORCH_EXTENSIONS_DIR": str(folder()), "PATH": path}


def prepare(timeout: float = BUILD_SECONDS) -> Path:
    """Build the operator unless it is built, and remove a dead process's baton.

    Processes that call this at the same time take turns. Call it before each start on the CPU: when
    nothing is to be done it takes milliseconds.

    Args:
        timeout: Limit in seconds for everything, waiting for another process's build included.

    Returns:
        The folder to be handed on as `TORCH_EXTENSIONS_DIR` (see `environment`).

    Raises:
        UserError: A build is due and the compiler, Python's headers, ninja or DeepSpeed are missing, or
            the folder cannot be written.
        BuildError: The build failed or was not over in time (it is then killed, with its children).
    """
    target = folder()
    deadline = time.monotonic() + timeout
    try:
        target.mkdir(parents=True, exist_ok=True)
        lock = (target / ".flock").open("ab")
    except OSError as error:
        raise UserError(f"{target}: {error.strerror}; set {FOLDER_VARIABLE} to a writable folder") from error
    with lock, _locked(lock, deadline):
        remove_dead_batons(target)
        if _is_built(target):
            return target
        installed = _installed_base() / _build_name()
        if target != installed and _is_built(installed):
            # A read-only image brings the operator along; times are kept, so nothing is compiled again.
            shutil.copytree(installed / _OPERATOR, target / _OPERATOR, dirs_exist_ok=True)
            remove_dead_batons(target)
        else:
            _check_tools()
            _build(target, deadline)
        (target / _STAMP).touch()
    return target


def remove_dead_batons(target: Path) -> list[Path]:
    """Remove torch's lock files that no process holds any more.

    The holder keeps the file open as long as it holds it (`FileBaton` and its successor `FileLock` alike), so
    one that no process of this machine has open belongs to the dead.

    Returns:
        The files removed.
    """
    batons = list(target.glob("*/lock"))
    if not batons:
        return []
    held = _open_files()
    dead = [baton for baton in batons if _identity(baton) not in held]
    for baton in dead:
        baton.unlink(missing_ok=True)
    return dead


def _build_name() -> str:
    """Name the folder by everything compiled code and the records of its build depend on."""
    try:
        versions = [f"{name}-{importlib.metadata.version(name)}" for name in ("torch", "deepspeed", "ninja")]
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(f"{error.name} is not installed; pip install 'ddpm-foundry[train]'") from error
    return "-".join((sys.implementation.cache_tag or "python", *versions))


def _installed_base() -> Path:
    return Path(sys.prefix) / "share" / "ddpm-foundry" / "torch_extensions"


def _home_base() -> Path:
    return Path.home() / ".cache" / "ddpm-foundry" / "torch_extensions"


def _is_writable(path: Path) -> bool:
    """Tell whether a folder is, or could be made and then be, written to."""
    nearest = next(parent for parent in (path, *path.parents) if parent.exists())
    return os.access(nearest, os.W_OK | os.X_OK)


def _is_built(target: Path) -> bool:
    return (target / _STAMP).is_file() and (target / _OPERATOR / f"{_OPERATOR}.so").is_file()


@contextmanager
def _locked(file: IO[bytes], deadline: float) -> Iterator[None]:
    """Hold an exclusive lock that the kernel releases with the process, or fail at the deadline."""
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise BuildError(
                    f"{file.name}: another process is still building DeepSpeed's CPU operator; "
                    "wait for it, or end it and start again"
                ) from None
        time.sleep(_POLL_SECONDS)  # flock has no waiting with a limit: poll
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)


def _check_tools() -> None:
    """Name what a build would lack, before the compiler says so in a hundred lines."""
    missing = []
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        missing.append("g++")
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        missing.append("python3-dev")
    if missing:
        raise UserError(
            f"DeepSpeed's CPU operator must be compiled, but {' and '.join(missing)} "
            f"is missing; apt-get install -y {' '.join(missing)}"
        )


def _build(target: Path, deadline: float) -> None:
    """Compile in a process of its own that can be killed with all its compilers."""
    log_path = target / "build.log"
    environment_of_build = {
        **os.environ,
        **environment(),
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            tethered([sys.executable, "-m", "trainer.extensions", "--compile"]),
            env=environment_of_build,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        code: int | None = process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        code = None
    finally:
        # Also after an interrupt: no compiler survives us, and no baton survives its compiler.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        remove_dead_batons(target)
    if code != 0:
        end = "\n".join(log_path.read_text(errors="replace").splitlines()[-15:])
        what = "was not built in time" if code is None else f"failed to build (exit code {code})"
        raise BuildError(f"DeepSpeed's CPU operator {what}; end of {log_path}:\n{end}")


def _compile() -> None:
    """Build and load the operator: the part that imports DeepSpeed, in the build's own process."""
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    ShareMemCommBuilder().load(verbose=True)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _open_files() -> set[tuple[int, int]]:
    """Identify every file that a process we may look into has open."""
    held: set[tuple[int, int]] = set()
    for pid in psutil.pids():
        try:
            descriptors = list(Path(f"/proc/{pid}/fd").iterdir())
        except OSError:
            continue  # it ended, or belongs to someone whose batons are not in our folder
        for descriptor in descriptors:
            identity = _identity_of_open(descriptor)
            if identity is not None:
                held.add(identity)
    return held


def _identity_of_open(descriptor: Path) -> tuple[int, int] | None:
    try:
        return _identity(descriptor)
    except OSError:
        return None


def main(arguments: list[str]) -> int:
    """Build (`--compile`, internal) or prepare, printing one line for people."""
    if arguments == ["--compile"]:
        _compile()
        return 0
    if not ready():
        print("building DeepSpeed's CPU operator (once, about a minute) ...", flush=True)
    try:
        prepare()
    except (UserError, BuildError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
