"""One's own pictures: every picture file below a folder, in the order of their names."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from data_pipeline.errors import UserError
from data_pipeline.sources import Item, Place, Source, number_key
from data_pipeline.sources.pictures import (
    HEAD_BYTES,
    has_picture_name,
    looks_like_picture,
    read_problem,
    readable,
    size_problem,
)
from data_pipeline.sources.unpack import LMDB_FILE, kind_of

# Sorts before every byte a name can hold, so the names' order is that without it.
_FOLDER_MARK: Final = b"\0"


class FolderSource(Source):
    """All pictures below a folder, sub-folders included, sorted by path.

    A file takes part if its name or its content says that it is a picture: a broken `cat.jpg` is
    reported, not overlooked, a picture without a suffix is found, and a `README.txt` between the
    pictures does no harm (`ignored` counts it). Hidden files and folders are left out. Links are
    followed, except those that lead back to a folder above them.

    Memory: the names of one folder at a time and of those above it, about 70 bytes for each.

    Args:
        folder: A local folder.
        labels: Number the top-level sub-folders in the order of their names; a picture's label is the number
            of the one it lies in.

    Raises:
        UserError: No such folder, or one for another kind of source.
    """

    kind = "folder"

    def __init__(self, folder: str | os.PathLike[str], *, labels: bool = False) -> None:
        self._root = Path(folder).expanduser()
        self.labelled = labels
        _refuse_other_kinds(self._root)
        self.name = readable(os.fsencode(self._root.resolve().name)) or "folder"
        self._numbers: dict[str, int] | None = None
        if labels:
            folders = [name[:-1] for name in _entries(self._root) if name.endswith(_FOLDER_MARK)]
            self._numbers = {os.fsdecode(name): number for number, name in enumerate(folders)}
            self.classes = tuple(readable(name) for name in folders)

    def places(self) -> Iterator[Place]:
        """Iterate the pictures' paths below the folder (reads the first bytes of unnamed ones only)."""
        self.ignored = 0
        for path in _walk(self._root):
            if not has_picture_name(path) and not looks_like_picture(path, _head(self._root / path)):
                self.ignored += 1
                continue
            if self._numbers is not None and "/" not in path:
                raise UserError(
                    f"{readable(os.fsencode(self._root / path))}: lies in no sub-folder, so it has no class; "
                    "move it into its class's folder, or build without labels"
                )
            yield path

    def read(self, first: int, places: Sequence[Place]) -> Iterator[Item]:
        """Read pictures; each key is the running number, each meta the path below the folder."""
        for number, path in enumerate(places, first):
            # A name need not be valid UTF-8; what is kept of it must be.
            where = readable(os.fsencode(path))
            meta: dict[str, Any] = {"path": where}
            if self._numbers is not None:
                meta["label"] = self._numbers[path.partition("/")[0]]
            data, problem = _read(self._root / path)
            yield Item(number_key(number), where, data, meta, problem)

    def describe(self, place: Place) -> str:
        """A picture's path, size and time."""
        try:
            status = (self._root / place).stat()
        except OSError as error:
            return f"{place!r} {read_problem(error)}"
        return f"{place!r} {status.st_size} {status.st_mtime_ns}"


def _refuse_other_kinds(root: Path) -> None:
    """Raise if the path is no folder, or one that holds a collection for another source."""
    if not root.is_dir():
        kind = kind_of(root)
        remedy = f"use kind {kind} for that file" if kind else "name a local folder with pictures"
        raise UserError(f"{root}: no such folder; {remedy}")
    if (root / LMDB_FILE).is_file():
        raise UserError(f"{root}: holds {LMDB_FILE}, so it looks like an LSUN LMDB; use kind lsun")
    try:
        shown = (name for name in root.iterdir() if not name.name.startswith("."))
        only, more = next(shown, None), next(shown, None)
    except OSError as error:
        raise _cannot_list(root, error) from error
    if only is not None and more is None and only.is_file():
        kind = kind_of(only)
        if kind is not None:
            raise UserError(
                f"{root}: holds nothing but the archive {readable(os.fsencode(only.name))}; "
                f"use kind {kind} with that file"
            )


def _walk(root: Path) -> Iterator[str]:
    """Iterate the regular files below `root` by sorted path, relative to it."""
    levels = [(b"", iter(_entries(root)), _identity(root))]
    while levels:
        prefix, names, _ = levels[-1]
        name = next(names, None)
        if name is None:
            levels.pop()
        elif name.endswith(_FOLDER_MARK):
            inside = prefix + name[:-1] + b"/"
            folder = root / os.fsdecode(inside)
            identity = _identity(folder)
            if all(identity != above for _, _, above in levels):
                levels.append((inside, iter(_entries(folder)), identity))
        else:
            yield os.fsdecode(prefix + name)


def _entries(folder: Path) -> list[bytes]:
    """Sorted names of what is in a folder and not hidden; those of folders end in `_FOLDER_MARK`."""
    names: list[bytes] = []
    try:
        with os.scandir(os.fsencode(folder)) as listing:
            for entry in listing:
                if entry.name.startswith(b"."):
                    continue
                if _is(entry.is_dir):
                    names.append(entry.name + _FOLDER_MARK)
                elif _is(entry.is_file):
                    names.append(entry.name)
    except OSError as error:
        raise _cannot_list(folder, error) from error
    names.sort()
    return names


def _is(question: Callable[[], bool]) -> bool:
    """Ask what a directory entry is; a link that leads nowhere or in a circle is nothing."""
    try:
        return question()
    except OSError:
        return False


def _identity(folder: Path) -> tuple[int, int]:
    try:
        status = folder.stat()
    except OSError as error:
        raise _cannot_list(folder, error) from error
    return status.st_dev, status.st_ino


def _cannot_list(folder: Path, error: OSError) -> UserError:
    reason = "access denied" if isinstance(error, PermissionError) else error.strerror
    shown = readable(os.fsencode(folder))
    return UserError(f"{shown}: cannot be listed ({reason}); make the folder readable or leave it out")


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(HEAD_BYTES)
    except OSError:
        return b""


def _read(path: Path) -> tuple[bytes, str]:
    """Return (bytes, "") or (b"", why they cannot be read)."""
    try:
        problem = size_problem(path.stat().st_size)
        return (b"", problem) if problem else (path.read_bytes(), "")
    except OSError as error:
        return b"", read_problem(error)
