import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import webdataset
from PIL import Image

from data_pipeline.build import BuildOptions, build, find_built
from data_pipeline.decode import decode
from data_pipeline.documents import sha256_hex
from data_pipeline.encoding import Encoding
from data_pipeline.errors import UserError
from data_pipeline.geometry import Geometry
from data_pipeline.index import RECORD, load_index, load_records
from data_pipeline.sources.digits import DigitsSource
from data_pipeline.sources.folder import FolderSource


def fill(folder: Path, count: int, *, size: tuple[int, int] = (12, 12), form: str = "png") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(5)
    for i in range(count):
        array = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(array).save(folder / f"{i:03d}.{form}")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def members(url: Path, split: str) -> dict[str, bytes]:
    """All picture bytes of a split by key, read through records alone."""
    loaded = load_index(str(url))
    found = {}
    for entry in loaded.shards(split):
        data = (url / entry.name).read_bytes()
        for record in load_records(loaded, entry.name):
            start, size = int(record["offset"]), int(record["size"])
            payload = data[start : start + size]
            assert google_crc32c.value(payload) == record["crc32c"]
            header = tarfile.TarInfo.frombuf(data[start - 512 : start], "utf-8", "strict")
            found[header.name.partition(".")[0]] = payload
    return found


def test_the_record_is_32_little_endian_bytes() -> None:
    assert RECORD.itemsize == 32
    record = np.array([(1, 2, 3, 4, 5, 6)], dtype=RECORD).tobytes()
    assert record.hex() == "0100000000000000020000000300000004000000000000000500000006000000"


def test_index_and_records_tell_the_truth(digits_url: str) -> None:
    url = Path(digits_url)
    loaded = load_index(digits_url)
    assert loaded.sha256 == sha256_hex((url / "index.json").read_bytes())
    numbers = []
    for split in ("train", "val"):
        for entry in loaded.shards(split):
            data = (url / entry.name).read_bytes()
            assert (len(data), sha256_hex(data)) == (entry.bytes, entry.sha256)
            assert entry.bytes <= 200_000
            numbers.append(int(entry.name[6:12]))
            records = load_records(loaded, entry.name)
            with tarfile.open(fileobj=io.BytesIO(data)) as tar:
                infos = tar.getmembers()
            assert [(i.offset_data, i.size) for i in infos[::2]] == records[["offset", "size"]].tolist()
            assert [(i.offset_data, i.size) for i in infos[1::2]] == records[
                ["meta_offset", "meta_size"]
            ].tolist()
            assert {(i.mtime, i.uid, i.gid, i.uname, i.gname, i.mode) for i in infos} == {
                (0, 0, 0, "", "", 0o644)
            }
    assert sorted(numbers) == list(range(len(numbers)))
    assert loaded.index.samples("train") + loaded.index.samples("val") == 1797
    assert 0.15 < loaded.index.samples("val") / 1797 < 0.25
    assert not (url / "unfinished.json").exists()
    assert not (url / "rejected.jsonl").exists()


def test_plain_webdataset_reads_the_same_bytes(digits_url: str) -> None:
    loaded = load_index(digits_url)
    for split in ("train", "val"):
        urls = [f"{digits_url}/{entry.name}" for entry in loaded.shards(split)]
        samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
        assert {sample["__key__"]: sample["png"] for sample in samples} == members(Path(digits_url), split)
        assert all(0 <= json.loads(sample["json"])["label"] <= 9 for sample in samples)


def test_pixels_survive_and_splits_are_disjoint(digits_url: str) -> None:
    train, val = members(Path(digits_url), "train"), members(Path(digits_url), "val")
    assert not train.keys() & val.keys()
    found = train | val
    for item in DigitsSource():
        np.testing.assert_array_equal(decode(found[item.key], 1), decode(item.data, 1))


def test_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    source = fill(tmp_path / "in", 40)
    options = BuildOptions(shard_bytes=20_480, val_fraction=0.3, size=16)
    for out in ("one", "other"):
        build(FolderSource(source), str(tmp_path / out), options)
    assert contents(tmp_path / "one") == contents(tmp_path / "other")
    assert len(contents(tmp_path / "one")) > 7, "several shards"


def test_same_build_again_changes_nothing(tmp_path: Path) -> None:
    source, out = fill(tmp_path / "in", 20), tmp_path / "out"
    options = BuildOptions(val_fraction=0.3)
    index = build(FolderSource(source), str(out), options)
    before = {file: file.stat().st_mtime_ns for file in out.iterdir()}
    assert build(FolderSource(source), str(out), options) == index
    assert {file: file.stat().st_mtime_ns for file in out.iterdir()} == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (BuildOptions(val_fraction=0.4), "build"),
        (BuildOptions(val_fraction=0.3, size=8), "size, geometry"),
        (BuildOptions(val_fraction=0.3, channels=1), "channels"),
        (None, "the source's pictures"),
    ],
)
def test_another_data_set_is_never_overwritten(
    tmp_path: Path, change: BuildOptions | None, named: str
) -> None:
    source, out = fill(tmp_path / "in", 20), tmp_path / "out"
    build(FolderSource(source), str(out), BuildOptions(val_fraction=0.3))
    before = contents(out)
    if change is None:
        (source / "000.png").unlink()
    with pytest.raises(UserError, match=f"already holds.*{named}"):
        build(FolderSource(source), str(out), change or BuildOptions(val_fraction=0.3))
    assert contents(out) == before


def test_foreign_shards_are_never_overwritten(tmp_path: Path) -> None:
    source, out = fill(tmp_path / "in", 20), tmp_path / "out"
    out.mkdir()
    (out / "shard-000000.tar").write_bytes(b"someone else's")
    with pytest.raises(UserError, match="did not write"):
        build(FolderSource(source), str(out))
    assert contents(out) == {"shard-000000.tar": b"someone else's"}


def test_unreadable_within_the_budget_is_reported(tmp_path: Path) -> None:
    source = fill(tmp_path / "in", 30)
    (source / "005.png").write_bytes((source / "005.png").read_bytes()[:100])
    index = build(FolderSource(source), str(tmp_path / "out"), BuildOptions(val_fraction=0.3))
    assert index.rejected == 1
    assert index.samples("train") + index.samples("val") == 29
    (line,) = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    row = json.loads(line)
    assert (row["schema"], row["path"]) == ("rejected/1", "005.png")
    assert "damaged" in row["reason"]


def test_too_many_unreadable_end_the_build(tmp_path: Path) -> None:
    source, out = fill(tmp_path / "in", 30), tmp_path / "out"
    for name in ("005.png", "006.png"):
        (source / name).write_bytes(b"<html>")
    with pytest.raises(UserError, match=r"^006\.png: not a picture.*at most 1 of 30"):
        build(FolderSource(source), str(out))
    assert not (out / "index.json").exists()
    assert (out / "unfinished.json").exists()
    assert len((out / "rejected.jsonl").read_text().splitlines()) == 2
    # The budget is a share: the same two are fine when 10 % may be.
    index = build(FolderSource(source), str(out), BuildOptions(max_rejected=0.1, val_fraction=0.3))
    assert index.rejected == 2


@pytest.mark.parametrize(
    ("files", "options", "named"),
    [
        ({}, BuildOptions(), "no pictures"),
        ({"a.txt": b"hello"}, BuildOptions(), "no pictures"),
        ({"a.png": b"hello"}, BuildOptions(), "none of its pictures can be read"),
        (20, BuildOptions(val_fraction=1e-9), "none fell to the split 'val'"),
        (20, BuildOptions(val_fraction=1 - 1e-9), "none fell to the split 'train'"),
        (2, BuildOptions(val_fraction=0.0), "--val-fraction"),
        (2, BuildOptions(size=0), "--size"),
        (2, BuildOptions(channels=2), "--channels"),
        (2, BuildOptions(geometry=Geometry.DDPM_LSUN), "needs --size"),
        (2, BuildOptions(size=8, geometry=Geometry.NONE), "000.png: 12 x 12 pixels, not 8 x 8"),
        (2, BuildOptions(size=8, geometry=Geometry.DDPM_LSUN, encoding=Encoding.SOURCE), "keeps the bytes"),
    ],
)
def test_impossible_builds_are_refused(
    tmp_path: Path, files: object, options: BuildOptions, named: str
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    if isinstance(files, dict):
        for name, data in files.items():
            (source / name).write_bytes(data)
    else:
        assert isinstance(files, int)
        fill(source, files)
    with pytest.raises(UserError, match=named):
        build(FolderSource(source), str(tmp_path / "out"), options)
    assert not (tmp_path / "out" / "index.json").exists()


def test_pictures_of_several_shapes_need_a_size(tmp_path: Path) -> None:
    source = fill(tmp_path / "in", 12)
    fill(source / "wide", 12, size=(30, 20), form="jpg")
    with pytest.raises(UserError, match=r"wide/000\.jpg: 30 x 20 pixels, not 12 x 12; give --size"):
        build(FolderSource(source), str(tmp_path / "out"), BuildOptions(val_fraction=0.3))
    index = build(FolderSource(source), str(tmp_path / "out"), BuildOptions(val_fraction=0.3, size=16))
    assert (index.geometry.name, index.geometry.size, index.geometry.channels) == ("ddpm-lsun", 16, 3)
    found = members(tmp_path / "out", "train") | members(tmp_path / "out", "val")
    assert {decode(data, 3).shape for data in found.values()} == {(16, 16, 3)}


def test_source_encoding_keeps_the_bytes(tmp_path: Path) -> None:
    source = fill(tmp_path / "in", 20, form="jpg")
    options = BuildOptions(encoding=Encoding.SOURCE, val_fraction=0.3)
    build(FolderSource(source), str(tmp_path / "out"), options)
    found = members(tmp_path / "out", "train") | members(tmp_path / "out", "val")
    assert set(found.values()) == {file.read_bytes() for file in source.iterdir()}
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.new("RGB", (12, 12)).save(source / "turned.jpg", exif=exif)
    with pytest.raises(UserError, match=r"turned\.jpg: turned by its EXIF"):
        build(FolderSource(source), str(tmp_path / "other"), options)
    with pytest.raises(UserError, match="keeps jpg, png, webp only"):
        build(DigitsSource(), str(tmp_path / "digits"), BuildOptions(encoding=Encoding.SOURCE))


BUILD = """
import sys
from data_pipeline.build import BuildOptions, build
from data_pipeline.errors import UserError
from data_pipeline.sources.folder import FolderSource

class Pausing(FolderSource):
    def __iter__(self):
        for number, item in enumerate(super().__iter__()):
            if str(number) == sys.argv[3]:
                print("paused", flush=True)
                sys.stdin.read()
            yield item

try:
    build(Pausing(sys.argv[1]), sys.argv[2], BuildOptions(shard_bytes=20_480, val_fraction=0.3, size=12))
except UserError as error:
    print(error)
    sys.exit(2)
"""


def test_full_disk_is_a_users_mistake(tmp_path: Path) -> None:
    """A real limit of the operating system: writes beyond 15 kB fail with EFBIG."""
    source, scratch = fill(tmp_path / "in", 80), tmp_path / "scratch"
    scratch.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(source), str(tmp_path / "out"), "never"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, 15_000)),
        env={**os.environ, "TMPDIR": str(scratch)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert "no space left for the shard in the making (File too large)" in done.stdout
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "index.json").exists()
    assert list(scratch.iterdir()) == []


def test_a_killed_build_looks_unfinished_and_is_repeated(tmp_path: Path) -> None:
    source, out = fill(tmp_path / "in", 80), tmp_path / "out"
    with subprocess.Popen(
        [sys.executable, "-c", BUILD, str(source), str(out), "70"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"paused\n"
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert (out / "shard-000002.tar").exists()
    assert not (out / "index.json").exists()
    with pytest.raises(UserError, match="no finished data set"):
        load_index(str(out))
    shutil.copy(out / "shard-000002.tar", out / "shard-000099.tar")  # of a broken-off build with more shards
    options = BuildOptions(shard_bytes=20_480, val_fraction=0.3, size=12)
    assert find_built(FolderSource(source), str(out), options) is None
    build(FolderSource(source), str(out), options)
    build(FolderSource(source), str(tmp_path / "clean"), options)
    assert contents(out) == contents(tmp_path / "clean")
