"""The remote side of `storage`: fsspec's file systems, with S3 optionally read through obstore.

Every client's own retries are off: `Storage` repeats what failed, with jitter, and counts it. What clients
raise in words of their own comes out as the built-in `OSError`s that `Storage` judges.
"""

import asyncio
import contextlib
import datetime
import errno
import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final

import aiohttp
import botocore.exceptions
import botocore.session
import fsspec
import obstore.exceptions
from fsspec.asyn import AsyncFileSystem, sync
from obstore.fsspec import FsspecStore

from data_pipeline.hedge import Hedge
from data_pipeline.storage_backend import StorageBackend

Fill = Callable[[BinaryIO], object]
"""Writes a file's content."""

_S3: Final = ("s3", "s3a")
_CONNECT_SECONDS: Final = 5
_PIECE_BYTES: Final = 16 << 20
"""How much of a streamed file is held in memory before it is sent."""
_CREDENTIALS_FOR: Final = datetime.timedelta(minutes=5)
"""How long obstore keeps credentials before it asks the standard chain again, which renews them itself."""


class RemoteFiles:
    """Any fsspec file system without a local disk's semantics (s3, gcs, memory, http …).

    Args:
        protocol: fsspec's name of it.
        backend: Who reads; only S3 has a choice.
        request_timeout: Seconds after which a read without its whole answer has failed.

    Raises:
        ValueError: fsspec knows no such protocol.
    """

    def __init__(self, protocol: str, backend: StorageBackend, request_timeout: float) -> None:
        self._timeout = request_timeout
        self._hedge = Hedge()
        self._backend = backend if protocol in _S3 else StorageBackend.S3FS
        # fsspec's HTTP paths are whole URLs.
        self._prefix = f"{protocol}://" if protocol in ("http", "https") else ""
        options: dict[str, Any] = {"use_listings_cache": False}
        if protocol in _S3:
            options["config_kwargs"] = {
                "connect_timeout": _CONNECT_SECONDS,
                "read_timeout": request_timeout,
                "retries": {"total_max_attempts": 1},
            }
        self._fs = fsspec.filesystem(protocol, **options)
        if protocol in _S3:
            self._fs.retries = 1

    @property
    def hedges(self) -> int:
        """How often a second answer was asked for because the first one took too long."""
        return self._hedge.count

    @functools.cached_property
    def _reader(self) -> Any:
        """The file system that reads; made at the first read, whose retries cover its making."""
        if self._backend is StorageBackend.S3FS:
            return self._fs
        return _obstore_s3(self._timeout)

    def read(self, path: str, start: int | None = None, stop: int | None = None) -> bytes:
        """Read a file or the bytes [start, stop)."""
        with _in_common_words(path):
            if not isinstance(self._reader, AsyncFileSystem):
                return bytes(self._reader.cat_file(self._prefix + path, start=start, end=stop))
            data: bytes = sync(self._reader.loop, self._read_in_time, self._prefix + path, start, stop)
            return data

    async def _read_in_time(self, path: str, start: int | None, stop: int | None) -> Any:
        # A limit over the whole request: a client's own one starts anew with every byte that trickles in.
        async with asyncio.timeout(self._timeout):
            return await self._hedge.ask(lambda: self._reader._cat_file(path, start=start, end=stop))

    def create(self, path: str, data: bytes) -> None:
        """Write a new object with a conditional put (HTTP `If-None-Match: *` on S3)."""
        self._fs.pipe_file(path, data, mode="create")

    def write(self, path: str, data: bytes) -> None:
        """Put an object; stores replace atomically."""
        self._fs.pipe_file(path, data)

    def upload(self, path: str, local_file: Path) -> None:
        """Put a local file, in several parts when it is large."""
        self._fs.put_file(str(local_file), path)

    def fill(self, path: str, fill: Fill, scratch: Path) -> None:
        """Fill a local file, then put it: a fault on the way never shows as a shorter object."""
        with tempfile.NamedTemporaryFile(dir=scratch) as file:
            fill(file)  # type: ignore[arg-type]
            file.flush()
            self.upload(path, Path(file.name))

    def stream(self, path: str, fill: Fill) -> None:
        """Send a file piece by piece (S3: a multipart upload), completed only if `fill` came to its end."""
        file = self._fs.open(path, "wb", block_size=_PIECE_BYTES)
        try:
            fill(file)
            file.close()
        except BaseException:
            # Closing, which a lost file would do by itself, would complete what is there so far.
            file.closed = True
            file.discard()
            raise

    def list(self, path: str) -> list[str]:
        """Names of the immediate children; a store without such a prefix answers nothing."""
        try:
            found = self._fs.ls(path, detail=False)
        except FileNotFoundError:
            return []
        names = {name.rstrip("/").rsplit("/", 1)[-1] for name in found if name.rstrip("/") != path}
        return sorted(names)

    def size(self, path: str) -> int:
        """Size in bytes."""
        with _in_common_words(path):
            info = self._fs.info(self._prefix + path)
        if info["type"] != "file":
            raise FileNotFoundError(errno.ENOENT, "not an object", path)
        return int(info["size"])

    def delete_folder(self, path: str) -> None:
        """Remove all objects of a prefix; none is fine."""
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm(path, recursive=True)

    def sizes(self, path: str) -> dict[str, int]:
        """Sizes of all objects of a prefix."""
        found = self._fs.find(path, detail=True)
        files = {name: info for name, info in found.items() if info["type"] == "file"}
        return {name.removeprefix(f"{path}/"): int(info["size"]) for name, info in files.items()}

    def sweep(self, path: str) -> None:
        """Nothing: an object is there whole or not at all."""

    def delete(self, path: str) -> None:
        """Remove an object; absent is fine."""
        try:
            self._fs.rm_file(path)
        except FileNotFoundError:
            return


def _obstore_s3(request_timeout: float) -> Any:
    """Make an obstore file system with the endpoint, region and credentials of botocore's standard chain.

    obstore alone would look at environment variables only, not at profiles, roles or configuration files.
    """
    session = botocore.session.get_session()
    credentials = session.get_credentials()
    if credentials is None:
        raise botocore.exceptions.NoCredentialsError
    meta = session.create_client("s3").meta
    config = {"region": meta.region_name or "us-east-1"}
    if "amazonaws.com" not in meta.endpoint_url:
        config["endpoint"] = meta.endpoint_url

    def provide() -> dict[str, object]:
        frozen = credentials.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.datetime.now(datetime.UTC) + _CREDENTIALS_FOR,
        }

    return FsspecStore(
        "s3",
        config=config,
        client_options={
            "allow_http": meta.endpoint_url.startswith("http://"),
            "connect_timeout": f"{_CONNECT_SECONDS}s",
            "timeout": f"{request_timeout}s",
        },
        retry_config={"max_retries": 0, "retry_timeout": datetime.timedelta(seconds=request_timeout)},
        credential_provider=provide,
        skip_instance_cache=True,
    )


@contextlib.contextmanager
def _in_common_words(path: str) -> Iterator[None]:
    """Turn obstore's and aiohttp's errors into the built-in ones of the same meaning."""
    try:
        yield
    except (obstore.exceptions.PermissionDeniedError, obstore.exceptions.UnauthenticatedError) as error:
        raise PermissionError(errno.EACCES, _first_line(error), path) from error
    except obstore.exceptions.BaseError as error:
        raise ConnectionError(_first_line(error)) from error
    except aiohttp.ClientResponseError as error:
        if error.status in (401, 403):
            raise PermissionError(errno.EACCES, f"HTTP {error.status} {error.message}", path) from error
        raise


def _first_line(error: BaseException) -> str:
    """What of an error of obstore is fit for a message: below it stands a dump of the cause."""
    return str(error).partition("\n")[0]
