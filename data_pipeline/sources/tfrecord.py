"""TFRecord files without TensorFlow: their frames, the protobuf messages in them, and the pictures in those.

A frame is the length of its data (uint64), the length's checksum, the data and the data's checksum, all
little-endian. A checksum is a CRC32C, rotated right by 15 bits and increased by a constant. The data is a
`tf.train.Example`: features by name, each a list of byte strings, floats or int64.
"""

import itertools
import math
import os
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, TypeVar

import google_crc32c
import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.sources import Item, Place, Source, number_key
from data_pipeline.sources.netpbm import netpbm
from data_pipeline.sources.pictures import read_problem, readable

_HEAD: Final = struct.Struct("<QI")
_CHECKSUM: Final = struct.Struct("<I")
_MASK: Final = 0xA282EAD8
_GZIP_MAGIC: Final = b"\x1f\x8b"
_MAX_RECORD_BYTES: Final = 512 << 20
_MAX_FEATURES: Final = 4096
_MAX_NAME_BYTES: Final = 4096

_NAME: Final = re.compile(
    r"(?P<stem>.*?)(?:-r(?P<level>\d\d))?(?:-s-(?P<shard>\d{4,9})-of-(?P<shards>\d{4,9}))?"
    r"\.tfrecords?(?:-(?P<part>\d{5,9})-of-(?P<parts>\d{5,9}))?"
)
_SPLITS: Final = {"train": "train", "validation": "val", "valid": "val", "val": "val", "test": "val"}
_USUAL_SIZE: Final = 256

_Value = TypeVar("_Value")


class TfRecordSource(Source):
    """Pictures in TFRecord files as PGGAN's, StyleGAN's and Glow's tools and TensorFlow Datasets write them.

    A record holds raw pixels (`data`, and their `shape`: [C, H, W], in Glow's files [H, W, C]) or a picture
    file (`image` or `image/encoded`). `label`, unless it is below 0, and `image/filename` are kept as meta
    data. To find the places only the frames' lengths are read; every checksum is verified.

    Of several resolutions side by side (`…-rNN.tfrecords` holds squares of 2^NN) one is taken. Shards
    (`…-s-NNNN-of-MMMM.tfrecords`, `….tfrecord-NNNNN-of-MMMMM`) must be complete. If every file tells by its
    name or folder that it is train, validation or test, and not all are train, that is the split; test
    counts as validation.

    Args:
        paths: A file, a folder (its sub-folders included), or several files.
        size: Which resolution, if there are several. None: 256.

    Raises:
        UserError: No such file, none in the folder, a missing shard, no such resolution, or a first file
            that is none of this kind.
    """

    kind = "tfrecord"

    def __init__(
        self, paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], *, size: int | None = None
    ) -> None:
        several = (paths,) if isinstance(paths, str | os.PathLike) else paths
        given = [Path(path).expanduser() for path in several]
        assert given, "no paths"
        found = [file for path in given for file in _files_of(path)]
        self._files = _of_one_resolution(given[0], sorted(found, key=lambda file: file.where), size)
        _refuse_incomplete(self._files)
        self.name = given[0].resolve().name.partition(".tfrecord")[0] or "tfrecord"
        self.native_size = self._files[0].size
        self._has_splits = {file.split for file in self._files} == {"train", "val"}
        if self._has_splits:
            self.default_val_fraction = None
        first = next(self.places(), None)
        if first is not None and next(self.read(0, [first])).data.startswith(b"P5"):
            self.default_channels = 1

    def places(self) -> Iterator[Place]:
        """Iterate (file number, offset of the frame, length of its data).

        Raises:
            UserError: A file cannot be read, is cut short, has damaged lengths, or is none of this kind.
        """
        for number, file in enumerate(self._files):
            for offset, length in frames(file.path):
                yield number, offset, length

    def read(self, first: int, places: Sequence[Place]) -> Iterator[Item]:
        """Give raw pixels as PGM or PPM files, picture files as they are."""
        for number, run in itertools.groupby(enumerate(places, first), key=lambda pair: pair[1][0]):
            file = self._files[number]
            split = file.split if self._has_splits else None
            try:
                opened = file.path.open("rb")
            except OSError as error:
                for key, (_, offset, _) in run:
                    where, problem = f"{file.where}@{offset}", read_problem(error)
                    yield Item(number_key(key), where, b"", problem=problem, split=split)
                continue
            with opened:
                for key, (_, offset, length) in run:
                    yield _item(number_key(key), f"{file.where}@{offset}", opened, offset, length, split)

    def files(self) -> tuple[Path, ...]:
        """The files of the chosen resolution."""
        return tuple(file.path for file in self._files)


def frames(path: Path) -> Iterator[tuple[int, int]]:
    """Hop over the frames of a file: iterate (offset of the frame, length of its data).

    Raises:
        UserError: The file cannot be read, is cut short, has a damaged length, or is no TFRecord file.
    """
    offset = 0
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            while offset < size:
                head = os.pread(file.fileno(), _HEAD.size, offset)
                length, checksum = _HEAD.unpack(head) if len(head) == _HEAD.size else (size, None)
                if checksum is not None and _masked_crc(head[:8]) != checksum:
                    raise UserError(_not_a_frame(path, offset, head))
                end = offset + _HEAD.size + length + _CHECKSUM.size
                if end > size:
                    raise UserError(
                        f"{path}: the record at byte {offset} is cut short, the file has {size} bytes; "
                        "fetch it again"
                    )
                yield offset, length
                offset = end
    except OSError as error:
        raise UserError(f"{path}: cannot be read at byte {offset} ({error.strerror})") from error


def is_tfrecord(path: Path) -> bool:
    """Tell whether a file's first bytes are a frame's length and its checksum."""
    with path.open("rb") as file:
        head = file.read(_HEAD.size)
    return len(head) == _HEAD.size and _masked_crc(head[:8]) == _HEAD.unpack(head)[1]


def _not_a_frame(path: Path, offset: int, head: bytes) -> str:
    if offset:
        return f"{path}: the record at byte {offset} has a damaged length; fetch the file again"
    if head.startswith(_GZIP_MAGIC):
        return f"{path}: is compressed; unpack it with gunzip first"
    return f"{path}: is no TFRecord file, or damaged at its beginning; fetch it again"


def read_frame(file: IO[bytes], offset: int, length: int) -> bytes:
    """Read and check the data of one frame.

    Raises:
        OSError: The file cannot be read.
        ValueError: Not the data that was written, or too much of it; the message is the reason.
    """
    if length > _MAX_RECORD_BYTES:
        raise ValueError(f"{length} bytes are more than the limit of {_MAX_RECORD_BYTES}")
    file.seek(offset)
    frame = file.read(_HEAD.size + length + _CHECKSUM.size)
    if len(frame) != _HEAD.size + length + _CHECKSUM.size or frame[:8] != struct.pack("<Q", length):
        raise ValueError("the file has changed since it was listed")
    data = frame[_HEAD.size : -_CHECKSUM.size]
    if _masked_crc(data) != _CHECKSUM.unpack(frame[-_CHECKSUM.size :])[0]:
        raise ValueError("checksum mismatch")
    return data


def _masked_crc(data: bytes) -> int:
    crc = int(google_crc32c.value(data))
    return ((crc >> 15 | crc << 17) + _MASK) & 0xFFFFFFFF


def parse_example(record: bytes) -> dict[str, memoryview]:
    """Return the features of a serialised `tf.train.Example` by name, each still a serialised message.

    Raises:
        ValueError: No such message.
    """
    found: dict[str, memoryview] = {}
    entries = (entry for features in _messages(memoryview(record), 1) for entry in _messages(features, 1))
    for number, entry in enumerate(entries):
        if number >= _MAX_FEATURES:
            raise ValueError(f"more than {_MAX_FEATURES} features")
        key = value = memoryview(b"")
        for field, content in _fields(entry):
            if isinstance(content, memoryview):
                key, value = (content if field == 1 else key), (content if field == 2 else value)
        found[readable(bytes(key))] = value
    return found


def byte_values(feature: memoryview) -> Iterator[memoryview]:
    """Iterate the byte strings of a feature; none if it is of another type."""
    for values in _messages(feature, 1):
        yield from _messages(values, 1)


def int_values(feature: memoryview) -> Iterator[int]:
    """Iterate the int64 values of a feature, written packed or one by one; none if it is of another type."""
    for values in _messages(feature, 3):
        for field, content in _fields(values):
            if field != 1:
                continue
            if isinstance(content, int):
                yield _signed(content)
                continue
            at = 0
            while at < len(content):
                value, at = _varint(content, at)
                yield _signed(value)


def _messages(message: memoryview, number: int) -> Iterator[memoryview]:
    """Iterate the length-delimited fields of that number."""
    for field, content in _fields(message):
        if field == number and isinstance(content, memoryview):
            yield content


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Iterate (number, content) of the varint and length-delimited fields; those of fixed width are skipped.

    Raises:
        ValueError: Not in protobuf's wire format.
    """
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        field, wire_type = tag >> 3, tag & 7
        if field == 0 or wire_type not in (0, 1, 2, 5):
            raise ValueError(f"no protobuf message (field {field} of wire type {wire_type})")
        if wire_type == 0:
            value, at = _varint(message, at)
            yield field, value
            continue
        size, at = _varint(message, at) if wire_type == 2 else (8 if wire_type == 1 else 4, at)
        if size > len(message) - at:
            raise ValueError(f"no protobuf message (field {field} ends beyond it)")
        if wire_type == 2:
            yield field, message[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """Read an unsigned number of 7 bits per byte; return it and where the next field begins."""
    value = 0
    for shift, byte in zip(range(0, 70, 7), data[at : at + 10], strict=False):
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >> 64:
                break
            return value, at + shift // 7 + 1
    raise ValueError("no protobuf message (number of more than 64 bits, or cut short)")


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _item(key: str, where: str, file: IO[bytes], offset: int, length: int, split: str | None) -> Item:
    """Read one record; whatever is wrong with it becomes the item's problem."""
    data, meta, problem = b"", dict[str, Any](), ""
    try:
        features = parse_example(read_frame(file, offset, length))
        if "image/filename" in features:
            name = _only(byte_values(features["image/filename"]), "image/filename")
            where = meta["path"] = readable(bytes(name[:_MAX_NAME_BYTES]))
        if "label" in features:
            label = _only(int_values(features["label"]), "label")
            if label >= 0:
                meta["label"] = label
        data = _picture_file(features)
    except OSError as error:
        problem = read_problem(error)
    except ValueError as error:
        problem = f"damaged record: {error}"
    return Item(key, where, data, meta, problem, split)


def _picture_file(features: dict[str, memoryview]) -> bytes:
    if "data" in features and "shape" in features:
        shape = tuple(itertools.islice(int_values(features["shape"]), 4))
        data = _only(byte_values(features["data"]), "data")
        if len(shape) != 3 or min(shape) < 1 or math.prod(shape) != len(data):
            raise ValueError(f"{len(data)} bytes of pixels do not fit the shape {list(shape)}")
        return netpbm(np.frombuffer(data, np.uint8).reshape(shape))
    for name in ("image", "image/encoded"):
        if name in features:
            return bytes(_only(byte_values(features[name]), name))
    there = ", ".join(itertools.islice(features, 8)) or "none"
    raise ValueError(f"neither data and shape nor image nor image/encoded among its features ({there})")


def _only(values: Iterator[_Value], name: str) -> _Value:
    found = list(itertools.islice(values, 2))
    if len(found) != 1:
        count = "several values" if found else "no value"
        raise ValueError(f"feature {name!r} has {count} of its type, not one")
    return found[0]


@dataclass(frozen=True)
class _File:
    """One file and what its name tells; `family` is the name around the shard's number."""

    path: Path
    where: str
    size: int | None
    split: str | None
    family: tuple[str, str] = ("", "")
    shard: str = ""
    shards: int = 0


def _files_of(path: Path) -> Iterator[_File]:
    """Iterate the TFRecord files that a path given by the user stands for."""
    if path.is_file():
        yield _file(path, Path(path.name))
        return
    if not path.is_dir():
        raise UserError(f"{path}: no such file; name TFRecord files or their folder")
    count = 0
    for folder, folders, names in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if _NAME.fullmatch(name) and not name.startswith("."):
                count += 1
                yield _file(Path(folder, name), Path(folder, name).relative_to(path))
    if not count:
        raise UserError(f"{path}: no .tfrecords files in it; name the folder that holds them")


def _file(path: Path, shown: Path) -> _File:
    where = readable(os.fsencode(shown))
    match = _NAME.fullmatch(path.name)
    if match is None:
        return _File(path, where, None, None)
    words = [*re.split(r"[-_.]", match["stem"]), *reversed(shown.parts[:-1])]
    split = next((_SPLITS[word] for word in words if word in _SPLITS), None)
    size = None if match["level"] is None else 2 ** int(match["level"])
    number = "shard" if match["shard"] is not None else "part"
    if match[number] is None:
        return _File(path, where, size, split)
    start, stop = match.span(number)
    family = path.name[:start], path.name[stop:]
    return _File(path, where, size, split, family, match[number], int(match[f"{number}s"]))


def _of_one_resolution(given: Path, files: list[_File], size: int | None) -> list[_File]:
    """Take the files of the wanted resolution, or all if there is only one."""
    sizes = {file.size for file in files}
    if len(sizes) == 1:
        return files
    there = ", ".join(str(found) for found in sorted(found or 0 for found in sizes))
    if None in sizes:
        raise UserError(f"{given}: has files with and without -rNN in their names; name those of one kind")
    wanted = _USUAL_SIZE if size is None else size
    if wanted not in sizes:
        raise UserError(
            f"{given}: has pictures of {there} pixels, none of {wanted}; give --size one of these, "
            "or name a single file to resize it"
        )
    return [file for file in files if file.size == wanted]


def _refuse_incomplete(files: Sequence[_File]) -> None:
    """Check that of every family of shards all are there."""
    families: dict[tuple[Path, tuple[str, str]], list[_File]] = {}
    for file in files:
        if file.shards:
            families.setdefault((file.path.parent, file.family), []).append(file)
    for (folder, (head, tail)), members in families.items():
        present = {int(file.shard) for file in members}
        missing = next((number for number in range(members[0].shards) if number not in present), None)
        if missing is not None:
            name = f"{head}{missing:0{len(members[0].shard)}d}{tail}"
            raise UserError(
                f"{folder / name}: this shard is missing, {len(present)} of {members[0].shards} are there; "
                "fetch it, or name the whole folder"
            )
