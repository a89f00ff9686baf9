"""A tar archive in any storage, walked from front to back: read once, by ranges, and hashed on the way.

Python's `tarfile` parses the headers, whatever their make (USTAR, GNU, PAX). It takes a damaged header
between two members for the end, though, and so shows an archive that lost its tail as a sound, shorter one;
here the walk goes to the mark for the end, and whatever else happens is a `TarDamage` that tells where.
"""

import hashlib
import io
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, Final, NamedTuple

from data_pipeline.storage import Storage

WINDOW: Final = 8 << 20
"""Bytes of one request; two or three times as many are in memory, or the largest member that is asked for."""
_BLOCK: Final = tarfile.BLOCKSIZE
LONGEST_RECORD: Final = 1 << 20
"""Bytes of a long name or a PAX header; real ones have a few KB."""
_COMPRESSED: Final = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
HEADER_ERRORS: Final = (
    tarfile.TarError,
    ValueError,
    IndexError,
    KeyError,
    OverflowError,
    RecursionError,
)
"""What Python's parser raises on damaged headers: its own error where it looked, others where it did not."""


class TarDamage(ValueError):
    """An archive cannot be walked to its end.

    Attributes:
        offset: The byte up to which it could.
    """

    def __init__(self, offset: int, what: str) -> None:
        super().__init__(f"at byte {offset}: {what}")
        self.offset = offset


class TarMember(NamedTuple):
    """A member of an archive.

    Attributes:
        name: As it stands there, bytes that are no UTF-8 escaped by surrogates.
        offset: First byte of its content.
        size: Length of its content.
        plain: A regular file whose content stands there in one piece: no link, device or sparse file.
        folder: A directory.
    """

    name: str
    offset: int
    size: int
    plain: bool
    folder: bool


class StreamedFile(io.RawIOBase):
    """A file of a storage that is read from front to back by ranges, every byte once.

    Args:
        storage: Where it lies.
        name: Its name.
        copy: Gets every byte too.
        window: Bytes of one request.

    Raises:
        FileNotFoundError: There is none.
    """

    def __init__(
        self, storage: Storage, name: str, *, copy: BinaryIO | None = None, window: int = WINDOW
    ) -> None:
        super().__init__()
        self._storage, self._name, self._copy = storage, name, copy
        self.size = storage.size(name)
        self._window_bytes = window
        self._digest = hashlib.sha256()
        self._window, self._start = b"", 0
        self._position = 0

    def read_at(self, start: int, size: int) -> bytes:
        """Return the bytes [start, start + size), fewer at the end of the file.

        Args:
            start: Not before the `start` of the call before.
            size: All of it will be in memory.
        """
        assert start >= self._start, f"{self._name}: byte {start} has passed"
        stop = min(start + size, self.size)
        while self._fetched < min(start, stop):  # what nobody wants is hashed all the same
            self._go_on()
        if self._fetched < stop:
            kept = self._window[start - self._start :]
            fetched = self._fetch(max(stop - self._fetched, self._window_bytes))
            self._window, self._start = kept + fetched, start
        return self._window[start - self._start : stop - self._start]

    def finish(self) -> str:
        """Read what is left; return the SHA-256 of the whole file."""
        while self._fetched < self.size:
            self._go_on()
        return self._digest.hexdigest()

    @property
    def _fetched(self) -> int:
        """Bytes read so far."""
        return self._start + len(self._window)

    def _go_on(self) -> None:
        """Keep nothing of what was read but the next window."""
        start = self._fetched
        self._window, self._start = self._fetch(self._window_bytes), start

    def _fetch(self, size: int) -> bytes:
        data = self._storage.read_range(self._name, self._fetched, min(self._fetched + size, self.size))
        self._digest.update(data)
        if self._copy is not None:
            self._copy.write(data)
        return data

    # What Python's parser asks of a file:

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Go to a byte."""
        assert whence == io.SEEK_SET
        self._position = offset
        return offset

    def tell(self) -> int:
        """Return where the next `read` begins."""
        return self._position

    def read(self, size: int = -1, /) -> bytes:
        """Read a header, or what extends one: no more than those have."""
        if not 0 <= size <= LONGEST_RECORD:
            raise tarfile.ReadError(f"header record of {size} bytes")
        data = self.read_at(self._position, size)
        self._position += len(data)
        return data


def members(file: StreamedFile) -> Iterator[TarMember]:
    """Iterate the members of an archive, to its end.

    The content of a member can be read (`StreamedFile.read_at`) until the next one is asked for.

    Raises:
        TarDamage: It is no archive, cut short, or damaged between two members.
    """
    # Of an empty archive first: its constructor would read members of the real one ahead.
    parser = tarfile.TarFile(
        fileobj=io.BytesIO(bytes(2 * _BLOCK)), encoding="utf-8", errors="surrogateescape"
    )
    parser.fileobj = file
    offset = 0
    while True:
        block = file.read_at(offset, _BLOCK)
        if len(block) < _BLOCK:
            raise TarDamage(offset, "it ends without the mark for it, so it is cut short")
        if not any(block):
            break
        file.seek(offset)
        try:
            found = tarfile.TarInfo.fromtarfile(parser)
        except HEADER_ERRORS as error:
            raise TarDamage(offset, _what_else(block) if offset == 0 else "damaged header") from error
        if parser.offset <= offset or found.size < 0:
            raise TarDamage(offset, "damaged header")
        if parser.offset > file.size:
            raise TarDamage(offset, f"it ends within the member that begins here ({found.size} bytes)")
        plain = found.isreg() and not found.issparse()
        yield TarMember(found.name, found.offset_data, found.size, plain, found.isdir())
        offset = parser.offset
    while rest := file.read_at(offset, LONGEST_RECORD):
        if any(rest):
            raise TarDamage(offset, "it ends, and then goes on: two archives in one file?")
        offset += len(rest)


def _what_else(head: bytes) -> str:
    for magic, name in _COMPRESSED.items():
        if head.startswith(magic):
            return f"compressed by {name}; unpack it to a plain tar"
    return "no tar archive"
