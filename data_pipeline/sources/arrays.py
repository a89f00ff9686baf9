"""Pictures in NumPy's own files: one array (`.npy`, `.npz`), or a folder of `.npy`, one for each picture."""

import contextlib
import io
import logging
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, BinaryIO, Final, cast

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.scratch import ScratchFolder
from data_pipeline.sources import Item, Place, Source, npy, number_key
from data_pipeline.sources.netpbm import netpbm, picture_shape
from data_pipeline.sources.pictures import readable
from data_pipeline.sources.unpack import unpack

_logger = logging.getLogger(__name__)

_ZIP_MAGIC: Final = b"PK\x03\x04"
_PICTURE_NAMES: Final = ("arr_0", "images", "x_train", "data")
_LABEL_NAMES: Final = ("arr_1", "labels", "y")
# What zipfile raises on damaged, encrypted or strangely packed members.
_ARCHIVE_ERRORS: Final = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError)


class ArraySource(Source):
    """Pictures of one size in an array, or an array for every picture.

    An `.npy` is memory-mapped. Of an `.npz` the pictures (the only uint8 array of 3 or 4 dimensions, or the
    one named arr_0, images, x_train or data) and, if asked for, the labels (the only integer array of one
    number per picture, or arr_1, labels or y) are unpacked once to a local folder, which `close` removes.
    Arrays are uint8 [N, H, W], [N, H, W, C] or [N, C, H, W] of 1 or 3 channels. In a folder, each `.npy`
    directly in it is one picture: the same without N, or with an N of 1. Its listing is held in memory
    while it is sorted, about 100 bytes for each name.

    Args:
        path: The `.npy` or `.npz` file, or the folder.
        labels: Keep the `.npz`'s labels in the meta data.

    Raises:
        UserError: No such file, none of these kinds, another dtype, a shape of no pictures or of several
            meanings, several arrays to choose from, no labels though asked for, or damaged.
    """

    kind = "npz"

    def __init__(self, path: str | os.PathLike[str], *, labels: bool = False) -> None:
        place = Path(path).expanduser()
        self.labelled = labels
        if place.is_dir():
            if labels:
                raise UserError(f"{place}: a folder of .npy files tells no labels; save all in one .npz")
            self._content: _Stack | _Folder = _Folder(place)
        elif place.is_file():
            self._content = _Stack(place, labels)
        else:
            raise UserError(f"{place}: no such file; name an .npy, an .npz or a folder of .npy files")
        stem = place.resolve().name.removesuffix(".npz").removesuffix(".npy")
        self.name = readable(os.fsencode(stem))
        self.native_size = self._content.native_size
        self.default_channels = self._content.channels

    def places(self) -> Iterator[Place]:
        """Iterate the pictures' numbers, or their files' names in byte order."""
        yield from self._content.places()
        self.ignored = self._content.ignored

    def read(self, first: int, places: Sequence[Place]) -> Iterator[Item]:
        """Give pictures as PGM or PPM files."""
        return self._content.read(first, places)

    def files(self) -> tuple[Path, ...]:
        """The file; none if it is a folder."""
        return self._content.files()

    def describe(self, place: Place) -> str:
        """The number; of a file its name, size and time."""
        return self._content.describe(place)

    def close(self) -> None:
        """Remove what was unpacked."""
        self._content.close()


class _Stack:
    """One array of all pictures."""

    ignored = 0

    def __init__(self, path: Path, labels: bool) -> None:
        self._path = path
        self._scratch: ScratchFolder | None = None
        self._members: tuple[zipfile.ZipInfo, ...] = ()
        """What of an `.npz` is to be unpacked: the pictures, and the labels if wanted."""
        self._unpacked: Path | None = None
        """Where they lie then, one after the other; None: not yet."""
        with _legible(path), path.open("rb") as file:
            head = file.read(len(npy.MAGIC))
            if head.startswith(_ZIP_MAGIC):
                self._members, self._headers = _choose(path, labels)
            elif head == npy.MAGIC:
                self._unpacked, self._headers = path, (_plain_header(path, file, labels),)
            else:
                raise UserError(f"{path}: neither an .npy nor an .npz; name a file that numpy.save wrote")
        height, width, self.channels = _stack_shape(path, self._headers[0].shape)
        self.native_size = height if height == width else None

    def __getstate__(self) -> dict[str, Any]:
        self._prepare()  # the copy in another process finds everything unpacked, and leaves it alone
        return {**self.__dict__, "_scratch": None}

    def places(self) -> Iterator[int]:
        yield from range(self._headers[0].shape[0])

    def files(self) -> tuple[Path, ...]:
        return (self._path,)

    def describe(self, place: Place) -> str:
        return repr(place)

    def read(self, first: int, places: Sequence[int]) -> Iterator[Item]:
        self._prepare()
        maps, problem = [], ""
        try:
            maps = self._maps()
        except (OSError, ValueError) as error:
            problem = f"cannot be read: {npy.reason(error)}"
        name = readable(os.fsencode(self._path.name))
        for number, place in enumerate(places, first):
            where = f"{name}[{place}]"
            if maps:
                meta = {"label": int(maps[1][place])} if len(maps) > 1 else {}
                yield Item(number_key(number), where, netpbm(np.asarray(maps[0][place])), meta)
            else:
                yield Item(number_key(number), where, b"", problem=problem)

    def close(self) -> None:
        if self._scratch is not None:
            self._scratch.close()
            self._scratch = self._unpacked = None

    def _maps(self) -> list[np.memmap[Any, Any]]:
        """Map the pictures, and the labels if wanted; mapped anew for every run, what was read goes again."""
        path, offset, maps = self._prepare(), 0, []
        for header in self._headers:
            maps.append(npy.map_values(path, header, offset))
            offset += header.file_bytes
        return maps

    def _prepare(self) -> Path:
        """Return the file with the arrays one after the other; unpack them unless that has been done."""
        if self._unpacked is None:
            name = "pictures-labels.npy" if len(self._members) > 1 else "pictures.npy"
            self._scratch, self._unpacked = unpack(self._path, self._open_members, name)
            try:
                self._check_unpacked(self._unpacked)
            except UserError:
                self.close()
                raise
        return self._unpacked

    def _open_members(self, packed: BinaryIO) -> IO[bytes]:
        return cast(IO[bytes], _Chained(packed, self._members))

    def _check_unpacked(self, path: Path) -> None:
        if path.stat().st_size != sum(header.file_bytes for header in self._headers):
            raise UserError(f"{self._path}: holds less than its headers say; fetch or save it again")
        if self._headers[0].shape[0] and any(labels.min() < 0 for labels in self._maps()[1:]):
            raise UserError(f"{self._path}: has labels below 0; number the classes from 0")


class _Folder:
    """One array for every picture."""

    native_size = None

    def __init__(self, root: Path) -> None:
        self._root = root
        self.ignored = 0
        """Entries of the last complete pass that are no `.npy` files."""
        first = next(self.places(), None)
        if first is None:
            raise UserError(f"{root}: no .npy file directly in it; name the folder that holds them")
        path = root / first
        with _legible(path), path.open("rb") as file:
            header = npy.read_header(file)
            if header.dtype != np.uint8:
                raise UserError(f"{path}: values are {header.dtype}, not uint8; {npy.REMEDY}")
            try:
                self.channels = picture_shape(npy.single_shape(header.shape)).channels
            except ValueError as error:
                remedy = "each file is to be one picture; name a file of many itself"
                raise UserError(f"{path}: {error}; {remedy}") from error

    def places(self) -> Iterator[str]:
        with _legible(self._root), os.scandir(self._root) as listing:
            entries = [
                (os.fsencode(entry.name), entry.name.endswith(".npy") and entry.is_file())
                for entry in listing
                if not entry.name.startswith(".")
            ]
        entries.sort()
        for name, is_picture in entries:
            if is_picture:
                yield os.fsdecode(name)
        self.ignored = sum(not is_picture for _, is_picture in entries)

    def files(self) -> tuple[Path, ...]:
        return ()

    def describe(self, place: str) -> str:
        with contextlib.suppress(FileNotFoundError):
            status = (self._root / place).stat()
            return f"{place!r} {status.st_size} {status.st_mtime_ns}"
        return repr(place)

    def read(self, first: int, places: Sequence[str]) -> Iterator[Item]:
        for number, name in enumerate(places, first):
            where = readable(os.fsencode(name))
            data, problem = b"", ""
            try:
                with (self._root / name).open("rb") as file:
                    data = netpbm(npy.read_single(file))
            except (OSError, ValueError) as error:
                problem = f"cannot be read: {npy.reason(error)}"
            yield Item(number_key(number), where, data, {"path": where}, problem)

    def close(self) -> None:
        """Nothing is held."""


def _plain_header(path: Path, file: IO[bytes], labels: bool) -> npy.Header:
    """Read and check the header of an `.npy` with all pictures."""
    if labels:
        raise UserError(f"{path}: an .npy holds no labels; save pictures and labels in one .npz")
    file.seek(0)
    header = npy.read_header(file)
    if header.dtype != np.uint8:
        raise UserError(f"{path}: values are {header.dtype}, not uint8; {npy.REMEDY}")
    size = path.stat().st_size
    if size < header.file_bytes:
        raise UserError(f"{path}: has {size} of {header.file_bytes} bytes; fetch or save it again")
    return header


def _stack_shape(path: Path, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return height, width and channels of the pictures in an array of that shape."""
    try:
        if len(shape) not in (3, 4):
            raise ValueError(f"shape {list(shape)} is not [N, H, W], [N, H, W, C] or [N, C, H, W]")
        if len(shape) == 3 and (shape[0] == 3 or shape[2] in (1, 3)):
            raise ValueError(f"shape {list(shape)} is one picture or several in grey, which cannot be told")
        found = picture_shape(shape[1:])
    except ValueError as error:
        raise UserError(f"{path}: {error}; save it as [N, H, W, 3] or, if grey, [N, H, W, 1]") from error
    return found.height, found.width, found.channels


def _choose(path: Path, labels: bool) -> tuple[tuple[zipfile.ZipInfo, ...], tuple[npy.Header, ...]]:
    """Find the pictures and, if wanted, the labels among an `.npz`'s arrays."""
    members: dict[str, zipfile.ZipInfo] = {}
    headers: dict[str, npy.Header] = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.filename.endswith(".npy"):
                name = member.filename.removesuffix(".npy")
                with archive.open(member) as file:
                    members[name], headers[name] = member, npy.read_header(file)
    there = "; ".join(f"{name!r} {header}" for name, header in list(headers.items())[:8]) or "nothing"
    pictures = _pick(
        path,
        [name for name, header in headers.items() if _is_uint8_stack(header)],
        _PICTURE_NAMES,
        f"no uint8 array of pictures in it, only {there}; {npy.REMEDY}",
    )
    chosen = [pictures]
    if labels:
        count = headers[pictures].shape[0]
        fitting = [
            name for name, header in headers.items() if header.dtype.kind in "iu" and header.shape == (count,)
        ]
        remedy = "save one class number per picture under the name 'labels'"
        complaint = f"no integer array of {count} labels in it, only {there}; {remedy}"
        chosen.append(_pick(path, fitting, _LABEL_NAMES, complaint))
    for name in chosen:
        if members[name].file_size != headers[name].file_bytes:
            raise zipfile.BadZipFile(f"{name!r} has {members[name].file_size} bytes for {headers[name]}")
    return tuple(members[name] for name in chosen), tuple(headers[name] for name in chosen)


def _is_uint8_stack(header: npy.Header) -> bool:
    return header.dtype == np.uint8 and len(header.shape) in (3, 4)


def _pick(path: Path, fitting: list[str], usual: tuple[str, ...], complaint: str) -> str:
    """Choose the one array that fits, or of several the one with a usual name."""
    if not fitting:
        raise UserError(f"{path}: {complaint}")
    if len(fitting) == 1:
        return fitting[0]
    several = ", ".join(repr(name) for name in fitting[:8])
    chosen = next((name for name in usual if name in fitting), None)
    if chosen is None:
        raise UserError(f"{path}: any of {several} could be meant; name the right one {usual[1]!r}")
    _logger.warning("%s: of %s takes %r alone", path, several, chosen)
    return chosen


class _Chained(io.RawIOBase):
    """Members of an archive, one after the other; the archive's checksums are verified on the way."""

    def __init__(self, packed: BinaryIO, members: Sequence[zipfile.ZipInfo]) -> None:
        archive = zipfile.ZipFile(packed)
        self._streams: list[Any] = [archive.open(member) for member in members]

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while self._streams:
            count = int(self._streams[0].readinto(buffer))
            if count:
                return count
            self._streams.pop(0).close()
        return 0


@contextlib.contextmanager
def _legible(path: Path) -> Iterator[None]:
    """Turn what a damaged or forbidden file raises while it is looked into to one line for the user."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({npy.reason(error)}); make it readable") from error
    except (ValueError, *_ARCHIVE_ERRORS) as error:
        raise UserError(f"{path}: damaged ({npy.reason(error)}); fetch or save it again") from error
