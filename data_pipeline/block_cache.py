"""A cache of shards' blocks on a machine's own disk, shared by all its processes.

A block is a file that is named by the shard's SHA-256 and the block's number, so it never goes stale; it is
written under another name and renamed, so it is there whole or not at all. What keeps processes from doing
the same work twice are `flock`s, which the kernel releases when their owner dies; an owner that merely hangs
is waited for only so long. Contents are not verified here: whoever reads checks CRC32C and calls `drop`.

```
<folder>/3f/3f…-12            a block
<folder>/writing/8388608-…    one that is being written, locked by its writer: unlocked, its writer is dead
<folder>/locks/000 … 255      held while a block is fetched; shared by blocks, so there are never more
<folder>/locks/ledger         held while space is given out; says how many bytes are taken, or more
```
"""

import contextlib
import fcntl
import logging
import os
import threading
import time
import uuid
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from data_pipeline.errors import UserError

log = logging.getLogger(__name__)

BLOCK_BYTES: Final = 8 << 20
"""Blocks begin at multiples of this; a shard's last one may be shorter."""
_LOCKS: Final = 256
_OPEN_FILES: Final = 64
_PAUSE_SECONDS: Final = 0.002  # between two tries for a lock, at first
_LONGEST_PAUSE_SECONDS: Final = 0.1
_LEDGER_SECONDS: Final = 5.0  # counting 100,000 blocks takes less
_TOUCH_SECONDS: Final = 60.0
_ROOM_SHARE: Final = 8  # evicting leaves this part of the limit free


class BlockCache:
    """Blocks of shards in a folder, with a limit of bytes. Safe for several processes and threads.

    The files of blocks and of what is being written, of all processes together, never exceed the limit if
    all give the same: space is taken in a common ledger before a byte is written. Without room the blocks
    used longest ago (within a minute) are evicted down to 7/8. What finds no room all the same, or a full
    or failing disk, is delivered and not kept.

    A process keeps up to 64 blocks open. The disk gets an evicted block's space back only when no process
    has it open: when that process next stores a block, or on `close`; at most 512 MiB per process.

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
                f"cache {folder}: a limit of {limit_bytes} bytes is less than one block of {BLOCK_BYTES}; "
                "give more"
            )
        self._folder, self._limit, self._patience = folder, limit_bytes, patience_seconds
        self._lock = threading.Lock()
        self._files: OrderedDict[str, _OpenFile] = OrderedDict()  # used longest ago first
        self._warned: set[int | None] = set()
        self._ledger_hangs = False
        self.hits = 0
        """Reads of a block that was there."""
        self.misses = 0
        """Blocks that were fetched."""
        self.evictions = 0
        """Blocks that this process removed to make room."""
        self.unstored = 0
        """Blocks that were fetched but not kept: no room, or the disk is full or failing."""
        try:
            for name in ("locks", "writing", *(f"{number:02x}" for number in range(256))):
                (folder / name).mkdir(parents=True, exist_ok=True)
            for number in range(_LOCKS):  # now, for a full disk has no room for them later
                self._lock_file(number).touch()
            # Whoever holds the ledger counts and sweeps already, or hangs: no reason to wait.
            with contextlib.suppress(TimeoutError), _locked(folder / "locks" / "ledger", 0.0) as ledger:
                os.pwrite(ledger, _count_bytes(self._make_room(0)), 0)
        except OSError as error:
            raise UserError(
                f"cache {folder}: cannot be used ({error.strerror or error}); name another folder"
            ) from error

    def read(
        self, shard_sha256: str, start: int, stop: int, size: int, load: Callable[[int, int], bytes]
    ) -> bytes:
        """Read a part of a shard, fetching the blocks that are not there.

        Args:
            shard_sha256: The shard's hash, hexadecimal in lower case.
            start: First byte.
            stop: Byte after the last.
            size: Bytes of the shard.
            load: Fetches the bytes [start, stop) it is given, all of them or it raises.

        Returns:
            The bytes [start, stop).

        Raises:
            Exception: What `load` raises.
        """
        assert 0 <= start <= stop <= size
        parts = []
        for block in range(start // BLOCK_BYTES, -(-stop // BLOCK_BYTES)):
            begin = block * BLOCK_BYTES
            end = min(begin + BLOCK_BYTES, size)
            first, last = max(start, begin) - begin, min(stop, end) - begin
            name = f"{shard_sha256}-{block}"
            data = self._look_up(name, first, last, end - begin)
            parts.append(self._fetch(name, first, last, begin, end, load) if data is None else data)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def drop(self, shard_sha256: str, start: int, stop: int) -> None:
        """Forget the blocks that hold these bytes of a shard: they are damaged."""
        for block in range(start // BLOCK_BYTES, -(-stop // BLOCK_BYTES)):
            self._discard(f"{shard_sha256}-{block}")

    def close(self) -> None:
        """Close the files that are kept open. Reading afterwards opens them again."""
        with self._lock:
            files, self._files = self._files, OrderedDict()
        files.clear()

    def _look_up(self, name: str, first: int, last: int, length: int) -> bytes | None:
        """Read [first, last) of a block of that length; None if it is not there or of no use."""
        try:
            file = self._files.get(name) or self._open(name)
            data = os.pread(file.fd, last - first, first)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._warn(error)
            self._discard(name)
            return None
        if file.size != length or len(data) != last - first:
            log.warning("%s: has the wrong length, fetching it again", self._path(name))
            self._discard(name)
            return None
        now = time.time()
        with self._lock:
            self.hits += 1
            if name in self._files:
                self._files.move_to_end(name)
        if abs(now - file.touched) > _TOUCH_SECONDS:
            file.touched = now
            with contextlib.suppress(OSError):  # only the order of eviction suffers
                os.utime(file.fd)
        return data

    def _open(self, name: str) -> "_OpenFile":
        file = _OpenFile(self._path(name))
        oldest = None  # keeps it open until the lock is released: closing may free 8 MiB of disk
        with self._lock:
            self._files[name] = file
            if len(self._files) > _OPEN_FILES:
                oldest = self._files.popitem(last=False)
        del oldest
        return file

    def _fetch(
        self, name: str, first: int, last: int, begin: int, end: int, load: Callable[[int, int], bytes]
    ) -> bytes:
        """Fetch the block [begin, end) of a shard, unless another does it meanwhile."""
        with _claimed(self._lock_file(zlib.crc32(name.encode()) % _LOCKS), self._patience):
            found = self._look_up(name, first, last, end - begin)
            if found is not None:
                return found
            data = load(begin, end)
            assert len(data) == end - begin
            with self._lock:
                self.misses += 1
            self._store(name, data)
            return data[first:last]

    def _store(self, name: str, data: bytes) -> None:
        """Keep a block if there is room for it."""
        self._close_evicted()
        kept = False
        try:
            temporary, fd = self._begin_writing(len(data))
            try:
                rest = memoryview(data)
                while rest:
                    rest = rest[os.write(fd, rest) :]
                temporary.rename(self._path(name))
                kept = True
            finally:
                if not kept:
                    temporary.unlink(missing_ok=True)
                os.close(fd)
        except OSError as error:
            self._warn(error)
        if not kept:
            with self._lock:
                self.unstored += 1

    def _begin_writing(self, size: int) -> tuple[Path, int]:
        """Take space in the ledger; returns a new file's path and descriptor, locked.

        What failed or was dropped stays in the ledger until the next count, so that it never says too little.
        """
        with self._ledger() as ledger:
            entry = os.pread(ledger, 8, 0)
            taken = int.from_bytes(entry, "little") if len(entry) == 8 else self._limit
            if taken + size > self._limit:
                taken = self._make_room(size)
            if taken + size > self._limit:
                os.pwrite(ledger, _count_bytes(taken), 0)
                raise BlockingIOError("all space is taken by blocks that are being written")
            os.pwrite(ledger, _count_bytes(taken + size), 0)
            temporary = self._folder / "writing" / f"{size}-{uuid.uuid4().hex}"
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            fcntl.flock(fd, fcntl.LOCK_EX)  # no sweeper comes before: it would hold the ledger
            return temporary, fd

    @contextlib.contextmanager
    def _ledger(self) -> Iterator[int]:
        """Hold the ledger. After its holder was found to hang nobody waits until it has let go."""
        patience = 0.0 if self._ledger_hangs else min(self._patience, _LEDGER_SECONDS)
        try:
            with _locked(self._folder / "locks" / "ledger", patience) as ledger:
                self._ledger_hangs = False
                yield ledger
        except TimeoutError:
            self._ledger_hangs = True
            raise

    def _make_room(self, size: int) -> int:
        """Count what is there, sweep what the dead left, evict if need be. Call with the ledger held.

        Args:
            size: Room that is needed.

        Returns:
            Bytes taken, without that room.
        """
        # First what is being written: it may become a block meanwhile, and is then counted twice, never not.
        taken = sum(_writing_bytes(path) for path in (self._folder / "writing").iterdir())
        blocks = []
        for number in range(256):
            with os.scandir(self._folder / f"{number:02x}") as entries:
                for entry in entries:
                    with contextlib.suppress(FileNotFoundError):
                        stat = entry.stat(follow_symlinks=False)
                        blocks.append((stat.st_mtime_ns, stat.st_size, entry.path))
                        taken += stat.st_size
        if taken + size <= self._limit:
            return taken
        target = max(self._limit - self._limit // _ROOM_SHARE - size, 0)
        for _, length, path in sorted(blocks):
            if taken <= target:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)  # noqa: PTH108 - a Path for each of 100,000 blocks takes longer than the rest
                with self._lock:
                    self.evictions += 1
            taken -= length
        return taken

    def _discard(self, name: str) -> None:
        with self._lock:
            file = self._files.pop(name, None)
        try:
            if file is None or not file.is_unlinked():  # else another has dropped it, and may have a new one
                self._path(name).unlink(missing_ok=True)
        except OSError as error:
            self._warn(error)

    def _close_evicted(self) -> None:
        with self._lock:
            gone = [self._files.pop(name) for name, file in [*self._files.items()] if file.is_unlinked()]
        del gone

    def _warn(self, error: OSError) -> None:
        """Say once of each kind of error that the cache goes without."""
        with self._lock:
            is_new = error.errno not in self._warned
            self._warned.add(error.errno)
        if is_new:
            log.warning("cache %s: %s; going on without it where need be", self._folder, error)

    def _path(self, name: str) -> Path:
        return self._folder / name[:2] / name

    def _lock_file(self, number: int) -> Path:
        return self._folder / "locks" / f"{number:03d}"


class _OpenFile:
    """A block's open file. Closed with its last reference: whoever is reading it holds one."""

    __slots__ = ("fd", "size", "touched")

    def __init__(self, path: Path) -> None:
        self.fd = -1
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        stat = os.fstat(self.fd)
        self.size, self.touched = stat.st_size, stat.st_mtime

    def is_unlinked(self) -> bool:
        """Tell whether the file was evicted or dropped."""
        return os.fstat(self.fd).st_nlink == 0

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


@contextlib.contextmanager
def _locked(path: Path, patience_seconds: float) -> Iterator[int]:
    """Hold a file's lock; threads exclude each other too. Yields its descriptor.

    Raises:
        TimeoutError: Its owner does not let it go for that long.
        OSError: It cannot be locked.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        _acquire(fd, path, patience_seconds)
        yield fd
    finally:
        os.close(fd)


def _acquire(fd: int, path: Path, patience_seconds: float) -> None:
    deadline, pause = time.monotonic() + patience_seconds, _PAUSE_SECONDS
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"{path}: held by another for over {patience_seconds:g} s") from error
            time.sleep(min(pause, left))
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)


@contextlib.contextmanager
def _claimed(path: Path, patience_seconds: float) -> Iterator[None]:
    """Hold a lock, or go on without: fetching twice is better than not at all."""
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):
            held.enter_context(_locked(path, patience_seconds))
        yield


def _writing_bytes(path: Path) -> int:
    """Return how many bytes a file that is being written will take; a dead writer's is removed."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:  # it has become a block
        return 0
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return int(path.name.partition("-")[0])
    else:
        path.unlink(missing_ok=True)  # or it was renamed meanwhile, and the name is gone
        return 0
    finally:
        os.close(fd)


def _count_bytes(count: int) -> bytes:
    return count.to_bytes(8, "little")
