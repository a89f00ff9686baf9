import io
import json
import os
import resource
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import webdataset
from PIL import Image

from data_pipeline.build import BuildOptions, Grain, build
from data_pipeline.decode import decode
from data_pipeline.documents import sha256_hex
from data_pipeline.encoding import Encoding
from data_pipeline.errors import UserError
from data_pipeline.geometry import Geometry
from data_pipeline.index import RECORD, load_index, load_records
from data_pipeline.scratch import ScratchFolder
from data_pipeline.sources import Item
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
        for record in load_records(loaded, entry):
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
            records = load_records(loaded, entry)
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
    with pytest.raises(
        UserError, match=r"^2 of 30 pictures.*at most 1 may be; first 005\.png: not a picture"
    ):
        build(FolderSource(source), str(out), BuildOptions(val_fraction=0.3))
    assert not (out / "index.json").exists()
    assert (out / "unfinished.json").exists()
    assert len((out / "rejected.jsonl").read_text().splitlines()) == 2
    shards = {file: file.stat().st_mtime_ns for file in out.glob("shard-*")}
    # The budget is a share: the same two are fine when 10 % may be, and nothing is written again.
    index = build(FolderSource(source), str(out), BuildOptions(max_rejected=0.1, val_fraction=0.3))
    assert index.rejected == 2
    assert {file: file.stat().st_mtime_ns for file in out.glob("shard-*")} == shards


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
    turned = Image.new("RGB", (12, 12))
    turned.putpixel((0, 0), (255, 0, 0))
    turned.save(source / "turned.png", exif=exif)
    index = build(FolderSource(source), str(tmp_path / "other"), options)
    assert index.kept == 20, "what must be turned cannot keep its bytes"
    found = members(tmp_path / "other", "train") | members(tmp_path / "other", "val")
    assert decode(found["000000020"], 3)[11, 11].tolist() == [255, 0, 0]


BUILD = """
import sys
from data_pipeline.build import BuildOptions, build
from data_pipeline.errors import UserError
from data_pipeline.sources.folder import FolderSource

try:
    build(FolderSource(sys.argv[1]), sys.argv[2], BuildOptions(shard_bytes=20_480, val_fraction=0.3, size=12))
except UserError as error:
    print(error)
    sys.exit(2)
"""


def test_full_disk_is_a_users_mistake(tmp_path: Path) -> None:
    """A real limit of the operating system: writes beyond 15 kB fail with EFBIG."""
    source, scratch = fill(tmp_path / "in", 80), tmp_path / "scratch"
    scratch.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(source), str(tmp_path / "out")],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, 15_000)),
        env={**os.environ, "TMPDIR": str(scratch)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert "no space left for what is in the making (File too large)" in done.stdout
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "index.json").exists()
    assert [file for file in scratch.rglob("*") if file.is_file() and file.suffix != ".lock"] == []


@pytest.mark.parametrize("workers", [2, 4])
def test_any_number_of_processes_gives_the_same_bytes(tmp_path: Path, workers: int) -> None:
    source = fill(tmp_path / "in", 400)
    (source / "017.png").write_bytes(b"broken")
    (source / "399.png").write_bytes((source / "398.png").read_bytes())
    options = BuildOptions(val_fraction=0.3, shard_bytes=51_200, size=16)
    build(FolderSource(source), str(tmp_path / "one"), options)
    build(
        FolderSource(source), str(tmp_path / "many"), options, workers=workers, grain=Grain(run=64, segment=2)
    )
    found = contents(tmp_path / "many")
    assert found == contents(tmp_path / "one")
    assert len(found) > 20
    assert {"rejected.jsonl", "duplicates.jsonl"} <= found.keys()


def test_duplicates_are_reported_and_stay_on_one_side(tmp_path: Path) -> None:
    source = fill(tmp_path / "in", 60)
    for copy, original in {"100.png": "007.png", "101.png": "007.png", "102.png": "031.png"}.items():
        shutil.copy(source / original, source / copy)
    index = build(FolderSource(source), str(tmp_path / "out"), BuildOptions(val_fraction=0.4))
    assert index.duplicates == 3
    rows = [json.loads(line) for line in (tmp_path / "out" / "duplicates.jsonl").read_text().splitlines()]
    assert [row["paths"] for row in rows] == [["007.png", "100.png", "101.png"], ["031.png", "102.png"]]
    train, val = (set(members(tmp_path / "out", split).values()) for split in ("train", "val"))
    assert not train & val


def test_a_data_set_with_its_own_split(tmp_path: Path) -> None:
    class Divided(FolderSource):
        default_val_fraction = None

        def read(self, first: int, places: Sequence[Any]) -> Iterator[Item]:
            for number, item in enumerate(super().read(first, places), start=first):
                yield replace(item, split="val" if number % 10 == 3 else "train")

    source = fill(tmp_path / "in", 50)
    index = build(Divided(source), str(tmp_path / "out"))
    assert (index.samples("train"), index.samples("val")) == (45, 5)
    assert index.build is not None
    assert index.build.val_fraction is None
    assert set(members(tmp_path / "out", "val")) == {f"{number:09d}" for number in range(3, 50, 10)}
    with pytest.raises(UserError, match="has its own validation split"):
        build(Divided(source), str(tmp_path / "other"), BuildOptions(val_fraction=0.1))


def test_labels_and_classes_are_kept(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        fill(tmp_path / "in" / name, 20)
    index = build(
        FolderSource(tmp_path / "in", labels=True), str(tmp_path / "out"), BuildOptions(val_fraction=0.3)
    )
    assert index.classes == ["cat", "dog"]
    urls = [str(file) for file in sorted((tmp_path / "out").glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    metas = [json.loads(sample["json"]) for sample in samples]
    assert {meta["label"] for meta in metas} == {0, 1}
    assert all(meta["path"].startswith(index.classes[meta["label"]]) for meta in metas)


def test_labels_are_part_of_what_is_built(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        fill(tmp_path / "in" / name, 20)
    (tmp_path / "in" / "cat" / "broken.png").write_bytes(b"a")
    (tmp_path / "in" / "dog" / "broken.png").write_bytes(b"b")
    options, out = BuildOptions(val_fraction=0.3), str(tmp_path / "out")
    with pytest.raises(UserError, match="are unreadable"):
        build(FolderSource(tmp_path / "in"), out, options)
    with pytest.raises(UserError, match="differs in labels;"):
        build(FolderSource(tmp_path / "in", labels=True), out, options)


def test_unreadable_pictures_are_equal_to_none(tmp_path: Path) -> None:
    source = fill(tmp_path / "in", 20)
    for name in ("x.png", "y.png"):
        (source / name).write_bytes(b"the same rubbish")
    options = BuildOptions(val_fraction=0.3, max_rejected=0.5)
    index = build(FolderSource(source), str(tmp_path / "out"), options)
    assert (index.rejected, index.duplicates) == (2, 0)


def test_a_name_that_is_no_unicode(tmp_path: Path) -> None:
    source = fill(Path(os.fsdecode(os.fsencode(tmp_path) + b"/in\xff")), 20)
    index = build(FolderSource(source), str(tmp_path / "out"), BuildOptions(val_fraction=0.3))
    assert index.name == "in\\xff"


def test_another_unfinished_build_is_not_thrown_away_by_accident(tmp_path: Path) -> None:
    source, out = fill(tmp_path / "in", 80), str(tmp_path / "out")
    (source / "079.png").write_bytes(b"broken")
    (source / "078.png").write_bytes(b"broken")
    options = BuildOptions(shard_bytes=20_480, val_fraction=0.3)
    with pytest.raises(UserError, match="2 of 80 pictures are unreadable"):
        build(FolderSource(source), out, options)
    with pytest.raises(
        UserError, match=r"unfinished build of the data set 'in' that differs in channels; .*--start-over"
    ):
        build(FolderSource(source), out, replace(options, channels=1))
    for number in (78, 79):
        (source / f"0{number}.png").unlink()
    with pytest.raises(UserError, match="differs in the source's files"):
        build(FolderSource(source), out, options)
    build(FolderSource(source), out, options, start_over=True)
    build(FolderSource(source), str(tmp_path / "clean"), options)
    assert contents(Path(out)) == contents(tmp_path / "clean")


def test_a_build_that_finished_nothing_gives_way(tmp_path: Path) -> None:
    source, out = fill(tmp_path / "in", 30, size=(20, 20)), str(tmp_path / "out")
    with pytest.raises(UserError, match="20 x 20 pixels, not 16 x 16"):
        build(FolderSource(source), out, BuildOptions(size=16, geometry=Geometry.NONE))
    assert build(FolderSource(source), out, BuildOptions(size=16, val_fraction=0.3)).geometry.size == 16


def test_two_builds_on_one_machine_do_not_meet(tmp_path: Path) -> None:
    source, out = fill(tmp_path / "in", 30), tmp_path / "out"
    with (
        ScratchFolder("data-build", str(out)),
        pytest.raises(UserError, match="the same data-build is running on this machine"),
    ):
        build(FolderSource(source), str(out))
    build(FolderSource(source), str(out), BuildOptions(val_fraction=0.3))
