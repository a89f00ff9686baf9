"""CIFAR-10 as people have it: the python version, the binary version, or a tree of class folders.

Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

import logging
import lzma
import os
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, Final

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.scratch import ScratchFolder, naming_full_scratch
from data_pipeline.sources import Item, Place, Source, number_key
from data_pipeline.sources.cifar10_pickle import CLASSES, RECORD, batch_records
from data_pipeline.sources.folder import FolderSource
from data_pipeline.sources.netpbm import netpbm
from data_pipeline.sources.pictures import has_picture_name, read_problem, readable
from data_pipeline.sources.tar_archive import TarSource
from data_pipeline.sources.unpack import LocalFile

_logger = logging.getLogger(__name__)

_BATCHES: Final = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")
_BINARY: Final = ".bin"
_FOLDERS: Final = ("", "cifar-10-batches-py", "cifar-10-batches-bin")
_SPLITS: Final = {"train": "train", "test": "val"}
_OFFICIAL: Final = (50_000, 10_000)
_MAX_BATCH_BYTES: Final = 256 << 20  # the real ones have 31 MB
_ACCEPTED: Final = (
    "name cifar-10-python.tar.gz, cifar-10-binary.tar.gz, what they unpack to, "
    "or a folder or tar with train/<class>/ and test/<class>/"
)
# What tarfile and its decompressors raise on damaged input.
_ARCHIVE_ERRORS: Final = (
    tarfile.TarError,
    EOFError,
    OSError,
    zlib.error,
    lzma.LZMAError,
    ValueError,
    LookupError,
    OverflowError,
)


class Cifar10Source(Source):
    """CIFAR-10, told apart by content; with its official split, the test pictures being the validation.

    The python and the binary version, as folders or archives, give the very same items: the training batches
    in order, then the test batch. Unless it is the binary version's folder, they are unpacked once to a local
    folder (184 MB), which `close` removes; pickles are read without running anything they name. Of a tree of
    class folders the pictures are those of the folder or tar itself. Classes have their official numbers;
    a tree with other names has them numbered in the order of the names.

    Args:
        path: Folder or archive.

    Raises:
        UserError: No such path, nothing of CIFAR-10 in it, or a tree that is none.
    """

    kind = "cifar10"
    name = "cifar10"
    default_val_fraction = None

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._content = _content(Path(path).expanduser())
        self.native_size = self._content.native_size
        self.classes = self._content.classes

    def places(self) -> Iterator[Place]:
        """Iterate (batch, number in it), or the places of the folder or tar.

        Raises:
            UserError: A batch is missing, damaged or asks for what it must not, or a picture has no class.
        """
        yield from self._content.places()
        self.ignored = self._content.ignored

    def read(self, first: int, places: Sequence[Place]) -> Iterator[Item]:
        """Give the batches' pictures as PPM files, those of a tree as they are."""
        return self._content.read(first, places)

    def files(self) -> Sequence[Path]:
        """The batches or the archive; none for a folder."""
        return self._content.files()

    def describe(self, place: Place) -> str:
        """Batch and number, or as the folder or tar does."""
        return self._content.describe(place)

    def close(self) -> None:
        """Remove what was unpacked."""
        self._content.close()


class _Batches:
    """The python or the binary version."""

    native_size = 32
    classes = CLASSES
    ignored = 0

    def __init__(self, path: Path, suffix: str) -> None:
        self._path, self._suffix = path, suffix
        self._scratch: ScratchFolder | None = None
        self._records: tuple[LocalFile, ...] = ()
        """The six files of records; empty before they are made."""
        self._counts: tuple[int, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        self._prepare()  # the copy in another process finds everything unpacked, and leaves it alone
        return {**self.__dict__, "_scratch": None}

    def places(self) -> Iterator[tuple[int, int]]:
        self._prepare()
        for batch, count in enumerate(self._counts):
            for number in range(count):
                yield batch, number

    def files(self) -> Sequence[Path]:
        if self._path.is_file():
            return (self._path,)
        return tuple(self._path / f"{name}{self._suffix}" for name in _BATCHES)

    def describe(self, place: Place) -> str:
        return repr(place)

    def read(self, first: int, places: Sequence[tuple[int, int]]) -> Iterator[Item]:
        self._prepare()
        for key, (batch, number) in enumerate(places, first):
            data, meta, problem = b"", dict[str, Any](), ""
            try:
                record = self._records[batch].read(number * RECORD, RECORD)
                if len(record) < RECORD:
                    problem = "the batch ends before it"
                elif record[0] >= len(CLASSES):
                    problem = f"its label {record[0]} is none of 0 … {len(CLASSES) - 1}"
                else:
                    pixels = np.frombuffer(record, np.uint8, offset=1).reshape(3, 32, 32)
                    data, meta["label"] = netpbm(pixels), record[0]
            except OSError as error:
                problem = read_problem(error)
            split = "val" if batch == len(_BATCHES) - 1 else "train"
            yield Item(number_key(key), f"{_BATCHES[batch]}[{number}]", data, meta, problem, split)

    def close(self) -> None:
        for file in self._records:
            file.close()
        if self._scratch is not None:
            self._scratch.close()
            self._scratch, self._records = None, ()

    def _prepare(self) -> None:
        """Find or make the files of records."""
        if self._records:
            return
        missing = next((file for file in self.files() if not file.is_file()), None)
        if missing is not None:
            raise UserError(f"{missing}: this batch is missing; fetch the whole data set")
        try:
            paths = self._unpacked() if self._suffix != _BINARY or self._path.is_file() else self.files()
            counts = tuple(_count(path, self._path) for path in paths)
        except UserError:
            self.close()
            raise
        self._records, self._counts = tuple(LocalFile(path) for path in paths), counts
        if (sum(counts[:-1]), counts[-1]) != _OFFICIAL:
            text = "%s: %d training and %d test pictures, not CIFAR-10's %d and %d"
            _logger.warning(text, self._path, sum(counts[:-1]), counts[-1], *_OFFICIAL)

    def _unpacked(self) -> Sequence[Path]:
        """Make the files of records in a scratch folder; take what a killed process had finished there."""
        states = [(file, file.stat()) for file in self.files()]
        identity = [f"{file.resolve()} {state.st_size} {state.st_mtime_ns}" for file, state in states]
        self._scratch = ScratchFolder("cifar10", *identity)
        made = [self._scratch.path / f"{name}{_BINARY}" for name in _BATCHES]
        if not all(path.is_file() for path in made):
            self._make_records(self._scratch.path)
        return made

    def _make_records(self, folder: Path) -> None:
        missing = list(_BATCHES)
        for name, data in _members(self._path, self._suffix) if self._path.is_file() else self._contents():
            if name in missing:
                missing.remove(name)
                is_binary = self._suffix == _BINARY
                records = data if is_binary else batch_records(data, f"{self._path}: {name}")
                _write(folder / f"{name}{_BINARY}", records)
        if missing:
            raise UserError(f"{self._path}: the batch {missing[0]} is missing in it; fetch it again")

    def _contents(self) -> Iterator[tuple[str, bytes]]:
        for name, file in zip(_BATCHES, self.files(), strict=True):
            try:
                _refuse_large(file.stat().st_size, str(file))
                data = file.read_bytes()
            except OSError as error:
                raise UserError(f"{file}: {read_problem(error)}; make it readable") from error
            yield name, data


def _members(archive: Path, suffix: str) -> Iterator[tuple[str, bytes]]:
    """Iterate (batch, content) of the batches in a tar, compressed or not."""
    wanted = {f"{name}{suffix}": name for name in _BATCHES}
    try:
        with tarfile.open(archive) as opened:
            for member in opened:
                name = wanted.get(PurePosixPath(member.name).name)
                if name is not None and member.isreg():
                    _refuse_large(member.size, f"{archive}: {name}")
                    content = opened.extractfile(member)
                    assert content is not None, "a regular file"
                    yield name, content.read()
    except UserError:
        raise
    except _ARCHIVE_ERRORS as error:
        raise _damaged(archive, error) from error


def _refuse_large(size: int, where: str) -> None:
    if size > _MAX_BATCH_BYTES:
        raise UserError(f"{where}: {size} bytes are too many for a batch of CIFAR-10; fetch it again")


def _write(target: Path, records: bytes) -> None:
    """Write a file of records; under its final name it is complete, even if this process is killed."""
    part = target.with_suffix(".part")
    with naming_full_scratch(target.parent):
        part.write_bytes(records)
    part.replace(target)


def _count(records: Path, given: Path) -> int:
    """How many records a file holds."""
    size = records.stat().st_size
    if size == 0 or size % RECORD:
        raise UserError(
            f"{given}: {records.stem} has {size} bytes, which are no records of {RECORD} each; fetch it again"
        )
    return size // RECORD


class _Tree:
    """Class folders: train/<class>/<picture> and test/<class>/<picture>, below any folder."""

    native_size = None

    def __init__(self, inner: FolderSource | TarSource, path: Path) -> None:
        self._inner, self._path = inner, path
        self.ignored = 0
        found = {_split_and_class(path, place) for place in inner.places()}
        absent = next((folder for folder in _SPLITS if folder not in {split for split, _ in found}), None)
        if absent is not None:
            raise UserError(f"{path}: no pictures in {absent}/<class>/; {_ACCEPTED}")
        names = {name for _, name in found}
        if len(names) > len(CLASSES):
            count = f"{len(names)} classes, not CIFAR-10's {len(CLASSES)}"
            raise UserError(f"{path}: has {count}; use kind folder or tar with --labels for it")
        self.classes = CLASSES if names.issubset(CLASSES) else tuple(sorted(names))

    def places(self) -> Iterator[Place]:
        yield from self._inner.places()
        self.ignored = self._inner.ignored

    def files(self) -> Sequence[Path]:
        return tuple(self._inner.files())

    def describe(self, place: Place) -> str:
        return self._inner.describe(place)

    def read(self, first: int, places: Sequence[Place]) -> Iterator[Item]:
        for place, item in zip(places, self._inner.read(first, places), strict=True):
            split, name = _split_and_class(self._path, place)
            if name not in self.classes:
                raise UserError(f"{self._path}: the class {name} has come up just now; begin again")
            meta = {**item.meta, "label": self.classes.index(name)}
            yield replace(item, meta=meta, split=_SPLITS[split])

    def close(self) -> None:
        self._inner.close()


def _split_and_class(path: Path, place: Place) -> tuple[str, str]:
    """Return the folders "train" or "test" and the class that a picture lies in."""
    name = readable(os.fsencode(place if isinstance(place, str) else place.name))
    split, class_name = PurePosixPath(name).parts[-3:-1] if name.count("/") > 1 else ("", "")
    if split not in _SPLITS:
        raise UserError(
            f"{path}: {name} lies in neither train/<class>/ nor test/<class>/; move it there or away"
        )
    return split, class_name


def _content(path: Path) -> _Batches | _Tree:
    """Tell by its content what a path holds."""
    if path.is_file():
        return _content_of_archive(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such file; {_ACCEPTED}")
    for folder in (path / name for name in _FOLDERS):
        for suffix in ("", _BINARY):
            if any((folder / f"{name}{suffix}").is_file() for name in _BATCHES):
                return _Batches(folder, suffix)
    if any((path / split).is_dir() for split in _SPLITS):
        return _Tree(FolderSource(path), path)
    raise UserError(f"{path}: holds nothing of CIFAR-10; {_ACCEPTED}")


def _content_of_archive(path: Path) -> _Batches | _Tree:
    """Tell by the first member of a tar that is a batch or a picture."""
    batches = {f"{name}{suffix}" for name in _BATCHES for suffix in ("", _BINARY)}
    try:
        with tarfile.open(path) as archive:
            names = (PurePosixPath(member.name) for member in archive)
            telling = next(
                (name for name in names if name.name in batches or has_picture_name(name.name)), None
            )
    except tarfile.ReadError as error:
        raise UserError(f"{path}: no tar, or a damaged one; {_ACCEPTED}") from error
    except _ARCHIVE_ERRORS as error:
        raise _damaged(path, error) from error
    if telling is None:
        raise UserError(f"{path}: holds nothing of CIFAR-10; {_ACCEPTED}")
    if not has_picture_name(telling.name):
        return _Batches(path, telling.suffix)
    inner = TarSource(path)
    try:
        return _Tree(inner, path)
    except UserError:
        inner.close()
        raise


def _damaged(archive: Path, error: BaseException) -> UserError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return UserError(f"{archive}: damaged ({reason}); fetch it again")
