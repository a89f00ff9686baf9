import bz2
import json
import os
import pickle
import stat
import struct
import tarfile
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import pytest

from data_pipeline.errors import UserError
from data_pipeline.sources.zip_archive import ZipSource
from tests.data_pipeline.archive_support import LEFT_OUT, LIMIT, SOUND, Member, contents, picture, write_zip


def deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packer.compress(data) + packer.flush()


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zip_gives_the_same_pictures_as_a_folder(tmp_path: Path, method: int) -> None:
    with zipfile.ZipFile(tmp_path / "pets.zip", "w", method) as archive:
        archive.mkdir("empty")
        for name, data in reversed(list((SOUND | LEFT_OUT).items())):
            archive.writestr(name, data)
    source = ZipSource(tmp_path / "pets.zip")
    found = contents(source)
    assert found == SOUND
    assert list(found) == sorted(SOUND, key=str.encode)
    assert (source.name, source.kind, source.ignored, source.survey().count) == ("pets", "zip", 2, 5)


def test_zip_listing_goes_with_no_copy(tmp_path: Path) -> None:
    source = ZipSource(write_zip(tmp_path / "a.zip", *(Member(b"%d.png" % n, b"x") for n in range(100))))
    copy = pickle.dumps(source)
    assert len(copy) < 1000
    assert list(pickle.loads(copy).places()) == list(source.places())


def test_zip_stamp_follows_the_file(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", Member(b"a.png", picture()))
    before = ZipSource(path).survey()
    os.utime(path, ns=(1, 2))
    assert ZipSource(path).survey() != before


PROBLEMS = {
    "encrypted": (Member(b"x.png", b"secret", flags=1), "encrypted"),
    "method": (Member(b"x.png", bz2.compress(b"x"), method=12), "zip's method 12"),
    "crc": (Member(b"x.png", picture(), crc=1), "CRC-32 does not match"),
    "claims too much": (Member(b"x.png", b"abc", packed=deflate(b"abc"), method=8, size=LIMIT + 1), "larger"),
    "packed too large": (Member(b"x.png", b"abc", packed_size=LIMIT + 1), "larger than 268435456"),
    "bomb": (
        Member(b"x.png", b"a" * 9, packed=deflate(bytes(50 << 20)), method=8),
        "unpacks to more than the 9 bytes",
    ),
    "ends early": (Member(b"x.png", b"abcdefghijkl", packed=deflate(b"abcdefghijkl")[:5], method=8), "less"),
    "garbage": (Member(b"x.png", b"abc", packed=b"\xff\xff\xff", method=8), "damaged"),
    "stored sizes differ": (Member(b"x.png", b"abc", size=4), "unpacks to less than the 4 bytes"),
    "beyond the end": (Member(b"x.png", b"abc", packed_size=9999), "the archive ends before it"),
    "no member there": (Member(b"x.png", b"abc", offset=7), "no member where"),
    "far away": (Member(b"x.png", b"abc", offset=0xFFFFFFF0), "no member where"),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_zip_reports_a_bad_member_and_reads_the_others(tmp_path: Path, name: str) -> None:
    bad, problem = PROBLEMS[name]
    good = Member(b"y.png", picture(7), packed=deflate(picture(7)), method=8)
    places = list(ZipSource(write_zip(tmp_path / "a.zip", good, bad)).places())
    source = ZipSource(tmp_path / "a.zip")
    tracemalloc.start()
    try:
        first, second = source.read(0, places)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert problem in first.problem
    assert first.data == b""
    assert (second.data, second.problem) == (picture(7), "")
    assert peak < 4 << 20


def test_zip_offset_before_the_file_is_no_member(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", Member(b"x.png", b"abc"))
    data = bytearray(path.read_bytes())
    data[-6:-2] = struct.pack("<L", 5000)  # the directory's own offset: all others are relative to it
    path.write_bytes(data)
    (item,) = ZipSource(path)
    assert "no member where" in item.problem


def test_zip_names_are_only_text(tmp_path: Path) -> None:
    data = picture()
    names = [
        b"../../x.png",
        b"/etc/x.png",
        b"C:\\x.png",
        b"a/../b.png",
        b"line\nbreak.png",
        b"nul\0.png",
        "utf-8 unmarked é.png".encode(),
        b"cp437 \x82.png",
    ]
    link = Member(b"link.png", b"/etc/passwd", mode=stat.S_IFLNK | 0o777)
    (tmp_path / "in").mkdir()
    source = ZipSource(write_zip(tmp_path / "in" / "a.zip", link, *(Member(name, data) for name in names)))
    assert set(contents(source)) == {
        "../../x.png",
        "/etc/x.png",
        "C:\\x.png",
        "a/../b.png",
        "line\\nbreak.png",
        "nul\\x00.png",
        "utf-8 unmarked é.png",
        "cp437 é.png",
    }
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.zip", "in"]


def test_zip_equal_names_are_pictures_of_their_own(tmp_path: Path) -> None:
    members = [Member(b"a.png", picture(colour)) for colour in range(5)]
    items = list(ZipSource(write_zip(tmp_path / "a.zip", *members)))
    assert [item.data for item in items] == [picture(colour) for colour in range(5)]
    assert {item.where for item in items} == {"a.png"}


def test_zip_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = write_zip(tmp_path / "a.zip", *(Member(b"%d.png" % n, picture(n)) for n in range(3))).read_bytes()
    for length in range(len(whole)):
        (tmp_path / "cut.zip").write_bytes(whole[:length])
        with pytest.raises(
            UserError, match=r"cut\.zip: (its directory cannot be read.*cut short|empty file)"
        ):
            ZipSource(tmp_path / "cut.zip")


@pytest.mark.parametrize("name", ["marked.zip", "lsun.zip", "x.tar", "folder", "nowhere.zip"])
def test_zip_mistakes_are_told(tmp_path: Path, name: str) -> None:
    write_zip(tmp_path / "marked.zip", Member(b"\xff.png", b"abc", flags=1 << 11))
    write_zip(tmp_path / "lsun.zip", Member(b"bedroom_train_lmdb/data.mdb", b"abc"))
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("x.png"))
    (tmp_path / "folder").mkdir()
    reason = {
        "marked.zip": "marked as UTF-8 and is not",
        "lsun.zip": "use kind lsun",
        "x.tar": "is no zip archive; use kind tar",
        "folder": "is no zip archive; use kind folder",
        "nowhere.zip": "no such file",
    }[name]
    with pytest.raises(UserError, match=f"{name}: .*{reason}"):
        ZipSource(tmp_path / name)


def labelled_zip(path: Path, document: object, names: tuple[str, ...] = ("00/a.png", "00/b.png")) -> Path:
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    members = [Member(name.encode(), picture()) for name in names]
    return write_zip(path, *members, Member(b"dataset.json", text))


def test_zip_takes_labels_of_dataset_json(tmp_path: Path) -> None:
    rows = [["00/b.png", 3], ["00/a.png", [0.0, 1.0, 0, 0]], ["00/gone.png", 1]]
    source = ZipSource(labelled_zip(tmp_path / "a.zip", {"labels": rows}), labels=True)
    copy = pickle.loads(pickle.dumps(source))
    assert [item.meta["label"] for item in copy.read(0, list(source.places()))] == [1, 3]
    assert (source.classes, source.ignored) == (("0", "1", "2", "3"), 0)
    plain = ZipSource(tmp_path / "a.zip")
    assert [item.meta for item in plain] == [{"path": "00/a.png"}, {"path": "00/b.png"}]


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        ({"labels": [["00/a.png", 1]]}, "no label for 00/b.png"),
        ({"labels": [["00/a.png", 1], ["00/b.png", 0.5]]}, 'label 0.5 of "00/b.png" is no class number'),
        ({"labels": [["00/a.png", 1], ["00/b.png", True]]}, "label true"),
        ({"labels": [["00/a.png", 1], ["00/b.png", -1]]}, "label -1"),
        ({"labels": [["00/a.png", 1], ["00/b.png", 10**12]]}, "label 1000000000000"),
        ({"labels": [["00/a.png", [1, 1]]]}, r"label \[1, 1\]"),
        ({"labels": [["00/a.png", [0.1] * 99]]}, "…"),
        ({"labels": [["00/a.png"]]}, r'\["00/a.png"\] is no \[name, label\]'),
        ({"labels": {"00/a.png": 1}}, "no list of"),
        ({"labels": None}, "holds no labels"),
        ([], "holds no labels"),
        (b"{", "Expecting property name"),
        (b"\xff", "decode"),
        (b"[" * 100_000, "recursion"),
    ],
)
def test_zip_with_other_labels_is_refused(tmp_path: Path, document: object, reason: str) -> None:
    path = labelled_zip(tmp_path / "a.zip", document)
    with pytest.raises(UserError, match=f"a.zip: dataset.json.*{reason}.*build without labels"):
        ZipSource(path, labels=True)
    assert len(list(ZipSource(path))) == 2
