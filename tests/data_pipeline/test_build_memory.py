"""Memory of a build does not grow with the number of pictures: measured on the processes themselves."""

import os
import struct
import subprocess
import sys
import time
import zlib
from collections import defaultdict
from pathlib import Path
from typing import Final

import lmdb
import numpy as np
import psutil
import pytest

from data_pipeline.index import INDEX_FILE, RECORD, load_index

_MB: Final = 1 << 20
_QUARTER: Final = 59 * 256  # whole runs
_BUILD_ARRAY: Final = """
import sys
from data_pipeline.build import BuildOptions, build
from data_pipeline.encoding import Encoding
from data_pipeline.sources.arrays import ArraySource

def kilobytes(name):
    with open("/proc/self/status") as status:
        return next(line.split()[1] for line in status if line.startswith(name))

class Watched(ArraySource):
    def read(self, first, places):
        if first % int(sys.argv[3]) == 0:
            print(kilobytes("RssAnon"))
        return super().read(first, places)

build(Watched(sys.argv[1]), sys.argv[2], BuildOptions(encoding=Encoding.parse("raw")))
print(kilobytes("VmHWM"))
"""
_BUILD_DATABASE: Final = """
import sys
from data_pipeline.build import BuildOptions, build
from data_pipeline.encoding import Encoding
from data_pipeline.sources.lsun import LsunSource

build(LsunSource(sys.argv[1]), sys.argv[2], BuildOptions(size=1, encoding=Encoding.SOURCE), workers=2)
"""


def start(program: str, source: Path, out: Path, scratch: Path) -> subprocess.Popen[str]:
    scratch.mkdir()
    return subprocess.Popen(
        [sys.executable, "-c", program, str(source), str(out), str(_QUARTER)],
        env={**os.environ, "TMPDIR": str(scratch), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def test_four_times_the_pictures_take_no_more_memory(tmp_path: Path) -> None:
    counts = (_QUARTER, 4 * _QUARTER)
    builds = []
    for count in counts:
        pixels = np.zeros((count, 2, 2, 3), dtype=np.uint8)  # all different: the first 4 bytes count
        pixels.reshape(count, 12)[:, :4] = np.arange(count, dtype="<u4").view(np.uint8).reshape(count, 4)
        source = tmp_path / f"{count}.npy"
        np.save(source, pixels)
        builds.append(start(_BUILD_ARRAY, source, tmp_path / str(count), tmp_path / f"scratch-{count}"))
    (_, quarter_peak), (_, *quarters, peak) = (
        [1024 * int(line) for line in process.communicate()[0].split()] for process in builds
    )
    for count in counts:
        index = load_index(str(tmp_path / str(count))).index
        assert index.samples("train") + index.samples("val") == count
        assert index.duplicates == 0
    # What is kept of each picture are hashes of hashes, half a byte; all else comes and goes.
    assert len(quarters) == 3
    assert quarters[-1] - quarters[0] < 0.6 * _MB, [each / _MB for each in quarters]
    # At the end all is sorted to find duplicates: at most 131,072 at once, and at most 150 bytes for each.
    assert peak - quarter_peak < 3 * _QUARTER * 150, [quarter_peak / _MB, peak / _MB]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_three_million_pictures(tmp_path: Path) -> None:
    """As many as LSUN's bedrooms, in two processes; prints what it took."""
    count, source, out = 3_000_000, tmp_path / "tiny_lmdb", tmp_path / "out"
    write_tiny_database(source, count)
    began = time.monotonic()
    process = start(_BUILD_DATABASE, source, out, tmp_path / "scratch")
    coordinator, worker = watch(process)
    seconds = time.monotonic() - began
    assert process.returncode == 0
    loaded = load_index(str(out))
    entries = [entry for split in ("train", "val") for entry in loaded.shards(split)]
    index_bytes = (out / INDEX_FILE).stat().st_size
    print(
        f"{count} pictures in {seconds:.0f} s, {count / seconds:.0f} img/s; peak of the coordinator "
        f"{coordinator / _MB:.0f} MB, of a worker {worker / _MB:.0f} MB; {len(entries)} shards, "
        f"index.json {index_bytes} bytes"
    )
    assert sum(entry.samples for entry in entries) == loaded.index.kept == count
    assert (loaded.index.rejected, loaded.index.duplicates) == (0, 0)
    for entry in entries:
        assert (out / entry.name).stat().st_size == entry.bytes
        assert (out / entry.idx_name).stat().st_size == entry.samples * RECORD.itemsize
    assert coordinator < 100 * _MB
    assert worker < 100 * _MB


def watch(process: subprocess.Popen[str]) -> tuple[int, int]:
    """Wait for a build; return the peak of its memory and the largest of its workers', mapped files apart."""
    peaks: defaultdict[int, int] = defaultdict(int)
    while True:
        try:
            process.wait(timeout=0.1)
        except subprocess.TimeoutExpired:
            for pid in (process.pid, *(child.pid for child in psutil.Process(process.pid).children())):
                peaks[pid] = max(peaks[pid], anonymous_bytes(pid))
            continue
        return peaks.pop(process.pid), max(peaks.values())


def anonymous_bytes(pid: int) -> int:
    """Resident memory of a process without the pages of mapped files; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def write_tiny_database(folder: Path, count: int) -> None:
    """An LMDB as LSUN's, of PNGs of one pixel that differ in a comment."""

    def chunk(name: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + checksum

    header = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"\0\x80\x90\xa0")) + chunk(b"IEND", b"")
    with (
        lmdb.open(str(folder), map_size=1 << 40, sync=False) as environment,
        environment.begin(write=True) as transaction,
    ):
        for number in range(count):
            picture = header + chunk(b"tEXt", b"Comment\0%09d" % number) + pixels
            transaction.put(b"%040x" % number, picture, append=True)
