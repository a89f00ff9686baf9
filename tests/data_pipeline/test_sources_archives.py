"""What zip and tar archives have in common, and compressed tars."""

import bz2
import gzip
import lzma
import os
import pickle
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.errors import UserError
from data_pipeline.sources import Source
from data_pipeline.sources.tar_archive import TarSource
from data_pipeline.sources.zip_archive import ZipSource
from tests.data_pipeline.archive_support import (
    SOUND,
    contents,
    files_in,
    picture,
    write_tar,
    write_zip_of,
)

BOTH = pytest.mark.parametrize(("make", "write"), [(ZipSource, write_zip_of), (TarSource, write_tar)])


@BOTH
def test_archives_take_labels_of_their_folders(
    tmp_path: Path, make: Callable[..., Source], write: Callable[[Path, dict[str, bytes]], Path]
) -> None:
    names = ["b/1.png", "./a/x/2.png", "b/3.png", "é/4.png"]
    for above in ("", "set/", "./set/"):
        files = {f"{above}{name}": picture() for name in names} | {f"{above}readme.txt": b"hello"}
        path = write(tmp_path / "archive", files)
        source = make(path, labels=True)
        assert source.classes == ("a", "b", "é")
        copy = pickle.loads(pickle.dumps(source))
        found = {item.where: item.meta["label"] for item in copy.read(0, list(source.places()))}
        assert found == dict(zip((f"{above}{name}" for name in names), [1, 0, 1, 2], strict=True))
    one = make(write(tmp_path / "one", {"a/1.png": picture(), "a/b/2.png": picture()}), labels=True)
    assert one.classes == ("a",)
    write(tmp_path / "root", {"a/1.png": picture(), "2.png": picture()})
    with pytest.raises(UserError, match=r"2\.png: lies in no folder.*build without labels"):
        make(tmp_path / "root", labels=True)


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "two gzips": lambda data: gzip.compress(data[:700]) + gzip.compress(data[700:]),
    "bzip2": bz2.compress,
    "xz": lzma.compress,
}


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_compressed_tar_is_unpacked_once_and_removed(tmp_path: Path, scratch: Path, compression: str) -> None:
    plain = write_tar(tmp_path / "plain", SOUND)
    packed = tmp_path / "pets.tar.anything"
    packed.write_bytes(COMPRESSIONS[compression](plain.read_bytes()))
    source = TarSource(packed)
    (unpacked,) = scratch.rglob("archive.tar")
    assert unpacked.read_bytes() == plain.read_bytes()
    assert contents(source) == SOUND
    with pytest.raises(UserError, match="the same unpack is running on this machine already"):
        TarSource(packed)
    copy = pickle.loads(pickle.dumps(source))
    assert list(copy.read(0, list(source.places()))) == list(source)
    copy.close()
    assert unpacked.exists()
    source.close()
    source.close()
    assert files_in(scratch) == []


def test_compressed_tar_takes_over_what_a_killed_job_unpacked(tmp_path: Path, scratch: Path) -> None:
    packed = tmp_path / "pets.tgz"
    packed.write_bytes(gzip.compress(write_tar(tmp_path / "plain", SOUND).read_bytes()))
    program = (
        "import os, sys; from data_pipeline.sources.tar_archive import TarSource;"
        "source = TarSource(sys.argv[1]); os._exit(9)"
    )
    subprocess.run(
        [sys.executable, "-c", program, str(packed)], env={**os.environ, "TMPDIR": str(scratch)}, check=False
    )
    (left,) = scratch.rglob("archive.tar")
    os.utime(left, ns=(1, 1))
    (left.parent / "archive.tar.part").write_bytes(b"of an earlier one")
    source = TarSource(packed)
    assert left.stat().st_mtime_ns == 1  # not written anew
    assert (contents(source), source.name) == (SOUND, "pets")
    source.close()


def test_compressed_tar_is_unpacked_anew_if_its_unpacking_was_killed(tmp_path: Path, scratch: Path) -> None:
    plain = write_tar(tmp_path / "plain", {f"{number}.png": bytes(1 << 20) for number in range(9)})
    packed = tmp_path / "pets.tgz"
    packed.write_bytes(gzip.compress(plain.read_bytes(), 1))
    program = (  # the kernel kills it in the middle of a write
        "import resource, signal, sys; from data_pipeline.sources.tar_archive import TarSource;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_DFL);"
        "resource.setrlimit(resource.RLIMIT_CORE, (0, 0));"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5 << 20, 5 << 20)); TarSource(sys.argv[1])"
    )
    killed = subprocess.run(
        [sys.executable, "-c", program, str(packed)], env={**os.environ, "TMPDIR": str(scratch)}, check=False
    )
    assert killed.returncode == -signal.SIGXFSZ
    assert len(files_in(scratch)) == 1
    source = TarSource(packed)
    assert len(contents(source)) == 9
    source.close()
    assert files_in(scratch) == []


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_compressed_tar_cut_or_damaged_is_refused(tmp_path: Path, scratch: Path, compression: str) -> None:
    plain = write_tar(tmp_path / "plain", {f"{n}.png": os.urandom(9000) for n in range(5)})
    whole = COMPRESSIONS[compression](plain.read_bytes())
    packed = tmp_path / "a.tgz"
    for length in (8, len(whole) // 3, len(whole) - 1):
        packed.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"a\.tgz: (is cut short|cannot be unpacked|no tar)"):
            TarSource(packed)
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 0x55
    packed.write_bytes(damaged)
    with pytest.raises(UserError, match=r"a\.tgz: (cannot be unpacked \(.*\); download|no tar)"):
        TarSource(packed)
    packed.write_bytes(COMPRESSIONS[compression](b"no tar at all" * 100))
    with pytest.raises(UserError, match=r"a\.tgz: no tar archive"):
        TarSource(packed)
    assert files_in(scratch) == []


def test_compressed_tar_names_the_disk_it_needs(tmp_path: Path, scratch: Path) -> None:
    plain = write_tar(tmp_path / "plain", {"a.png": bytes(30 << 20)})
    packed = tmp_path / "a.tgz"
    packed.write_bytes(gzip.compress(plain.read_bytes(), 1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5 << 20, limits[1]))  # the kernel refuses, as on a full disk
    try:
        with pytest.raises(UserError, match=r"a\.tgz: needs 30\.0 MiB unpacked.*free\); set TMPDIR"):
            TarSource(packed)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files_in(scratch) == []


def test_other_processes_read_by_place(tmp_path: Path, scratch: Path) -> None:
    zipped = ZipSource(write_zip_of(tmp_path / "a.zip", SOUND))
    plain = write_tar(tmp_path / "a.tar", SOUND)
    (tmp_path / "a.tgz").write_bytes(gzip.compress(plain.read_bytes()))
    sources: list[Source] = [zipped, TarSource(plain), TarSource(tmp_path / "a.tgz")]
    items = [list(source) for source in sources]  # handles are open by now
    order = pickle.dumps([(source, list(source.places())) for source in sources])
    program = (
        "import pickle, sys; order = pickle.load(sys.stdin.buffer);"
        "done = [[*s.read(2, p[2:]), *s.read(0, p[:2])] for s, p in order];"
        "sys.stdout.buffer.write(pickle.dumps(done))"
    )
    answer = subprocess.run([sys.executable, "-c", program], input=order, stdout=subprocess.PIPE, check=True)
    assert pickle.loads(answer.stdout) == [[*found[2:], *found[:2]] for found in items]
    for source in sources:
        source.close()
