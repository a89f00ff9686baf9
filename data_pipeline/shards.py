"""Writing shards: samples -> `shard-NNNNNN.tar` + `shard-NNNNNN.idx` in the storage.

The same samples give the same bytes, on every machine: USTAR headers with fixed times and owners.
"""

import contextlib
import errno
import hashlib
import io
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import google_crc32c
import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.index import INDEX_FILE, RECORD, ShardEntry
from data_pipeline.storage import Storage

_BLOCK: Final = tarfile.BLOCKSIZE
_KEY: Final = re.compile(r"[A-Za-z0-9_-]{1,80}")
_NO_SPACE: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class ShardWriter:
    """Write the samples of one split into shards and upload each as soon as it is full.

    Args:
        storage: Where the shards go.
        scratch: A local folder for the one shard in the making.
        shard_bytes: A shard is closed before it would grow beyond this (a single larger sample excepted).
        numbers: Gives the next free shard number; shared by the writers of all splits.
    """

    def __init__(self, storage: Storage, scratch: Path, shard_bytes: int, numbers: Iterator[int]) -> None:
        self._storage, self._scratch = storage, scratch
        self._shard_bytes, self._numbers = shard_bytes, numbers
        self._open: _OpenShard | None = None
        self._entries: list[ShardEntry] = []

    def add(self, key: str, extension: str, payload: bytes, meta: bytes | None) -> None:
        """Append one sample: `key.extension`, and `key.json` if there is meta data.

        Raises:
            UserError: No space for the shard in the making, or in the storage.
        """
        assert _KEY.fullmatch(key), f"key {key!r}"
        members = [(f"{key}.{extension}", payload)] + ([] if meta is None else [(f"{key}.json", meta)])
        if self._open is not None and self._open.size_with(members) > self._shard_bytes:
            self._finish_shard()
        with _name_full_disk(self._scratch):
            if self._open is None:
                self._open = _OpenShard(self._scratch, next(self._numbers))
            self._open.add(members)

    def close(self) -> list[ShardEntry]:
        """Finish and upload the last shard; return the entries of all, in order."""
        if self._open is not None:
            self._finish_shard()
        return self._entries

    def abandon(self) -> None:
        """Drop the shard in the making, if any, without uploading it."""
        if self._open is not None:
            self._open.abandon()
            self._open = None

    def _finish_shard(self) -> None:
        assert self._open is not None
        with _name_full_disk(self._scratch):
            entry, records = self._open.finish()
        refuse_if_published(self._storage)
        self._storage.upload(entry.name, self._open.path)
        self._storage.write(entry.idx_name, records)
        self._open.path.unlink()
        self._open = None
        self._entries.append(entry)


def refuse_if_published(storage: Storage) -> None:
    """Check that no other build has published its index here: what an index names is never overwritten.

    Raises:
        UserError: There is an index.
    """
    if storage.exists(INDEX_FILE):
        raise UserError(f"{storage.url}: another build finished here first; choose another --out")


class _OpenShard:
    """A tar in the making in the scratch folder."""

    def __init__(self, scratch: Path, number: int) -> None:
        self._name = f"shard-{number:06d}.tar"
        self.path = scratch / self._name
        raw = io.FileIO(self.path, "x+")
        self._raw, self._file = raw, io.BufferedRandom(raw)
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        self._records: list[tuple[int, int, int, int, int, int]] = []

    def size_with(self, members: list[tuple[str, bytes]]) -> int:
        """Size of the finished tar if these members were its last."""
        end = self._file.tell() + sum(_BLOCK + _padded(len(data)) for _, data in members) + 2 * _BLOCK
        return -(-end // tarfile.RECORDSIZE) * tarfile.RECORDSIZE

    def add(self, members: list[tuple[str, bytes]]) -> None:
        """Append the members of one sample, the picture first."""
        places = [self._append(name, data) for name, data in members]
        meta = places[1] if len(places) > 1 else (0, 0, 0)
        self._records.append((*places[0], *meta))

    def _append(self, name: str, data: bytes) -> tuple[int, int, int]:
        info = tarfile.TarInfo(name)  # mtime, uid and gid are 0, owners empty
        info.size, info.mode = len(data), 0o644
        self._tar.addfile(info, io.BytesIO(data))
        return self._file.tell() - _padded(len(data)), len(data), google_crc32c.value(data)

    def finish(self) -> tuple[ShardEntry, bytes]:
        """Close the tar; return its entry and the bytes of its records."""
        self._tar.close()
        self._file.flush()
        size = self._file.tell()
        self._file.seek(0)
        sha256 = hashlib.file_digest(self._file, "sha256").hexdigest()
        self._file.close()
        records = np.array(self._records, dtype=RECORD).tobytes()
        entry = ShardEntry(
            name=self._name,
            bytes=size,
            sha256=sha256,
            samples=len(self._records),
            idx_bytes=len(records),
            idx_sha256=hashlib.sha256(records).hexdigest(),
        )
        return entry, records

    def abandon(self) -> None:
        # Closing the raw file first keeps the buffer from being flushed to a full disk once more.
        self._raw.close()
        self.path.unlink(missing_ok=True)


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


@contextlib.contextmanager
def _name_full_disk(scratch: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise UserError(
                f"{scratch}: no space left for the shard in the making ({error.strerror}); "
                "free some or set TMPDIR to a folder with more"
            ) from error
        raise
