"""A zip archive of pictures, read in place: any layout of folders, or the one StyleGAN and EDM train from."""

import json
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from data_pipeline.errors import UserError
from data_pipeline.sources import Item, Place, Source, number_key
from data_pipeline.sources.pictures import (
    HEAD_BYTES,
    FolderClasses,
    has_picture_name,
    is_hidden,
    looks_like_picture,
    read_problem,
    readable,
    size_problem,
)
from data_pipeline.sources.unpack import LMDB_FILE, LocalFile, archive_path

LABELS_FILE: Final = "dataset.json"
"""Where StyleGAN's and EDM's archives keep their labels."""

_MOST_CLASSES: Final = 1 << 20
_LOCAL_HEADER: Final = struct.Struct("<4s22xHH")
_LOCAL_MAGIC: Final = b"PK\x03\x04"
_LARGEST_OFFSET: Final = 1 << 62
_ENCRYPTED: Final = 1 << 0
_UTF8_NAME: Final = 1 << 11
_HEAD_PACKED: Final = 4096  # deflated bytes that surely give the first HEAD_BYTES


class ZipPlace(NamedTuple):
    """What the central directory says of one member, and the label found for it."""

    name: str
    offset: int
    packed: int
    size: int
    crc: int
    method: int
    flags: int
    label: int | None


class _UnreadableError(ValueError):
    """Why a member cannot be read."""


class ZipSource(Source):
    """All pictures of a zip archive, sorted by the bytes of their names; which ones, as in a folder.

    A name that occurs twice is two pictures. Members that are encrypted, damaged, larger than they claim or
    packed by another method than zip's usual two (stored, deflated) are reported, each by itself.

    Memory: the archive's directory, about 0.3 KB for each picture while the source is open in the process
    that lists it, and about 0.8 KB for each member of any kind while it is being listed. Copies for other
    processes hold none of it.

    Args:
        path: The archive.
        labels: Take labels from `dataset.json` if there is one, else number the top-level folders.

    Raises:
        UserError: No zip archive, one cut short, or labels are wanted and not to be had.
    """

    kind = "zip"

    def __init__(self, path: str | os.PathLike[str], *, labels: bool = False) -> None:
        self._path = archive_path(path, self.kind)
        self.labelled = labels
        self.name = readable(os.fsencode(self._path.stem))
        self._file = LocalFile(self._path)
        self._labels = labels
        self._listing: list[ZipPlace] | None = self._list()

    def places(self) -> Iterator[Place]:
        """Iterate the pictures' entries in the archive's directory."""
        if self._listing is None:
            self._listing = self._list()
        yield from self._listing

    def read(self, first: int, places: Sequence[Place]) -> Iterator[Item]:
        """Read pictures; each key is the running number, each meta the name in the archive."""
        for number, place in enumerate(places, first):
            data, problem = b"", ""
            try:
                data = self._contents(place)
            except _UnreadableError as error:
                problem = str(error)
            except OSError as error:
                problem = read_problem(error)
            where = readable(place.name.encode())
            meta: dict[str, Any] = {"path": where}
            if place.label is not None:
                meta["label"] = place.label
            yield Item(number_key(number), where, data, meta, problem)

    def files(self) -> Sequence[Path]:
        """The archive."""
        return (self._path,)

    def close(self) -> None:
        """Close the archive."""
        self._file.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_listing": None}

    def _list(self) -> list[ZipPlace]:
        self.ignored = 0
        labels_file, found = None, []
        for place in sorted(_members(self._path), key=lambda place: (place.name.encode(), place.offset)):
            if place.name == LABELS_FILE:
                labels_file = place
            elif not is_hidden(place.name):
                if self._is_picture(place):
                    found.append(place)
                else:
                    self.ignored += 1
        if not self._labels:
            return found
        if labels_file is None:
            classes = FolderClasses(place.name for place in found)
            self.classes = classes.names
            return [place._replace(label=classes.label(place.name)) for place in found]
        return self._labelled(found, labels_file)

    def _is_picture(self, place: ZipPlace) -> bool:
        if has_picture_name(place.name):
            return True
        if place.name.rpartition("/")[2] == LMDB_FILE:
            raise UserError(f"{self._path}: holds {LMDB_FILE}, so it looks like LSUN's; use kind lsun")
        try:
            return looks_like_picture(place.name, self._contents(place, HEAD_BYTES))
        except (_UnreadableError, OSError):
            return False

    def _labelled(self, found: list[ZipPlace], labels_file: ZipPlace) -> list[ZipPlace]:
        """Give the pictures the labels of `dataset.json`."""
        try:
            labels = _labels(self._contents(labels_file))
            labelled = [place._replace(label=labels[place.name]) for place in found]
        except KeyError as error:
            name = readable(str(error.args[0]).encode())
            raise UserError(
                f"{self._path}: {LABELS_FILE} has no label for {name}; mend it or build without labels"
            ) from error
        except (_UnreadableError, ValueError, RecursionError) as error:
            raise UserError(
                f"{self._path}: {LABELS_FILE}: {error}; mend it or build without labels"
            ) from error
        self.classes = tuple(str(label) for label in range(max(labels.values(), default=-1) + 1))
        return labelled

    def _contents(self, place: ZipPlace, limit: int | None = None) -> bytes:
        """Inflate and check one member, or without a check its first `limit` bytes."""
        if place.flags & _ENCRYPTED:
            raise _UnreadableError("encrypted")
        if place.method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise _UnreadableError(f"packed by zip's method {place.method}; pack it with deflate")
        problem = size_problem(max(place.size, place.packed))
        if problem:
            raise _UnreadableError(problem)
        if not 0 <= place.offset <= _LARGEST_OFFSET:
            raise _UnreadableError("no member where the archive's directory says")
        header = self._file.read(place.offset, _LOCAL_HEADER.size)
        if len(header) < _LOCAL_HEADER.size or not header.startswith(_LOCAL_MAGIC):
            raise _UnreadableError("no member where the archive's directory says")
        _, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(header)
        start = place.offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
        if limit is not None:
            packed = self._file.read(start, min(place.packed, _HEAD_PACKED))
            return _inflated(place, packed, limit)[:limit]
        return _checked(place, self._file.read(start, place.packed))


def _members(path: Path) -> Iterator[ZipPlace]:
    """Iterate the files that the archive's directory tells of; no folders, links, … among them."""
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: a member's name is marked as UTF-8 and is not; pack it again") from error
    except (zipfile.BadZipFile, NotImplementedError, OSError) as error:
        raise UserError(
            f"{path}: its directory cannot be read ({error}), as if the archive were cut short; "
            "download or pack it again"
        ) from error
    for info in infos:
        if info.is_dir() or stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG):
            continue
        yield ZipPlace(
            _name(info),
            info.header_offset,
            info.compress_size,
            info.file_size,
            info.CRC,
            info.compress_type,
            info.flag_bits,
            None,
        )


def _name(info: zipfile.ZipInfo) -> str:
    """A member's name; many programs write UTF-8 without saying so, for which zip has cp437."""
    if not info.flag_bits & _UTF8_NAME:
        try:
            return info.orig_filename.encode("cp437").decode("utf-8")
        except UnicodeDecodeError:
            pass
    return info.orig_filename


def _inflated(place: ZipPlace, packed: bytes, limit: int) -> bytes:
    """At most `limit` bytes of a member, however much its packed bytes stand for."""
    if place.method == zipfile.ZIP_STORED:
        return packed
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, limit)
    except zlib.error as error:
        raise _UnreadableError(f"damaged: {error}") from error


def _checked(place: ZipPlace, packed: bytes) -> bytes:
    """A whole member, held against the size and the checksum in the archive's directory."""
    if len(packed) < place.packed:
        raise _UnreadableError("the archive ends before it")
    data = _inflated(place, packed, place.size + 1)  # one more shows that it would be larger
    if len(data) != place.size:
        more_or_less = "more" if len(data) > place.size else "less"
        raise _UnreadableError(f"unpacks to {more_or_less} than the {place.size} bytes it claims")
    if zlib.crc32(data) != place.crc:
        raise _UnreadableError("CRC-32 does not match: damaged")
    return data


def _labels(text: bytes) -> dict[str, int]:
    """Read `{"labels": [[name, class number], …]}`.

    Raises:
        ValueError: Something else; the message says what.
    """
    document = json.loads(text)
    rows = document.get("labels") if isinstance(document, dict) else None
    if not rows:
        raise ValueError("holds no labels")
    if not isinstance(rows, list):
        raise ValueError('"labels" is no list of [name, label]')
    labels: dict[str, int] = {}
    for row in rows:
        if not (isinstance(row, list) and len(row) == 2 and isinstance(row[0], str)):
            raise ValueError(f"{_shown(row)} is no [name, label]")
        labels[row[0]] = _class_number(*row)
    return labels


def _class_number(name: str, label: object) -> int:
    """A class number as it stands, or given as a list of zeros with a single one."""
    if isinstance(label, list) and label.count(1) == 1 and label.count(0) == len(label) - 1:
        return label.index(1)
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < _MOST_CLASSES:
        raise ValueError(f"the label {_shown(label)} of {_shown(name)} is no class number")
    return label


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:79]}…"
