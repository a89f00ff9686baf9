"""The bytes of a shard: USTAR headers with fixed times and owners, so equal samples give equal bytes.

Python's `tarfile` writes the same bytes; it takes ten times as long for a header as hashing a picture.
"""

import struct
import tarfile
from typing import Final

BLOCK: Final = tarfile.BLOCKSIZE
_NAME: Final = 100
"""Bytes of the field that comes first."""


def _template() -> bytes:
    info = tarfile.TarInfo("")  # mtime, uid and gid are 0, owners empty
    info.mode = 0o644
    return info.tobuf(tarfile.USTAR_FORMAT)


# What stands before the size, between size and checksum, and after it.
_BEFORE, _BETWEEN, _AFTER = _template()[_NAME:124], _template()[135:148], _template()[156:]
_FIELDS: Final = struct.Struct("100s24s11s13s8s356s")
_CONSTANT_SUM: Final = sum(_BEFORE) + sum(_BETWEEN) + sum(_AFTER) + 8 * ord(" ")
"""Of a header without name and size; the checksum's own field counts as spaces."""


def header(name: str, size: int) -> bytes:
    """Return the header of a regular file.

    Args:
        name: ASCII, at most 100 characters.
        size: Bytes of its content, below 8 GiB.

    Returns:
        512 bytes.
    """
    encoded, digits = name.encode("ascii"), b"%011o" % size
    assert len(encoded) <= _NAME, name
    assert len(digits) == 11, f"{name}: {size}"
    checksum = b"%06o\0 " % (_CONSTANT_SUM + sum(encoded) + sum(digits))
    return _FIELDS.pack(encoded, _BEFORE, digits, _BETWEEN, checksum, _AFTER)


def padding(size: int) -> bytes:
    """Return the zeros that follow a content of that size."""
    return bytes(-size % BLOCK)


def capacity(limit: int) -> int:
    """Return how many bytes of members a finished tar of at most `limit` bytes can hold."""
    return limit // tarfile.RECORDSIZE * tarfile.RECORDSIZE - 2 * BLOCK


def ending(size: int) -> bytes:
    """Return what closes a tar with that many bytes of members."""
    end = size + 2 * BLOCK
    return bytes(2 * BLOCK + -end % tarfile.RECORDSIZE)
