"""Zip and tar archives for tests: sound ones of every make, and hostile ones written byte by byte."""

import io
import struct
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from data_pipeline.sources import Source

LIMIT = 256 << 20


def picture(colour: int = 0, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (4, 4), colour).save(buffer, form)
    return buffer.getvalue()


def files_in(scratch: Path) -> list[Path]:
    return sorted(path for path in scratch.rglob("*") if path.is_file() and path.suffix != ".lock")


def contents(source: Source) -> dict[str, bytes]:
    items = list(source)
    assert [item.key for item in items] == [f"{number:09d}" for number in range(len(items))]
    assert not any(item.problem for item in items)
    assert all(item.meta["path"] == item.where for item in items)
    return {item.where: item.data for item in items}


SOUND = {
    "a/é long name " + "x" * 120 + ".png": picture(1),
    "a/b.c/GIF called.jpg": picture(2, "GIF"),
    "broken.JPEG": b"not a picture",
    "no-suffix": picture(3, "JPEG"),
    "zero.png": b"",
}
LEFT_OUT = {
    "readme.txt": b"hello",
    "features.npy": b"\x93NUMPY\x01\x00 and so on",
    ".hidden.png": picture(4),
    "a/.cache/x.png": picture(5),
    "__MACOSX/a/._b.png": b"\x00\x05\x16\x07",
}


@dataclass
class Member:
    """One member of a zip; what is None is as it should be."""

    name: bytes
    data: bytes = b""
    packed: bytes | None = None
    method: int = 0
    flags: int = 0
    size: int | None = None
    packed_size: int | None = None
    crc: int | None = None
    mode: int = 0
    offset: int | None = None


def write_zip(path: Path, *members: Member) -> Path:
    """APPNOTE.TXT 4.3.7, 4.3.12 and 4.3.16, without zip64."""
    body, directory = b"", b""
    for member in members:
        packed = member.data if member.packed is None else member.packed
        common = struct.pack(
            "<HHHHHLLLHH",
            20,
            member.flags,
            member.method,
            0,
            (1 << 5) | 1,
            zlib.crc32(member.data) if member.crc is None else member.crc,
            len(packed) if member.packed_size is None else member.packed_size,
            len(member.data) if member.size is None else member.size,
            len(member.name),
            0,
        )
        offset = len(body) if member.offset is None else member.offset
        directory += b"PK\1\2" + struct.pack("<H", 0x031E) + common
        directory += struct.pack("<HHHLL", 0, 0, 0, member.mode << 16, offset) + member.name
        body += b"PK\3\4" + common + member.name + packed
    end = struct.pack("<HHHHLLH", 0, 0, len(members), len(members), len(directory), len(body), 0)
    path.write_bytes(body + directory + b"PK\5\6" + end)
    return path


def write_tar(path: Path, files: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_zip_of(path: Path, files: dict[str, bytes]) -> Path:
    return write_zip(path, *(Member(name.encode(), data) for name, data in files.items()))
