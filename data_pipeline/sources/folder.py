"""One's own pictures: every picture file below a folder, in the order of their names."""

import os
from collections.abc import Iterator
from pathlib import Path

from data_pipeline.decode import sniff
from data_pipeline.errors import UserError
from data_pipeline.sources import Item

_PICTURE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".pgm", ".ppm"}
)
_MAX_FILE_BYTES = 256 << 20


class FolderSource:
    """All pictures below a folder, sub-folders included, sorted by path.

    A file takes part if its name or its content says that it is a picture: a broken `cat.jpg` is
    reported, not overlooked, a picture without a suffix is found, and a `README.txt` between the
    pictures does no harm (`ignored` counts it). Hidden files and folders are left out. Links are
    followed, except those that lead back to a folder above them.

    Args:
        folder: A local folder.

    Raises:
        UserError: No such folder.
    """

    kind = "folder"
    native_size: int | None = None
    default_channels = 3
    default_val_fraction = 0.05

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._root = Path(folder).expanduser()
        if not self._root.is_dir():
            raise UserError(f"{self._root}: no such folder; name a local folder with pictures")
        self.name = self._root.resolve().name or "folder"
        self.ignored = 0
        """Files of the last complete pass that neither by name nor by content are pictures."""

    def count(self) -> int:
        """Return how many files take part (reads the first bytes of unnamed ones only)."""
        return sum(1 for _ in self._pictures())

    def __iter__(self) -> Iterator[Item]:
        """Iterate the pictures; each key is the running number, each meta the path below the folder."""
        for number, path in enumerate(self._pictures()):
            # A name need not be valid UTF-8; what is kept of it must be.
            where = os.fsencode(path.relative_to(self._root)).decode("utf-8", "backslashreplace")
            data, problem = _read(path)
            yield Item(f"{number:09d}", where, data, {"path": where}, problem)

    def _pictures(self) -> Iterator[Path]:
        self.ignored = 0
        for path in _walk(self._root, (self._root.resolve(),)):
            if path.suffix.lower() in _PICTURE_SUFFIXES or sniff(_head(path)) is not None:
                yield path
            else:
                self.ignored += 1


def _walk(folder: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    """Iterate the regular files below `folder` by sorted name; `above` are the folders on the way."""
    try:
        with os.scandir(folder) as listing:
            entries = sorted(listing, key=lambda entry: os.fsencode(entry.name))
    except PermissionError as error:
        raise UserError(f"{folder}: access denied; make the folder readable or leave it out") from error
    for entry in entries:
        if entry.name.startswith("."):
            continue
        path = folder / entry.name
        if entry.is_dir():
            real = path.resolve()
            if real not in above:
                yield from _walk(path, (*above, real))
        elif entry.is_file():
            yield path


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(16)
    except OSError:
        return b""


def _read(path: Path) -> tuple[bytes, str]:
    """Return (bytes, "") or (b"", why they cannot be read)."""
    try:
        size = path.stat().st_size
        if size > _MAX_FILE_BYTES:
            return b"", f"file of {size} bytes is larger than {_MAX_FILE_BYTES}"
        return path.read_bytes(), ""
    except OSError as error:
        return b"", f"cannot be read: {error.strerror or type(error).__name__}"
