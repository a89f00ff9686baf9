"""Collections that are one file: told apart, read at given places, or unpacked once to a local disk."""

import errno
import lzma
import os
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, BinaryIO, Final

from data_pipeline.errors import UserError
from data_pipeline.progress import Progress
from data_pipeline.scratch import ScratchFolder

_CHUNK: Final = 1 << 20
_DISK_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
# What gzip, bz2, lzma and zipfile raise on damaged or encrypted input.
_UNPACK_ERRORS: Final = (
    EOFError,
    OSError,
    zlib.error,
    lzma.LZMAError,
    zipfile.BadZipFile,
    RuntimeError,
    NotImplementedError,
)
_MAGIC: Final = (
    (0, b"PK\x03\x04", "zip"),
    (0, b"PK\x05\x06", "zip"),
    (0, b"\x1f\x8b", "tar"),
    (0, b"BZh", "tar"),
    (0, b"\xfd7zXZ\x00", "tar"),
    (257, b"ustar", "tar"),
    (16, b"\xde\xc0\xef\xbe", "lsun"),
)
LMDB_FILE: Final = "data.mdb"


def kind_of(path: Path) -> str | None:
    """Guess by the first bytes which of the sources of files can read a path; None if it fits none."""
    if path.is_dir():
        return "lsun" if (path / LMDB_FILE).is_file() else "folder"
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError:
        return None
    return next((kind for offset, magic, kind in _MAGIC if head[offset:].startswith(magic)), None)


def archive_path(path: str | os.PathLike[str], kind: str) -> Path:
    """Return the path of an archive.

    Args:
        path: As the user named it.
        kind: The source that is to read it.

    Raises:
        UserError: There is no file, or it is plainly for another source.
    """
    found = Path(path).expanduser()
    looks = kind_of(found)
    if looks not in (None, kind):
        raise UserError(f"{found}: is no {kind} archive; use kind {looks} for it")
    if not found.is_file():
        raise UserError(f"{found}: no such file; name a {kind} archive")
    if found.stat().st_size == 0:
        raise UserError(f"{found}: empty file; name a {kind} archive")
    return found


class LocalFile:
    """A file read at given places; opened when first needed, in a copy for another process anew."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None

    def read(self, offset: int, size: int) -> bytes:
        """Read `size` bytes from `offset` on; fewer if the file ends before."""
        if self._file is None:
            self._file = self._path.open("rb")
        self._file.seek(offset)
        return self._file.read(size)

    def close(self) -> None:
        """Close the file; the next `read` opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __reduce__(self) -> tuple[Any, ...]:
        return LocalFile, (self._path,)


Opener = Callable[[BinaryIO], IO[bytes]]
"""From an archive's file, opened for reading, to the unpacked bytes of what is wanted of it."""


def unpack(archive: Path, open_packed: Opener, name: str) -> tuple[ScratchFolder, Path]:
    """Unpack one file to a scratch folder; what a killed process had finished there is taken as it is.

    Args:
        archive: The archive.
        open_packed: How it is read.
        name: What the unpacked file is to be called (never a name from the archive).

    Returns:
        The folder, which whoever asked closes in the end, and the file in it.

    Raises:
        UserError: The archive is damaged, the disk too small, or another process is unpacking the same.
    """
    status = archive.stat()
    identity = (str(archive.resolve()), str(status.st_size), str(status.st_mtime_ns))
    with ExitStack() as stack:
        scratch = stack.enter_context(ScratchFolder("unpack", *identity))
        finished, partial = scratch.path / name, scratch.path / f"{name}.part"
        if not finished.exists():
            _copy(archive, open_packed, partial)
            partial.replace(finished)
        stack.pop_all()  # all went well: from here on the folder is the caller's
    return scratch, finished


def _copy(archive: Path, open_packed: Opener, target: Path) -> None:
    """Unpack to `target`; if the disk is too small, go on without writing, to tell how large it must be."""
    written, full = 0, False
    total = archive.stat().st_size >> 20
    with (
        archive.open("rb") as packed,
        target.open("wb", buffering=0) as file,
        Progress("unpack", total, "MiB") as progress,
    ):
        for chunk in _chunks(archive, packed, open_packed):
            written += len(chunk)
            full = full or not _write(file, chunk)
            if full:
                file.truncate(0)
            progress.update(packed.tell() >> 20)
    if full:
        room = shutil.disk_usage(target.parent).free
        raise UserError(
            f"{archive}: needs {_gib(written)} unpacked, and {target.parent.parent} has no such room "
            f"({_gib(room)} free); set TMPDIR to a folder on a larger disk"
        )


def _chunks(archive: Path, packed: BinaryIO, open_packed: Opener) -> Iterator[bytes]:
    try:
        with open_packed(packed) as stream:
            while chunk := stream.read(_CHUNK):
                yield chunk
    except EOFError as error:
        raise UserError(f"{archive}: is cut short; download or pack it again") from error
    except _UNPACK_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{archive}: cannot be unpacked ({reason}); download or pack it again") from error


def _write(file: IO[bytes], data: bytes) -> bool:
    """Write it all; False if the disk is full."""
    rest = memoryview(data)
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError as error:
        if error.errno in _DISK_FULL:
            return False
        raise
    return True


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 1 << 30 else f"{size / 2**20:.1f} MiB"
