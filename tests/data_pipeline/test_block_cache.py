import fcntl
import hashlib
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline import ImageStream
from data_pipeline.block_cache import BLOCK_BYTES, BlockCache
from data_pipeline.errors import UserError

SIZE = 2 * BLOCK_BYTES + 1000
CONTENT = np.random.default_rng(0).bytes(SIZE)
SHA = hashlib.sha256(CONTENT).hexdigest()


class Store:
    """The shard itself; keeps what was asked of it."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def load(self, start: int, stop: int) -> bytes:
        self.asked.append((start, stop))
        return CONTENT[start:stop]


def blocks(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("??/*") if path.is_file())


def test_blocks_are_fetched_once_and_aligned(tmp_path: Path) -> None:
    cache, store = BlockCache(tmp_path, 10 * BLOCK_BYTES), Store()
    assert cache.read(SHA, 5, 25, SIZE, store.load) == CONTENT[5:25]
    assert cache.read(SHA, 100, 200, SIZE, store.load) == CONTENT[100:200]
    assert store.asked == [(0, BLOCK_BYTES)]
    border = 2 * BLOCK_BYTES
    assert cache.read(SHA, border - 7, border + 9, SIZE, store.load) == CONTENT[border - 7 : border + 9]
    assert store.asked[1:] == [(BLOCK_BYTES, border), (border, SIZE)]
    assert (cache.hits, cache.misses) == (1, 3)
    assert BlockCache(tmp_path, 10 * BLOCK_BYTES).read(SHA, 1, 2, SIZE, store.load) == CONTENT[1:2]
    assert len(store.asked) == 3, "another process finds them"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.integers(0, SIZE - 1), st.integers(1, SIZE))
def test_any_range(tmp_path: Path, start: int, length: int) -> None:
    stop = min(start + length, SIZE)
    cache = BlockCache(tmp_path, 10 * BLOCK_BYTES)
    assert cache.read(SHA, start, stop, SIZE, Store().load) == CONTENT[start:stop]


def test_dropped_and_shortened_blocks_are_fetched_again(tmp_path: Path) -> None:
    cache, store = BlockCache(tmp_path, 10 * BLOCK_BYTES), Store()
    cache.read(SHA, 0, SIZE, SIZE, store.load)
    cache.drop(SHA, BLOCK_BYTES, BLOCK_BYTES + 1)
    assert len(blocks(tmp_path)) == 2
    first = tmp_path / SHA[:2] / f"{SHA}-0"
    first.write_bytes(first.read_bytes()[:-1])
    assert cache.read(SHA, 0, SIZE, SIZE, store.load) == CONTENT
    assert store.asked[3:] == [(0, BLOCK_BYTES), (BLOCK_BYTES, 2 * BLOCK_BYTES)]


def test_threads_that_want_the_same_block_fetch_it_once(tmp_path: Path) -> None:
    cache, store, together = BlockCache(tmp_path, 10 * BLOCK_BYTES), Store(), threading.Barrier(6)

    def want() -> None:
        together.wait()
        assert cache.read(SHA, 0, 10, SIZE, store.load) == CONTENT[:10]

    threads = [threading.Thread(target=want) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store.asked) == 1


HAMMER = """
import sys
from pathlib import Path
import random
from data_pipeline.block_cache import BLOCK_BYTES, BlockCache
cache = BlockCache(Path(sys.argv[1]), 6 * BLOCK_BYTES)
draw = random.Random(sys.argv[2])
for _ in range(60):
    shard = draw.randrange(12)
    data = cache.read(f"{shard:064x}", 3, 9, BLOCK_BYTES, lambda start, stop: bytes([shard]) * (stop - start))
    assert data == bytes([shard]) * 6
print(cache.evictions)
"""


def bytes_of_stopped(workers: list[subprocess.Popen[str]], folder: Path) -> int:
    """What is on the disk, finished or not, at one moment of all workers."""
    for worker in workers:
        if worker.poll() is None:
            worker.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, worker.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    total = sum(path.stat().st_size for path in folder.rglob("*-*") if path.is_file())
    for worker in workers:
        if worker.poll() is None:
            worker.send_signal(signal.SIGCONT)
    return total


def test_processes_together_stay_within_the_limit(tmp_path: Path) -> None:
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", HAMMER, str(tmp_path), str(number)], stdout=subprocess.PIPE, text=True
        )
        for number in range(2)
    ]
    most = 0
    while any(worker.poll() is None for worker in workers):
        most = max(most, bytes_of_stopped(workers, tmp_path))
    evictions = [int(worker.communicate()[0]) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    assert sum(evictions) > 0
    assert 3 * BLOCK_BYTES < most <= 6 * BLOCK_BYTES


def test_the_longest_unused_goes_first(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, 4 * BLOCK_BYTES)
    for number in range(5):
        cache.read(f"{number:064x}", 0, 1, BLOCK_BYTES, lambda start, stop: bytes(stop - start))
        for age, path in enumerate(blocks(tmp_path)):
            os.utime(path, (age, age))
    assert cache.evictions > 0
    assert not list(tmp_path.glob(f"??/{0:064x}-0"))
    assert list(tmp_path.glob(f"??/{4:064x}-0"))


DIES_FETCHING = """
import os, signal, sys
from pathlib import Path
from data_pipeline.block_cache import BlockCache
def load(start, stop):
    print("fetching", flush=True)
    sys.stdin.read()
BlockCache(Path(sys.argv[1]), 1 << 30).read("ab" * 32, 0, 1, 100, load)
"""


def test_neither_dead_nor_hanging_owners_hold_others_up(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", DIES_FETCHING, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "fetching\n"
        hanging = BlockCache(tmp_path, 1 << 30, patience_seconds=0.1)
        assert hanging.read("ab" * 32, 0, 1, 100, lambda start, stop: b"x" * 100) == b"x"
        hanging.drop("ab" * 32, 0, 1)
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        after = BlockCache(tmp_path, 1 << 30, patience_seconds=1e9)
        assert after.read("ab" * 32, 0, 1, 100, lambda start, stop: b"y" * 100) == b"y"


DIES_WRITING = """
import sys
from pathlib import Path
from data_pipeline.block_cache import BLOCK_BYTES, BlockCache
written = BlockCache(Path(sys.argv[1]), 1 << 30)._begin_writing(BLOCK_BYTES)
print("writing", flush=True)
sys.stdin.read()
"""


def test_what_killed_writers_left_is_removed_and_living_ones_keep_theirs(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", DIES_WRITING, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "writing\n"
        BlockCache(tmp_path, 1 << 30)
        assert len(list((tmp_path / "writing").iterdir())) == 1
        narrow = BlockCache(tmp_path, BLOCK_BYTES)
        assert narrow.read(SHA, 0, 9, SIZE, Store().load) == CONTENT[:9]
        assert narrow.unstored == 1, "the space of what is being written is taken"
        writer.kill()
        writer.wait()
        BlockCache(tmp_path, 1 << 30)
        assert list((tmp_path / "writing").iterdir()) == []


def test_a_hanging_evictor_costs_the_keeping_only(tmp_path: Path) -> None:
    cache, store = BlockCache(tmp_path, 1 << 30, patience_seconds=0.05), Store()
    with (tmp_path / "locks" / "ledger").open("rb") as ledger:
        fcntl.flock(ledger, fcntl.LOCK_EX)
        BlockCache(tmp_path, 1 << 30)  # a start does not wait for it either
        assert cache.read(SHA, 0, SIZE, SIZE, store.load) == CONTENT
        assert cache.unstored == 3
    assert cache.read(SHA, 0, SIZE, SIZE, store.load) == CONTENT
    assert (cache.unstored, len(blocks(tmp_path))) == (3, 3)


SWEEPS = """
import sys
from pathlib import Path
from data_pipeline.block_cache import BlockCache
print("begun", flush=True)
for _ in range(150):
    BlockCache(Path(sys.argv[1]), 1 << 30)
"""


def test_sweepers_never_touch_what_is_being_written(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, 1 << 30)
    with subprocess.Popen(
        [sys.executable, "-c", SWEEPS, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as sweeper:
        assert sweeper.stdout is not None
        assert sweeper.stdout.readline() == "begun\n"
        count = 0
        while sweeper.poll() is None:
            cache.read(f"{count:064x}", 0, 1, 100, lambda start, stop: bytes(stop - start))
            count += 1
    assert sweeper.returncode == 0
    assert count > 0
    assert cache.unstored == 0
    assert len([path for path in blocks(tmp_path) if path.parent.name == "00"]) == count


FULL_DISK = """
import sys
from pathlib import Path
from data_pipeline.block_cache import BlockCache
cache = BlockCache(Path(sys.argv[1]), 1 << 30)
assert cache.read("ab" * 32, 2, 4, 100_000, lambda start, stop: bytes(range(250)) * 400) == bytes([2, 3])
print(cache.unstored)
"""


def test_a_full_disk_costs_the_cache_only(tmp_path: Path) -> None:
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], preexec_fn=limit, capture_output=True, text=True
    )
    assert (done.stdout, done.returncode) == ("1\n", 0), done.stderr
    assert "File too large; going on without it" in done.stderr
    assert blocks(tmp_path) == []


def test_unusable_folders_and_limits_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="limit of 5 bytes is less than one block"):
        BlockCache(tmp_path, 5)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"cache .*file/x: cannot be used \(Not a directory\)"):
        BlockCache(tmp_path / "file" / "x", 1 << 30)


def test_a_stream_through_the_cache_reads_the_store_once(digits_url: str, tmp_path: Path) -> None:
    def epochs(cache: BlockCache | None) -> tuple[list[bytes], int]:
        with ImageStream(digits_url, seed=1, global_batch=100, window_shards=3, cache=cache) as stream:
            return [next(stream).images.tobytes() for _ in range(30)], stream.counts.bytes

    expected, _ = epochs(None)
    first, read = epochs(BlockCache(tmp_path, 1 << 30))
    again, read_again = epochs(BlockCache(tmp_path, 1 << 30))
    assert first == again == expected
    assert read > 0
    assert read_again == 0


def test_a_damaged_block_is_dropped_and_read_again(digits_url: str, tmp_path: Path) -> None:
    with ImageStream(digits_url, seed=1, global_batch=100, cache=BlockCache(tmp_path, 1 << 30)) as stream:
        expected = [next(stream).images.tobytes() for _ in range(15)]
    for path in blocks(tmp_path):
        data = bytearray(path.read_bytes())
        for place in range(0, len(data), 40):
            data[place] ^= 1
        path.write_bytes(data)
    with ImageStream(digits_url, seed=1, global_batch=100, cache=BlockCache(tmp_path, 1 << 30)) as stream:
        assert [next(stream).images.tobytes() for _ in range(15)] == expected
        assert stream.counts.rereads > 0
