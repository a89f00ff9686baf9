"""A tar archive of pictures, read in place; a compressed one is unpacked to a local disk first."""

import bz2
import gzip
import io
import lzma
import os
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, BinaryIO, Final, NamedTuple, cast

from data_pipeline.errors import UserError
from data_pipeline.scratch import ScratchFolder
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
from data_pipeline.sources.unpack import LocalFile, Opener, archive_path, unpack
from data_pipeline.tars.walk import HEADER_ERRORS, LONGEST_RECORD

_BLOCK: Final = tarfile.BLOCKSIZE
_SUFFIXES: Final = (".gz", ".bz2", ".xz", ".tgz", ".tbz2", ".tbz", ".txz", ".tar")
_ZSTD_MAGIC: Final = b"\x28\xb5\x2f\xfd"


def _open_gzip(file: BinaryIO) -> IO[bytes]:
    return cast(IO[bytes], gzip.GzipFile(fileobj=file))


def _open_bz2(file: BinaryIO) -> IO[bytes]:
    return cast(IO[bytes], bz2.BZ2File(file))


def _open_xz(file: BinaryIO) -> IO[bytes]:
    return cast(IO[bytes], lzma.LZMAFile(file))


_COMPRESSIONS: Final[tuple[tuple[bytes, Opener], ...]] = (
    (b"\x1f\x8b", _open_gzip),
    (b"BZh", _open_bz2),
    (b"\xfd7zXZ\x00", _open_xz),
)


class TarPlace(NamedTuple):
    """A member and where its bytes lie."""

    name: str
    offset: int
    size: int


class TarSource(Source):
    """All pictures of a tar archive, in its order; which ones, as in a folder.

    Only regular files take part; links, devices and sparse files are counted as ignored. Listing is one pass
    over the headers. An archive that is cut short or damaged between two members is refused: nobody could
    tell how many pictures are missing.

    Args:
        path: The archive, plain or compressed by gzip, bzip2 or xz (told by its first bytes).
        labels: Number the top-level folders in the order of their names (takes a pass over the headers).

    Raises:
        UserError: No tar archive, no disk to unpack it, or labels are wanted and a picture lies in no folder.
    """

    kind = "tar"

    def __init__(self, path: str | os.PathLike[str], *, labels: bool = False) -> None:
        self._path = archive_path(path, self.kind)
        self.labelled = labels
        self.name = readable(os.fsencode(_stem(self._path.name)))
        self._scratch: ScratchFolder | None = None
        self._classes: FolderClasses | None = None
        plain = self._path
        opener = _compression(self._path)
        with ExitStack() as stack:
            if opener is not None:
                self._scratch, plain = unpack(self._path, opener, "archive.tar")
                stack.callback(self._scratch.close)
            self._plain, self._file = plain, LocalFile(plain)
            if labels:
                self._classes = FolderClasses(place.name for place in self.places())
                self.classes = self._classes.names
            stack.pop_all()

    def places(self) -> Iterator[Place]:
        """Iterate where the pictures lie (reads the headers, and the first bytes of unnamed files)."""
        self.ignored = 0
        with self._plain.open("rb", buffering=0) as file:
            reader = _HeaderReader(file)
            for member in _members(reader, self._path):
                if member.isdir() or is_hidden(member.name):
                    continue
                if not member.isreg() or member.issparse():
                    self.ignored += 1
                    continue
                place = TarPlace(member.name, member.offset_data, member.size)
                if has_picture_name(place.name) or looks_like_picture(place.name, _head(reader, place)):
                    yield place
                else:
                    self.ignored += 1

    def read(self, first: int, places: Sequence[Place]) -> Iterator[Item]:
        """Read pictures; each key is the running number, each meta the name in the archive."""
        for number, place in enumerate(places, first):
            data, problem = self._contents(place)
            where = readable(place.name.encode("utf-8", "surrogateescape"))
            meta: dict[str, Any] = {"path": where}
            if self._classes is not None:
                meta["label"] = self._classes.label(place.name)
            yield Item(number_key(number), where, data, meta, problem)

    def files(self) -> Sequence[Path]:
        """The archive."""
        return (self._path,)

    def close(self) -> None:
        """Close the archive and remove what was unpacked of it."""
        self._file.close()
        if self._scratch is not None:
            self._scratch.close()
            self._scratch = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_scratch": None}

    def _contents(self, place: TarPlace) -> tuple[bytes, str]:
        """Return (bytes, "") or (b"", why they cannot be read)."""
        problem = size_problem(place.size)
        if problem:
            return b"", problem
        try:
            data = self._file.read(place.offset, place.size)
        except OSError as error:
            return b"", read_problem(error)
        return (data, "") if len(data) == place.size else (b"", "the archive ends before it")


class _HeaderReader(io.BufferedReader):
    """An archive's file for the header parser, which would read records of any size a header claims."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0 or size > LONGEST_RECORD:
            raise tarfile.ReadError(f"header record of {size} bytes")
        return super().read(size)


def _members(file: _HeaderReader, archive: Path) -> Iterator[tarfile.TarInfo]:
    """Iterate the members to the end of the archive, or raise.

    `TarFile` itself takes a damaged header between two members for the end, and keeps all it has read.
    """
    end = file.seek(0, os.SEEK_END)
    offset, last = 0, ""
    parser: tarfile.TarFile | None = None
    while True:
        file.seek(offset)
        block = file.read(_BLOCK)
        if len(block) < _BLOCK:
            raise _broken(archive, last, "ends without the mark for it, so it is cut short")
        if not block.strip(b"\0"):
            break
        if offset == 0:
            _refuse_foreign(archive, block)
        try:
            if parser is None:
                file.seek(0)
                parser = tarfile.TarFile(fileobj=file, encoding="utf-8", errors="surrogateescape")
            file.seek(offset)
            member = tarfile.TarInfo.fromtarfile(parser)
        except HEADER_ERRORS as error:
            raise _broken(archive, last, "goes on with a damaged header") from error
        if parser.offset <= offset or member.size < 0:
            raise _broken(archive, last, "goes on with a damaged header")
        if parser.offset > end:
            name = readable(member.name.encode("utf-8", "surrogateescape"))
            raise _broken(archive, last, f"ends within the next one, {name}")
        yield member
        offset, last = parser.offset, member.name
    _check_rest(file, archive, last)


def _check_rest(file: _HeaderReader, archive: Path, last: str) -> None:
    """Raise unless only zeros follow the mark for the end."""
    while chunk := file.read(LONGEST_RECORD):
        if chunk.strip(b"\0"):
            raise _broken(archive, last, "ends and then goes on: two archives in one file?")


def _refuse_foreign(archive: Path, head: bytes) -> None:
    """Raise if an archive does not begin with a header."""
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except HEADER_ERRORS as error:
        is_zstd = head.startswith(_ZSTD_MAGIC)
        what = "compressed by zstd; unpack it first" if is_zstd else "no tar archive; name one"
        raise UserError(f"{archive}: {what}") from error


def _broken(archive: Path, last: str, what: str) -> UserError:
    after = readable(last.encode("utf-8", "surrogateescape")) if last else "its beginning"
    return UserError(f"{archive}: after {after} it {what}; download or pack it again")


def _head(file: _HeaderReader, place: TarPlace) -> bytes:
    file.seek(place.offset)
    return file.read(min(place.size, HEAD_BYTES))


def _compression(archive: Path) -> Opener | None:
    """Return how a compressed archive is read, None for a plain one; raise if it holds no tar."""
    with archive.open("rb") as file:
        head = file.read(_BLOCK)
        opener = next((opener for magic, opener in _COMPRESSIONS if head.startswith(magic)), None)
        if opener is None:
            return None
        file.seek(0)
        try:
            with opener(file) as stream:
                head = stream.read(_BLOCK)
        except (OSError, EOFError, ValueError) as error:
            raise UserError(f"{archive}: cannot be unpacked ({error}); download or pack it again") from error
    if head.strip(b"\0"):
        _refuse_foreign(archive, head)
    return opener


def _stem(name: str) -> str:
    """A file's name without the suffixes of an archive."""
    for suffix in _SUFFIXES:
        name = name.removesuffix(suffix)
    return name or "tar"
