"""The local disk as a backend of `Storage`: atomic, durable files (temporary name, fsync, link or rename)."""

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Final

_TEMPORARY: Final = ".tmp-"
"""Prefix of files being written; such names are never listed and a crash may leave one behind."""


class LocalFiles:
    """Local files; what has a final name is complete and on disk."""

    hedges: Final = 0
    """A disk is never asked twice."""

    def read(self, path: str, start: int | None = None, stop: int | None = None) -> bytes:
        """Read a file or the bytes [start, stop)."""
        with Path(path).open("rb") as file:
            if start is None or stop is None:
                return file.read()
            file.seek(start)
            return file.read(stop - start)

    def create(self, path: str, data: bytes) -> None:
        """Write a new file; linking a finished temporary file keeps it both atomic and exclusive."""
        self._publish(path, lambda file: file.write(data), os.link)

    def write(self, path: str, data: bytes) -> None:
        """Write a file, replacing an old one atomically."""
        self._publish(path, lambda file: file.write(data), os.replace)

    def upload(self, path: str, local_file: Path) -> None:
        """Copy a file here, replacing an old one atomically."""

        def copy(file: BinaryIO) -> None:
            with local_file.open("rb") as source:
                shutil.copyfileobj(source, file, length=1 << 20)

        self._publish(path, copy, os.replace)

    def fill(self, path: str, fill: Callable[[BinaryIO], object], scratch: Path) -> None:
        """Write a file piece by piece where it belongs; no scratch is needed."""
        self.stream(path, fill)

    def stream(self, path: str, fill: Callable[[BinaryIO], object]) -> None:
        """Write a file piece by piece, replacing an old one atomically."""
        self._publish(path, fill, os.replace)

    def list(self, path: str) -> list[str]:
        """Names of the immediate children, sorted; empty if the folder is absent."""
        try:
            return sorted(name for name in os.listdir(path) if not name.startswith(_TEMPORARY))  # noqa: PTH208
        except FileNotFoundError:
            return []

    def size(self, path: str) -> int:
        """Size in bytes."""
        if not Path(path).is_file():
            raise FileNotFoundError(errno.ENOENT, "no such file", path)
        return Path(path).stat().st_size

    def delete(self, path: str) -> None:
        """Remove a file; absent is fine."""
        Path(path).unlink(missing_ok=True)

    def delete_folder(self, path: str) -> None:
        """Remove a folder and all below it; absent is fine."""
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(path)

    def sizes(self, path: str) -> dict[str, int]:
        """Sizes of all files below a folder, those being written included."""
        files = (file for file in Path(path).rglob("*") if file.is_file())
        return {str(file.relative_to(path)): file.stat().st_size for file in files}

    def sweep(self, path: str) -> None:
        """Remove what killed processes were writing."""
        for temporary in Path(path).glob(f"{_TEMPORARY}*"):
            temporary.unlink(missing_ok=True)

    @staticmethod
    def _publish(
        path: str, fill: Callable[[BinaryIO], object], name_it: Callable[[Path, Path], None]
    ) -> None:
        final = Path(path)
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, FileNotFoundError) as error:  # not to be taken for those of the file itself
            raise NotADirectoryError(errno.ENOTDIR, "not a folder", str(final.parent)) from error
        temporary = final.parent / f"{_TEMPORARY}{uuid.uuid4().hex}"
        try:
            with temporary.open("xb") as file:
                fill(file)
                file.flush()
                os.fsync(file.fileno())
            name_it(temporary, final)
        finally:
            temporary.unlink(missing_ok=True)
        folder = os.open(final.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
