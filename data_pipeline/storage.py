"""Files by URL: one interface over local folders and every fsspec object store.

What the formats need and plain fsspec does not promise: *create-only* writes that are atomic (a reader
sees all bytes or none), retries with full jitter that are counted, short answers detected, and errors
that tell a user's mistake (wrong key, no bucket, disk full) from a fault of the world.

Credentials and endpoints come from the store's standard chain only (for S3: `AWS_ENDPOINT_URL`,
`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, profiles, instance roles) and are never logged.
"""

import asyncio
import errno
import logging
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol, TypeVar

import aiohttp
import botocore.exceptions
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

from data_pipeline.errors import StorageFault, UserError
from data_pipeline.local_files import LocalFiles
from data_pipeline.remote_files import Fill, RemoteFiles
from data_pipeline.storage_backend import StorageBackend

log = logging.getLogger(__name__)
T = TypeVar("T")
PROBE: Final = "create-only-probe-"
"""Start of the names of files that a kill in `prove_create_only` leaves behind."""
_DISK_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_USER_ERRNO: Final = (errno.EINVAL, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR)
_MISCONFIGURED: Final = (
    ValueError,  # botocore's answer to an endpoint that is no URL
    botocore.exceptions.NoCredentialsError,
    botocore.exceptions.PartialCredentialsError,
    botocore.exceptions.ProfileNotFound,
    botocore.exceptions.ParamValidationError,
)
"""What no number of retries mends."""


class Backend(Protocol):
    """What `Storage` asks of a place; paths are absolute within the backend."""

    @property
    def hedges(self) -> int:
        """How often a read was asked for a second time while the first answer was out."""

    def read(self, path: str, start: int | None = None, stop: int | None = None) -> bytes:
        """Read a file or the bytes [start, stop)."""

    def create(self, path: str, data: bytes) -> None:
        """Write a new file atomically; FileExistsError if it is there."""

    def write(self, path: str, data: bytes) -> None:
        """Write a file atomically, replacing an old one."""

    def upload(self, path: str, local_file: Path) -> None:
        """Copy a local file here, replacing an old one."""

    def fill(self, path: str, fill: Fill, scratch: Path) -> None:
        """Write a large file piece by piece, replacing an old one; see `Storage.fill`."""

    def stream(self, path: str, fill: Fill) -> None:
        """Write a large file piece by piece without a local copy; see `Storage.stream`."""

    def list(self, path: str) -> list[str]:
        """Names of the immediate children, sorted; empty if the folder is absent."""

    def size(self, path: str) -> int:
        """Size in bytes; FileNotFoundError if it is no file."""

    def delete(self, path: str) -> None:
        """Remove a file; absent is fine."""

    def delete_folder(self, path: str) -> None:
        """Remove a folder and all below it; absent is fine."""

    def sizes(self, path: str) -> dict[str, int]:
        """Sizes in bytes of all files below a folder, by path within it; empty if the folder is absent."""

    def sweep(self, path: str) -> None:
        """Remove from a folder what killed processes were writing."""


class _Counter:
    """Retries shared by a storage and its children."""

    def __init__(self) -> None:
        self.retries = 0


class Storage:
    """One folder, local or remote, named by a URL.

    Args:
        url: A path (`runs/a`, `file:///data/a`) or an fsspec URL (`s3://bucket/prefix`).
        give_up_after: Seconds of continued failure after which an operation raises `StorageFault`.
        backend: Which client reads from S3.
        request_timeout: Seconds after which a single remote read has failed.

    Every operation takes a path relative to the URL, "/"-separated. Beyond what each states, all raise
    `UserError` for mistakes the user must mend (credentials, bucket, permissions, full disk) and
    `StorageFault` for faults that outlive the retries.
    """

    def __init__(
        self,
        url: str,
        *,
        give_up_after: float = 60.0,
        backend: StorageBackend = StorageBackend.S3FS,
        request_timeout: float = 30.0,
    ) -> None:
        if not url:
            raise UserError("storage URL is empty; give a folder or a URL such as s3://bucket/prefix")
        protocol, _, rest = url.partition("://")
        self._give_up_after = give_up_after
        self._counter = _Counter()
        self._backend: Backend
        if "://" in url and not rest.strip("/") and protocol != "file":
            raise UserError(f"{url}: names no bucket; give a URL such as s3://bucket/prefix")
        if not rest or protocol == "file":
            self._root = str(Path(rest or url).expanduser().absolute())
            self.url = self._root
            self._backend = LocalFiles()
        else:
            self._root = rest.strip("/")
            self.url = f"{protocol}://{self._root}"
            try:
                self._backend = RemoteFiles(protocol, backend, request_timeout)
            except (ValueError, TypeError, ImportError, OSError) as error:
                raise UserError(
                    f"{url}: {_one_line(error)}; use a local path or a protocol fsspec knows"
                ) from error

    def __repr__(self) -> str:
        return f"Storage({self.url!r})"

    @property
    def retries(self) -> int:
        """How often an operation of this storage, its parents or children was repeated after a fault."""
        return self._counter.retries

    @property
    def hedges(self) -> int:
        """How often a read of this storage, its parents or children was asked for twice: see `hedge`."""
        return self._backend.hedges

    @property
    def is_local(self) -> bool:
        """True for a folder of this machine's file system."""
        return isinstance(self._backend, LocalFiles)

    def child(self, *parts: str) -> "Storage":
        """Return the storage of a sub-folder; it shares the connection and the retry counter."""
        made = Storage.__new__(Storage)
        made._root = "/".join((self._root, *parts))
        made.url = "/".join((self.url, *parts))
        made._backend, made._counter, made._give_up_after = self._backend, self._counter, self._give_up_after
        return made

    def read(self, path: str) -> bytes:
        """Read a whole file.

        Raises:
            FileNotFoundError: There is none.
        """
        return self._attempt(path, lambda full: self._backend.read(full))

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        """Read the bytes [start, stop) of a file; a short answer counts as a fault and is retried.

        Raises:
            FileNotFoundError: There is none.
            StorageFault: Also if the file ends before `stop`.
        """
        if start == stop:
            return b""

        def whole_range(full: str) -> bytes:
            data = self._backend.read(full, start, stop)
            if len(data) == stop - start:
                return data
            size = self._backend.size(full)
            if size < stop:
                raise StorageFault(f"{self.url}/{path}: {size} bytes, too few to read up to byte {stop}")
            raise ConnectionError(f"short answer: {len(data)} of {stop - start} bytes")

        return self._attempt(path, whole_range)

    def create(self, path: str, data: bytes) -> bool:
        """Write a new file, all or nothing, if and only if none of that name exists.

        Returns:
            True if the file now holds `data` (also when an earlier try whose answer was lost wrote it);
            False if it exists with other bytes.
        """

        def is_new(full: str) -> bool:
            try:
                self._backend.create(full, data)
            except OSError as error:
                if _says_it_exists(error):
                    return False
                raise
            return True

        return self._attempt(path, is_new) or self.read(path) == data

    def write(self, path: str, data: bytes) -> None:
        """Write a file, replacing an old one. Only for what is not a publication (heart-beats, reports)."""
        self._attempt(path, lambda full: self._backend.write(full, data))

    def upload(self, path: str, local_file: Path) -> None:
        """Copy a local file here (multipart when large), replacing an old one."""
        self._attempt(path, lambda full: self._backend.upload(full, local_file))

    def fill(self, path: str, fill: Fill, scratch: Path) -> None:
        """Write a large file piece by piece, replacing an old one; readers see all of it or nothing.

        Args:
            path: Where to.
            fill: Writes the content to an open file; called again after a fault.
            scratch: A local folder for the file on its way to a remote storage.
        """
        self._attempt(path, lambda full: self._backend.fill(full, fill, scratch))

    def stream(self, path: str, fill: Fill) -> None:
        """Write a large file piece by piece, replacing an old one; readers see all of it or nothing.

        Unlike `fill` it needs no scratch folder: what goes to a remote storage is held in pieces of 16 MiB.

        Args:
            path: Where to.
            fill: Writes the content to an open file; called again after a fault.
        """
        self._attempt(path, lambda full: self._backend.stream(full, fill))

    def list(self, path: str = "") -> list[str]:
        """Names of the immediate children of a sub-folder, sorted; empty if there is no such folder."""
        return self._attempt(path, lambda full: self._backend.list(full))

    def exists(self, path: str) -> bool:
        """Tell whether a file of that name exists."""
        try:
            self.size(path)
        except FileNotFoundError:
            return False
        return True

    def size(self, path: str) -> int:
        """Size of a file in bytes.

        Raises:
            FileNotFoundError: There is none.
        """
        return self._attempt(path, lambda full: self._backend.size(full))

    def delete(self, path: str) -> None:
        """Remove a file; it is no error if there is none."""
        self._attempt(path, lambda full: self._backend.delete(full))

    def delete_folder(self, path: str) -> None:
        """Remove a sub-folder and all below it; it is no error if there is none."""
        assert path, "a storage's own folder is not to be removed"
        self._attempt(path, lambda full: self._backend.delete_folder(full))

    def sizes(self, path: str = "") -> dict[str, int]:
        """Sizes in bytes of all files below a sub-folder, by path within it; empty if there is none."""
        return self._attempt(path, lambda full: self._backend.sizes(full))

    def sweep(self) -> None:
        """Remove what killed processes were writing; nobody may be writing here now."""
        self._attempt("", lambda full: self._backend.sweep(full))

    def prove_create_only(self) -> None:
        """Check by trying that this place honours create-only writes; the formats depend on it.

        Raises:
            UserError: It does not (some S3 look-alikes ignore `If-None-Match`).
        """
        probe = f"{PROBE}{uuid.uuid4().hex}"
        try:
            if (
                not self.create(probe, b"first")
                or self.create(probe, b"second")
                or self.read(probe) != b"first"
            ):
                raise UserError(
                    f"{self.url}: the store does not honour create-only writes (If-None-Match); "
                    "use one that does, e.g. AWS S3, Ceph, SeaweedFS, or a local folder"
                )
        finally:
            self.delete(probe)

    def _attempt(self, path: str, operation: Callable[[str], T]) -> T:
        """Run one operation on the full path with retries, and name errors for people."""
        full = f"{self._root}/{path}" if path else self._root
        shown = f"{self.url}/{path}" if path else self.url
        retrying = Retrying(
            wait=wait_random_exponential(multiplier=0.2, max=10.0),  # "full jitter"
            stop=stop_after_delay(self._give_up_after),
            retry=retry_if_exception(_is_transient),
            before_sleep=lambda state: self._count_retry(shown, state),
            reraise=True,
        )
        try:
            answer: T = retrying(operation, full)
            return answer
        except FileNotFoundError as error:
            if _is_missing_bucket(error):
                raise UserError(
                    f"{self.url}: the bucket does not exist; create it or mend the URL"
                ) from error
            raise
        except (PermissionError, *_MISCONFIGURED) as error:
            raise UserError(
                f"{shown}: access denied or misconfigured ({_one_line(error)}); check the standard chain "
                "(AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, profile or role) or the "
                "folder's permissions"
            ) from error
        except StorageFault:
            raise
        except (OSError, *_TRANSIENT_TYPES) as error:
            code = error.errno if isinstance(error, OSError) else None
            if code in _DISK_FULL:
                raise UserError(
                    f"{shown}: no space left ({_one_line(error)}); free some or choose another place"
                ) from error
            if code in _USER_ERRNO:
                raise UserError(f"{shown}: refused ({_one_line(error)}); choose another place") from error
            raise StorageFault(f"{shown}: still failing after retries: {_one_line(error)}") from error

    def _count_retry(self, shown: str, state: RetryCallState) -> None:
        self._counter.retries += 1
        error = state.outcome.exception() if state.outcome else None
        log.warning("%s: try %d failed, trying again: %s", shown, state.attempt_number, _one_line(error))


_TRANSIENT_TYPES: Final = (
    aiohttp.ClientError,
    asyncio.TimeoutError,
    botocore.exceptions.BotoCoreError,
    botocore.exceptions.ClientError,
)


def _is_transient(error: BaseException) -> bool:
    """Tell a passing fault of the store or the network from an answer that will stay the same."""
    if isinstance(
        error, (FileNotFoundError, FileExistsError, PermissionError, StorageFault, *_MISCONFIGURED)
    ):
        return False
    if isinstance(error, OSError):
        return error.errno not in (*_USER_ERRNO, *_DISK_FULL)
    return isinstance(error, _TRANSIENT_TYPES)


def _says_it_exists(error: OSError) -> bool:
    """Recognise "the object is already there": FileExistsError, or s3fs's EINVAL for HTTP 412."""
    refused = error.errno == errno.EINVAL and "pre-condition" in str(error)
    return isinstance(error, FileExistsError) or refused


def _is_missing_bucket(error: BaseException | None) -> bool:
    """Look for S3's NoSuchBucket among the causes of an error."""
    while error is not None:
        if isinstance(error, botocore.exceptions.ClientError):
            return bool(error.response["Error"]["Code"] == "NoSuchBucket")
        if "NoSuchBucket" in str(error):  # obstore quotes the store's whole answer
            return True
        error = error.__cause__ or error.__context__
    return False


def _one_line(error: BaseException | None) -> str:
    return " ".join(str(error).split()) or type(error).__name__
