"""LSUN as it is distributed: an LMDB of encoded pictures, or the zip around it."""

import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import lmdb

from data_pipeline.documents import sha256_hex
from data_pipeline.errors import UserError
from data_pipeline.scratch import ScratchFolder
from data_pipeline.sources import Item, Place, Source, Survey, safe_key
from data_pipeline.sources.pictures import read_problem, readable, size_problem
from data_pipeline.sources.unpack import LMDB_FILE, Opener, kind_of, unpack

_SUFFIX: Final = "_lmdb"
_SMALLEST_PAGES: Final = 2 * 4096  # the two pages that say what the file holds


class LsunSource(Source):
    """The pictures of one LSUN category, in the order of their keys, which is as good as random.

    Values are JPEG or WebP, told by their content later on. Databases of raw pixels, as some repositories
    pack them anew, look the same from outside; their values end as "not a picture".

    Args:
        path: The folder with `data.mdb`, that file, or the downloaded zip (its `data.mdb` is unpacked to a
            local disk, for LMDB maps the file into memory).

    Raises:
        UserError: No LMDB, one cut short (reading it would end the process), or one of another make.
    """

    kind = "lsun"
    default_size = 256
    default_val_fraction = 0.01

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path).expanduser()
        self._scratch: ScratchFolder | None = None
        self._environment: lmdb.Environment | None = None
        with ExitStack() as stack:
            stack.callback(self._close_environment)
            if kind_of(self._path) == "zip":
                member = _member_of_zip(self._path)
                self._scratch, self._data = unpack(self._path, _opener(member), LMDB_FILE)
                stack.callback(self._scratch.close)
                folder = Path(member).parent.name or self._path.stem
            else:
                self._data = _data_file(self._path)
                self._path = self._data
                folder = self._data.parent.resolve().name
            self.name = readable(os.fsencode(folder)).removesuffix(_SUFFIX) or self.kind
            _check(self._open(), self._data)
            self._close_environment()  # open in one place at a time: LMDB allows a process no more
            stack.pop_all()

    def places(self) -> Iterator[Place]:
        """Iterate the keys; no picture is touched."""
        try:
            with self._open().begin() as transaction, transaction.cursor() as cursor:
                yield from cursor.iternext(keys=True, values=False)
        except lmdb.Error as error:
            raise UserError(f"{self._data}: damaged LMDB ({error}); download it again") from error

    def read(self, first: int, places: Sequence[Place]) -> Iterator[Item]:
        """Read pictures by their keys."""
        with self._open().begin(buffers=True) as transaction:
            for place in places:
                data, problem = _value(transaction.get, place)
                key = safe_key(place)
                as_it_is = key.encode() == place
                text = key if as_it_is else readable(place)
                meta = {} if as_it_is else {"key": text}
                yield Item(key, f"{self.name}/{text}", data, meta, problem)

    def survey(self) -> Survey:
        """The database knows its number of keys; its file's time tells of every change."""
        status = self._path.stat()
        stamp = f"{self._path.name} {status.st_size} {status.st_mtime_ns}"
        return Survey(self._open().stat()["entries"], sha256_hex(stamp.encode()))

    def files(self) -> Sequence[Path]:
        """The database, or the zip it came in."""
        return (self._path,)

    def close(self) -> None:
        """Close the database and remove what was unpacked."""
        self._close_environment()
        if self._scratch is not None:
            self._scratch.close()
            self._scratch = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_environment": None, "_scratch": None}

    def _open(self) -> lmdb.Environment:
        if self._environment is None:
            self._environment = _open(self._data)
        return self._environment

    def _close_environment(self) -> None:
        if self._environment is not None:
            self._environment.close()
            self._environment = None


def _data_file(path: Path) -> Path:
    """Find `data.mdb`, given it or its folder."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; name the folder with {LMDB_FILE}, that file, or LSUN's zip")
    if (path / LMDB_FILE).is_file():
        return path / LMDB_FILE
    below = sorted(found.parent.name for found in path.glob(f"*/{LMDB_FILE}"))
    if below:
        raise UserError(f"{path}: holds {' and '.join(below)}; name the one to read")
    raise UserError(f"{path}: no {LMDB_FILE} in it; name the folder that holds it, or LSUN's zip")


def _member_of_zip(path: Path) -> str:
    """Find the one `data.mdb` in LSUN's zip."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.rpartition("/")[2] == LMDB_FILE]
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError, OSError) as error:
        raise UserError(
            f"{path}: its directory cannot be read ({error}), as if the zip were cut short; download it again"
        ) from error
    if not names:
        raise UserError(f"{path}: no {LMDB_FILE} in this zip; if it holds pictures, use kind zip")
    if len(names) > 1:
        shown = " and ".join(readable(name.encode()) for name in names)
        raise UserError(f"{path}: holds {shown}; unpack it and name one of their folders")
    return names[0]


def _opener(member: str) -> Opener:
    return lambda file: zipfile.ZipFile(file).open(member)


def _open(data: Path) -> lmdb.Environment:
    """Open a database to read, without locks: nothing is written beside it.

    Raises:
        UserError: It is no LMDB, or cut short.
    """
    try:
        size = data.stat().st_size
    except OSError as error:
        raise UserError(f"{data}: {read_problem(error)}; name LSUN's {LMDB_FILE}") from error
    if size < _SMALLEST_PAGES:
        raise UserError(f"{data}: {size} bytes are no LMDB; download it again")
    try:
        environment = lmdb.open(
            str(data), subdir=False, readonly=True, lock=False, readahead=False, create=False, max_dbs=1
        )
    except lmdb.Error as error:
        reason = str(error).removeprefix(f"{data}: ")
        raise UserError(f"{data}: cannot be opened as LMDB ({reason}); name LSUN's {LMDB_FILE}") from error
    pages, page_bytes = environment.info()["last_pgno"] + 1, environment.stat()["psize"]
    if size < pages * page_bytes:
        environment.close()
        raise UserError(
            f"{data}: is cut short, {size} of {pages * page_bytes} bytes are there; download or copy it again"
        )
    return environment


def _check(environment: lmdb.Environment, data: Path) -> None:
    """Raise if the database is empty or plainly not of LSUN's make."""
    try:
        with environment.begin() as transaction, transaction.cursor() as cursor:
            if not cursor.first():
                raise UserError(f"{data}: the LMDB is empty; download it again")
            first = cursor.key()
        if _is_database(environment, first):
            raise UserError(
                f"{data}: an LMDB divided into databases ({readable(first)} is one) is none of LSUN's; "
                "write its pictures to a folder and use kind folder"
            )
    except lmdb.Error as error:
        raise UserError(f"{data}: damaged LMDB ({error}); download it again") from error


def _is_database(environment: lmdb.Environment, key: bytes) -> bool:
    try:
        environment.open_db(key, create=False)
    except lmdb.Error:
        return False  # an ordinary value
    return True


def _value(get: Callable[[bytes], memoryview | None], key: bytes) -> tuple[bytes, str]:
    """Return (bytes, "") or (b"", why they cannot be read)."""
    try:
        value = get(key)
    except lmdb.Error as error:
        return b"", f"cannot be read: {error}"
    if value is None:
        return b"", "its key is no longer in the database"
    problem = size_problem(len(value))
    return (b"", problem) if problem else (bytes(value), "")
