"""The collections that are built from: real photographs in pieces, each file unlike all others."""

import hashlib
import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import lmdb
import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_image

from benchmarks.encodings import photographs

SIZE: Final = 256
"""Side of the pictures in the database, and of those that are built."""
_DISTINCT: Final = 300
_LARGE_DISTINCT: Final = 59  # odd, so that each comes as JPEG and as PNG
_MAP_BYTES: Final = 1 << 40  # the most that the database may grow to
_PNG_HEADER: Final = 33  # signature and IHDR


def write_database(folder: Path, count: int) -> None:
    """Write an LMDB as LSUN's: JPEGs of 256 x 256 under the SHA-1 of their bytes.

    Args:
        folder: Made for it.
        count: Pictures; 300 are distinct to the eye, all are to the byte.
    """
    files = [_file(picture, "JPEG", quality=75) for picture in photographs(min(count, _DISTINCT), SIZE)]
    with (
        lmdb.open(str(folder), map_size=_MAP_BYTES, sync=False) as environment,
        environment.begin(write=True) as transaction,
    ):
        for number in range(count):
            data = _numbered_jpeg(files[number % len(files)], number)
            transaction.put(hashlib.sha1(data, usedforsecurity=False).hexdigest().encode(), data)


def write_large(folder: Path, count: int) -> None:
    """Write picture files of many shapes, all larger than 256 x 256: three JPEGs, then a PNG, and so on."""
    folder.mkdir()
    pieces = list(_pieces(min(count, _LARGE_DISTINCT)))
    png = [_file(piece, "PNG") for piece in pieces]
    jpeg = [_file(piece, "JPEG", quality=90) for piece in pieces]
    for number in range(count):
        which = number % len(pieces)
        if number % 4 == 3:
            (folder / f"{number:06d}.png").write_bytes(_numbered_png(png[which], number))
        else:
            (folder / f"{number:06d}.jpg").write_bytes(_numbered_jpeg(jpeg[which], number))


def _pieces(count: int) -> Iterator[Image.Image]:
    """Random rectangles of the photographs, as they are."""
    generator = np.random.default_rng(1)
    whole = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    for number in range(count):
        photograph = whole[number % len(whole)]
        width = int(generator.integers(SIZE + 32, photograph.width + 1))
        height = int(generator.integers(SIZE + 32, photograph.height + 1))
        left = int(generator.integers(photograph.width - width + 1))
        top = int(generator.integers(photograph.height - height + 1))
        yield photograph.crop((left, top, left + width, top + height))


def _file(picture: Image.Image, form: str, quality: int = 75) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, quality=quality)
    return buffer.getvalue()


def _numbered_jpeg(data: bytes, number: int) -> bytes:
    """The same picture with a comment segment."""
    comment = b"%09d" % number
    return b"".join((data[:2], b"\xff\xfe", struct.pack(">H", len(comment) + 2), comment, data[2:]))


def _numbered_png(data: bytes, number: int) -> bytes:
    """The same picture with a text chunk."""
    chunk = b"tEXtComment\0%09d" % number
    text = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return data[:_PNG_HEADER] + text + data[_PNG_HEADER:]
