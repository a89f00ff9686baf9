"""Local folders for what a job makes on the way: found again after a kill, locked by one process at a time.

The name is a function of what the folder is for, below the system's temporary folder (TMPDIR), so a killed
job leaves nothing that its repetition does not find. The kernel drops the lock with its holder.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from data_pipeline.errors import UserError

_NO_SPACE: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def naming_full_scratch(folder: Path) -> Iterator[None]:
    """Turn a full disk into the user's mistake that it is.

    Raises:
        UserError: No space left.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise UserError(
                f"{folder}: no space left for what is in the making ({error.strerror}); "
                "free some or set TMPDIR to a folder with more"
            ) from error
        raise


class ScratchFolder:
    """A local folder of this process alone. Use as a context manager, or call `close`.

    Args:
        purpose: What for, in one word; part of the name.
        identity: What else distinguishes it, e.g. a path and its size.

    Attributes:
        path: The folder; it may hold what a killed process of the same purpose left.

    Raises:
        UserError: Another process holds it, or it cannot be made.
    """

    def __init__(self, purpose: str, *identity: str) -> None:
        digest = hashlib.sha256("\0".join(identity).encode("utf-8", "backslashreplace")).hexdigest()[:16]
        try:
            above = Path(tempfile.gettempdir()) / f"ddpm-{os.getuid()}"
        except OSError as error:
            raise UserError(
                f"no folder for temporary files can be written ({error.strerror}); set TMPDIR to one that can"
            ) from error
        self.path = above / f"{purpose}-{digest}"
        try:
            above.mkdir(mode=0o700, exist_ok=True)
            if above.is_symlink() or above.stat().st_uid != os.getuid():
                raise UserError(f"{above}: belongs to somebody else; set TMPDIR to a folder of your own")
            self._lock = _lock(Path(f"{self.path}.lock"))
            self.path.mkdir(exist_ok=True)
        except BlockingIOError as error:
            raise UserError(
                f"{' '.join(identity)}: the same {purpose} is running on this machine already (it holds "
                f"{self.path}); wait for its end or set TMPDIR to another folder"
            ) from error
        except OSError as error:
            raise UserError(
                f"{above}: cannot be used ({error.strerror}); set TMPDIR to another folder"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def empty(self) -> None:
        """Remove what a killed process left."""
        shutil.rmtree(self.path)
        self.path.mkdir()

    def close(self) -> None:
        """Remove the folder and give up the lock."""
        shutil.rmtree(self.path, ignore_errors=True)
        Path(f"{self.path}.lock").unlink(missing_ok=True)
        os.close(self._lock)


def _lock(path: Path) -> int:
    """Open and lock a file.

    Raises:
        BlockingIOError: Another process has locked it.
    """
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.fstat(lock).st_ino == path.stat().st_ino:
                return lock
        except OSError:
            os.close(lock)
            raise
        os.close(lock)  # its last holder had removed it already: what is locked is no longer there
