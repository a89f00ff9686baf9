"""A cache of shards' blocks on a machine's own disk, shared by all its processes.

A block is a file that is named by the shard's SHA-256 and the block's number, so it never goes stale; it is
written under another name and renamed, so it is there whole or not at all. What keeps processes from doing
the same work twice are `flock`s, which the kernel releases when their owner dies; an owner that merely hangs
is waited for only so long. Contents are not verified here: whoever reads checks CRC32C and calls `drop`.
"""

import contextlib
import errno
import fcntl
import logging
import os
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from data_pipeline.errors import UserError

log = logging.getLogger(__name__)

BLOCK_BYTES: Final = 8 << 20
"""Blocks begin at multiples of this; a shard's last one may be shorter."""
_LOCKS: Final = 256
_TEMPORARY: Final = "tmp-"
_DISK_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PAUSE_SECONDS: Final = 0.002  # between two tries for a lock, at first
_LONGEST_PAUSE_SECONDS: Final = 0.1
_TOUCH_SECONDS: Final = 60.0
_SCAN_SHARE: Final = 128  # a process looks at the folder each time it stored this part of the limit
_ROOM_SHARE: Final = 8  # evicting leaves this part of the limit free


class BlockCache:
    """Blocks of shards in a folder, with a limit of bytes. Safe for several processes and threads.

    The blocks of all processes together stay within the limit as long as at most 16 processes write: each
    looks at the folder after every 1/128 of the limit that it stored, and then evicts, if need be, the
    blocks used longest ago down to 7/8. A full disk is no error: what does not fit is not kept.

    Args:
        folder: On a local disk; made if absent.
        limit_bytes: Most bytes of all blocks.
        patience_seconds: How long to wait for another's fetching of a block before fetching it too.

    Raises:
        UserError: The folder cannot be used, or the limit is less than a block.
    """

    def __init__(self, folder: Path, limit_bytes: int, *, patience_seconds: float = 30.0) -> None:
        if limit_bytes < BLOCK_BYTES:
            raise UserError(
                f"cache {folder}: a limit of {limit_bytes} bytes is less than one block of {BLOCK_BYTES}"
            )
        self._folder, self._limit, self._patience = folder, limit_bytes, patience_seconds
        self._lock = threading.Lock()
        self._touched: dict[str, float] = {}
        self._stored_since_scan = 0
        self.hits = 0
        """Blocks that were there."""
        self.misses = 0
        """Blocks that were fetched."""
        self.evictions = 0
        """Blocks that made room for others."""
        self.unstored = 0
        """Blocks that were fetched but not kept, for the disk was full."""
        try:
            (folder / "locks").mkdir(parents=True, exist_ok=True)
            self._scan()
        except OSError as error:
            raise UserError(
                f"cache {folder}: cannot be used ({error.strerror or error}); name another folder"
            ) from error

    def read(
        self, shard_sha256: str, start: int, stop: int, size: int, load: Callable[[int, int], bytes]
    ) -> bytes:
        """Read a part of a shard, fetching the blocks that are not there.

        Args:
            shard_sha256: The shard's hash.
            start: First byte.
            stop: Byte after the last.
            size: Bytes of the shard.
            load: Fetches the bytes [start, stop) it is given.

        Returns:
            The bytes [start, stop).
        """
        parts = []
        for block in range(start // BLOCK_BYTES, -(-stop // BLOCK_BYTES)):
            begin = block * BLOCK_BYTES
            end = min(begin + BLOCK_BYTES, size)
            first, last = max(start, begin) - begin, min(stop, end) - begin
            parts.append(self._read_block(f"{shard_sha256}-{block}", first, last, begin, end, load))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def drop(self, shard_sha256: str, start: int, stop: int) -> None:
        """Forget the blocks that hold these bytes of a shard: they are damaged."""
        for block in range(start // BLOCK_BYTES, -(-stop // BLOCK_BYTES)):
            self._path(f"{shard_sha256}-{block}").unlink(missing_ok=True)

    def _read_block(
        self, name: str, first: int, last: int, begin: int, end: int, load: Callable[[int, int], bytes]
    ) -> bytes:
        """Read [first, last) of a block that is [begin, end) of its shard."""
        found = self._look_up(name, first, last, end - begin)
        if found is not None:
            return found
        lock_file = self._folder / "locks" / f"{zlib.crc32(name.encode()) % _LOCKS:03d}"
        with _claimed(lock_file, self._patience):
            found = self._look_up(name, first, last, end - begin)  # another may have fetched it meanwhile
            if found is not None:
                return found
            data = load(begin, end)
            with self._lock:
                self.misses += 1
            self._store(name, data)
            return data[first:last]

    def _look_up(self, name: str, first: int, last: int, length: int) -> bytes | None:
        path = self._path(name)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            data = os.pread(fd, last - first, first)
            if len(data) != last - first or os.fstat(fd).st_size != length:
                log.warning("%s: has the wrong length, fetching it again", path)
                path.unlink(missing_ok=True)
                return None
        finally:
            os.close(fd)
        now = time.monotonic()
        with self._lock:
            self.hits += 1
            due = now - self._touched.get(name, -_TOUCH_SECONDS) >= _TOUCH_SECONDS
            if due:
                self._touched[name] = now
        if due:
            with contextlib.suppress(FileNotFoundError):
                os.utime(path)
        return data

    def _store(self, name: str, data: bytes) -> None:
        with self._lock:
            self._stored_since_scan += len(data)
            due = self._stored_since_scan * _SCAN_SHARE >= self._limit
            if due:
                self._stored_since_scan = len(data)
        if due:
            self._scan(room_for=len(data))
        path = self._path(name)
        temporary = path.with_name(f"{_TEMPORARY}{uuid.uuid4().hex}")
        try:
            path.parent.mkdir(exist_ok=True)
            with temporary.open("wb") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # says that its writer lives
                file.write(data)
                file.flush()
                temporary.rename(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            if error.errno not in _DISK_FULL:
                raise
            with self._lock:
                self.unstored += 1
                first = self.unstored == 1
            if first:
                log.warning("cache %s: no space left; going on without keeping more", self._folder)

    def _scan(self, room_for: int = 0) -> None:
        """Remove what killed writers left, and evict blocks if the limit would be passed."""
        with _try_lock(self._folder / "locks" / "evict") as locked:
            if not locked:
                return  # another process is at it
            blocks, total = [], room_for
            for path in self._folder.glob("??/*"):
                with contextlib.suppress(FileNotFoundError):
                    if path.name.startswith(_TEMPORARY):
                        _remove_if_abandoned(path)
                        continue
                    stat = path.stat()
                    blocks.append((stat.st_mtime_ns, stat.st_size, path))
                    total += stat.st_size
            if total + self._limit // _SCAN_SHARE <= self._limit:
                return
            target = self._limit - self._limit // _ROOM_SHARE
            for _, size, path in sorted(blocks):
                if total <= target:
                    break
                path.unlink(missing_ok=True)
                total -= size
                with self._lock:
                    self.evictions += 1
                    self._touched.pop(path.name, None)

    def _path(self, name: str) -> Path:
        return self._folder / name[:2] / name


@contextlib.contextmanager
def _try_lock(path: Path) -> Iterator[bool]:
    """Hold a lock if nobody else does; tells whether."""
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


@contextlib.contextmanager
def _claimed(path: Path, patience_seconds: float) -> Iterator[None]:
    """Hold a lock, or go on without it if its owner does not let it go for that long."""
    deadline, pause = time.monotonic() + patience_seconds, _PAUSE_SECONDS
    with path.open("ab") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    break
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
            else:
                break
        yield


def _remove_if_abandoned(path: Path) -> None:
    """Remove a temporary file whose writer is dead: it would hold the file's lock."""
    with _try_lock(path) as locked:
        if locked:
            path.unlink(missing_ok=True)
