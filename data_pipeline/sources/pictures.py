"""What counts as a picture in a collection of files; how its files are named, limited and classed."""

import re
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Final

from data_pipeline.decode import sniff
from data_pipeline.errors import UserError

PICTURE_SUFFIXES: Final = frozenset(
    {".jpg", ".jpeg", ".jpe", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".pgm", ".ppm"}
)
MAX_FILE_BYTES: Final = 256 << 20
"""Larger files are not read: no picture within the decoder's limit of pixels needs them."""

HEAD_BYTES: Final = 16
"""How much of a file `looks_like_picture` looks at."""

# Control characters, line separators and those that turn the direction of writing.
_NOT_SHOWN: Final = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def has_picture_name(name: str) -> bool:
    """Tell whether a file's name says that it is a picture."""
    return PurePosixPath(name).suffix.lower() in PICTURE_SUFFIXES


def looks_like_picture(name: str, head: bytes) -> bool:
    """Tell whether a file takes part: by its name, broken or not, or by its content, whatever its name.

    A NumPy file is none by its content: next to pictures it holds features or labels.

    Args:
        name: Its name, with or without folders.
        head: Its first `HEAD_BYTES` bytes, or all of a shorter one.
    """
    return has_picture_name(name) or sniff(head) not in (None, "npy")


def is_hidden(path: str) -> bool:
    """Tell whether a file or a folder on the way to it is hidden; `.` and `..` hide nothing."""
    return any(part.startswith(".") and part not in (".", "..") for part in path.split("/"))


def readable(name: bytes) -> str:
    """A name from outside as one line of valid Unicode; what cannot be shown is a backslash escape."""
    text = name.decode("utf-8", "backslashreplace")
    return _NOT_SHOWN.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def size_problem(size: int) -> str:
    """Why a file of that size is not read; empty if it is."""
    return f"file of {size} bytes is larger than {MAX_FILE_BYTES}" if size > MAX_FILE_BYTES else ""


def read_problem(error: OSError) -> str:
    """Why a file could not be read."""
    return f"cannot be read: {error.strerror or type(error).__name__}"


class FolderClasses:
    """Classes of an archive's pictures: the names of its top-level folders, sorted, numbered from 0.

    Archives are often packed with one folder around everything; if all pictures lie below sub-folders of a
    single folder, those are the classes. Memory: the names of two levels of folders.

    Args:
        paths: The pictures' names in the archive.

    Attributes:
        names: The classes, by label number.

    Raises:
        UserError: A picture lies in no folder.
    """

    names: tuple[str, ...]

    def __init__(self, paths: Iterable[str]) -> None:
        outer: set[str] = set()
        inner: set[str] = set()
        wrapped = True
        for path in paths:
            folders = _folders(path)
            if not folders:
                raise UserError(
                    f"{readable(_encoded(path))}: lies in no folder, so it has no class; "
                    "put every picture into its class's folder, or build without labels"
                )
            outer.add(folders[0])
            inner.update(folders[1:2])
            wrapped = wrapped and len(folders) > 1
        self._depth = 1 if wrapped and len(outer) == 1 else 0
        folders = sorted(inner if self._depth else outer, key=_encoded)
        self._numbers = {folder: number for number, folder in enumerate(folders)}
        self.names = tuple(readable(_encoded(folder)) for folder in folders)

    def label(self, path: str) -> int:
        """Return the class number of one of the pictures."""
        return self._numbers[_folders(path)[self._depth]]


def _folders(path: str) -> list[str]:
    return [part for part in path.split("/")[:-1] if part not in ("", ".")]


def _encoded(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")
