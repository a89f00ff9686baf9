"""LSUN's LMDB: sound, cut short, foreign, zipped. The databases are written by the `lmdb` package itself."""

import hashlib
import io
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import lmdb
import pytest
from PIL import Image

from data_pipeline.errors import UserError
from data_pipeline.sources.lsun import LsunSource
from tests.data_pipeline.archive_support import files_in


def encoded(number: int) -> bytes:
    """A JPEG or WebP picture, some small enough for LMDB's leaves and some not."""
    buffer = io.BytesIO()
    side = 8 if number % 3 else 96
    noise = Image.effect_noise((side, side), 90).convert("RGB")
    noise.save(buffer, "JPEG" if number % 2 else "WEBP")
    return buffer.getvalue()


def lsun_key(number: int) -> bytes:
    return hashlib.sha1(b"%d" % number).hexdigest().encode()


PICTURES = {lsun_key(number): encoded(number) for number in range(40)}


def write_lmdb(folder: Path, values: Mapping[bytes, bytes], database: bytes | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with lmdb.open(str(folder), map_size=1 << 26, max_dbs=1) as environment:
        chosen = environment.open_db(database)
        with environment.begin(write=True, db=chosen) as transaction:
            for key, value in values.items():
                transaction.put(key, value)
    return folder


def zipped(path: Path, *folders: Path, method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for folder in folders:
            for file in sorted(folder.iterdir()):
                archive.write(file, f"{folder.name}/{file.name}")
    return path


def test_lsun_gives_the_values_in_the_order_of_the_keys(tmp_path: Path) -> None:
    folder = write_lmdb(tmp_path / "church_outdoor_train_lmdb", PICTURES)
    (folder / "lock.mdb").unlink()
    folder.chmod(0o555)
    source = LsunSource(folder)
    items = list(source)
    assert [item.key for item in items] == sorted(key.decode() for key in PICTURES)
    assert {item.key.encode(): item.data for item in items} == PICTURES
    assert all(item.where == f"church_outdoor_train/{item.key}" for item in items)
    assert not any(item.problem or item.meta or item.split for item in items)
    assert (source.kind, source.name, source.survey().count) == ("lsun", "church_outdoor_train", 40)
    assert (source.default_size, source.native_size, source.default_val_fraction) == (256, None, 0.01)
    assert [path.name for path in folder.iterdir()] == ["data.mdb"]  # nothing was written, no lock either
    source.close()
    again = LsunSource(folder / "data.mdb")
    assert (again.name, list(again)) == ("church_outdoor_train", items)
    again.close()


def test_lsun_places_go_on_while_pictures_are_read(tmp_path: Path) -> None:
    source = LsunSource(write_lmdb(tmp_path / "a", PICTURES))
    places = source.places()
    first = next(places)
    (item,) = source.read(0, [first])
    rest = list(places)
    assert len(rest) == 39
    assert next(source.read(0, [first, *rest])) == item
    source.close()


def test_lsun_is_read_by_other_processes(tmp_path: Path, scratch: Path) -> None:
    folder = write_lmdb(tmp_path / "a_lmdb", PICTURES)
    sources = [LsunSource(folder), LsunSource(zipped(tmp_path / "a.zip", folder))]
    items = [list(source) for source in sources]
    order = pickle.dumps([(source, list(source.places())) for source in sources])
    program = (
        "import pickle, sys; order = pickle.load(sys.stdin.buffer);"
        "done = [[*s.read(30, p[30:]), *s.read(0, p[:30])] for s, p in order];"
        "[s.close() for s, p in order];"
        "sys.stdout.buffer.write(pickle.dumps(done))"
    )
    answer = subprocess.run([sys.executable, "-c", program], input=order, stdout=subprocess.PIPE, check=True)
    assert pickle.loads(answer.stdout) == [[*found[30:], *found[:30]] for found in items]
    assert len(files_in(scratch)) == 1  # still there: the copies do not own it
    for source in sources:
        source.close()
    assert files_in(scratch) == []


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_lsun_zip_is_unpacked_once_and_removed(tmp_path: Path, scratch: Path, method: int) -> None:
    folder = write_lmdb(tmp_path / "tower_val_lmdb", PICTURES)
    path = zipped(tmp_path / "download.zip", folder, method=method)
    source = LsunSource(path)
    (unpacked,) = files_in(scratch)
    assert unpacked.read_bytes() == (folder / "data.mdb").read_bytes()
    assert {item.key.encode(): item.data for item in source} == PICTURES
    assert (source.name, list(source.files())) == ("tower_val", [path])
    source.close()
    source.close()
    assert files_in(scratch) == []


def test_lsun_zip_that_is_damaged_is_refused(tmp_path: Path, scratch: Path) -> None:
    folder = write_lmdb(tmp_path / "tower_val_lmdb", PICTURES)
    path = zipped(tmp_path / "a.zip", folder)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"a\.zip: its directory cannot be read.*cut short"):
        LsunSource(path)
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=r"a\.zip: cannot be unpacked \(Bad CRC-32"):
        LsunSource(path)
    cut = write_lmdb(tmp_path / "cut_lmdb", PICTURES)
    os.truncate(cut / "data.mdb", 20_000)
    with pytest.raises(UserError, match=r"data\.mdb: is cut short"):
        LsunSource(zipped(path, cut))
    zipped(path, folder, cut)
    with pytest.raises(UserError, match=r"holds tower_val_lmdb/data\.mdb and cut_lmdb/data\.mdb"):
        LsunSource(path)
    zipped(path)
    with pytest.raises(UserError, match=r"no data\.mdb in this zip.*use kind zip"):
        LsunSource(path)
    assert files_in(scratch) == []


def test_lsun_cut_anywhere_is_refused_before_it_ends_the_process(tmp_path: Path) -> None:
    folder = write_lmdb(tmp_path / "a", PICTURES)
    whole = (folder / "data.mdb").read_bytes()
    lengths = [0, 1, 4095, 4096, 8191, 8192, 8193, *range(12_288, len(whole), 4096), len(whole) - 1]
    for length in lengths:
        os.truncate(folder / "data.mdb", 0)
        (folder / "data.mdb").write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"data\.mdb: (is cut short|\d+ bytes are no LMDB)"):
            LsunSource(folder)
    (folder / "data.mdb").write_bytes(whole + bytes(100))  # as after a copy with whole blocks
    source = LsunSource(folder)
    assert source.survey().count == 40
    source.close()


def test_lsun_grows_beyond_lmdbs_usual_map(tmp_path: Path) -> None:
    values = {b"%040d" % number: bytes([number]) * (1 << 20) for number in range(24)}
    source = LsunSource(write_lmdb(tmp_path / "large", values))
    assert {item.key.encode(): item.data for item in source} == values
    source.close()


def test_lsun_other_keys_become_safe_ones(tmp_path: Path) -> None:
    names = [b"256-0000001", b"a/b.png", b"line\nbreak", b"\xff\x00"]
    source = LsunSource(write_lmdb(tmp_path / "own", dict.fromkeys(names, b"x")))
    found = dict(zip(source.places(), source, strict=True))
    assert {name: item.where for name, item in found.items()} == {
        b"256-0000001": "own/256-0000001",
        b"a/b.png": "own/a/b.png",
        b"line\nbreak": "own/line\\nbreak",
        b"\xff\x00": "own/\\xff\\x00",
    }
    assert found[b"256-0000001"].meta == {}
    assert found[b"a/b.png"].meta == {"key": "a/b.png"}
    assert found[b"a/b.png"].key == hashlib.sha256(b"a/b.png").hexdigest()[:40]
    source.close()


def test_lsun_lost_key_is_a_problem(tmp_path: Path) -> None:
    source = LsunSource(write_lmdb(tmp_path / "a", PICTURES))
    (item,) = source.read(0, [b"never was"])
    assert (item.data, item.problem) == (b"", "its key is no longer in the database")
    source.close()


def test_lsun_mistakes_are_told(tmp_path: Path) -> None:
    both = tmp_path / "lsun"
    write_lmdb(both / "tower_train_lmdb", PICTURES)
    write_lmdb(both / "tower_val_lmdb", PICTURES)
    (tmp_path / "none").mkdir()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "data.mdb").write_bytes(b"something else " * 1000)
    mistakes = {
        tmp_path / "nowhere": "no such folder",
        tmp_path / "none": r"no data\.mdb in it",
        both: "holds tower_train_lmdb and tower_val_lmdb; name the one to read",
        foreign: r"data\.mdb: cannot be opened as LMDB \(MDB_INVALID",
        write_lmdb(tmp_path / "empty", {}): "the LMDB is empty",
        write_lmdb(tmp_path / "divided", PICTURES, b"train"): r"\(train is one\).*use kind folder",
    }
    for path, reason in mistakes.items():
        with pytest.raises(UserError, match=reason) as caught:
            LsunSource(path)
        with pytest.raises(UserError, match=reason):  # and not that it is open already
            LsunSource(path)
        assert "\n" not in str(caught.value)
        assert str(caught.value).count(str(path)) == 1


def test_lsun_damaged_in_the_middle_ends_in_one_line(tmp_path: Path) -> None:
    folder = write_lmdb(tmp_path / "a", {b"%05d" % number: b"x" * 100 for number in range(2000)})
    data = bytearray((folder / "data.mdb").read_bytes())
    with lmdb.open(str(folder), readonly=True, lock=False) as environment:
        pages = environment.info()["last_pgno"] + 1
    for page in range(2, pages):
        data[page * 4096 + 10 : page * 4096 + 12] = b"\0\0"  # flags: neither branch nor leaf
    (folder / "data.mdb").write_bytes(data)
    with pytest.raises(UserError, match=r"data\.mdb: damaged LMDB \(.*\); download it again"):
        LsunSource(folder)
