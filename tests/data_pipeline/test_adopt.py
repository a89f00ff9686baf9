import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import webdataset
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from webdataset.tariterators import group_by_keys, tar_file_expander

from data_pipeline.documents import sha256_hex
from data_pipeline.errors import UserError
from data_pipeline.index import Index, LoadedIndex, load_index, load_records
from data_pipeline.reader import ShardReader
from data_pipeline.split_reader import read_split
from data_pipeline.storage import Storage
from data_pipeline.stream import ImageStream
from data_pipeline.tars.adopt import AdoptOptions, adopt
from data_pipeline.tars.samples import samples
from data_pipeline.tars.walk import StreamedFile, TarDamage, members
from data_pipeline.verify import verify
from tests.data_pipeline.archive_support import files_in
from tests.data_pipeline.picture_support import coded, npy_by_hand, turned_by
from tests.data_pipeline.picture_support import picture as draw

Members = Sequence[tuple[str, bytes | tarfile.TarInfo]]
HALF = AdoptOptions(val_fraction=0.4)


def picture(seed: int = 0, size: int = 8, mode: str = "RGB", form: str = "JPEG") -> bytes:
    return coded(draw(size, size, mode, seed), form)


def tar_of(given_members: Members, form: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for name, data in given_members:
            if isinstance(data, tarfile.TarInfo):
                archive.addfile(data)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def link(name: str) -> tuple[str, tarfile.TarInfo]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.LNKTYPE, "elsewhere.jpg"
    return name, info


def folder_member(name: str) -> tuple[str, tarfile.TarInfo]:
    info = tarfile.TarInfo(name)
    info.type = tarfile.DIRTYPE
    return name, info


def plain(first: int, count: int = 4) -> Members:
    return [
        member
        for number in range(first, first + count)
        for member in (
            (f"{number:04d}.jpg", picture(number)),
            (f"{number:04d}.json", json.dumps({"label": number % 3}).encode()),
        )
    ]


def fill(folder: Path, tars: int = 3) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(tars):
        (folder / f"part-{number}.tar").write_bytes(tar_of(plain(10 * number)))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """All files but those that a kill may leave: they have names of their own and are never listed."""
    return {
        file.name: file.read_bytes()
        for file in sorted(folder.iterdir())
        if not file.name.startswith((".tmp-", "create-only-probe-"))
    }


def everything(loaded: LoadedIndex, split: str) -> list[bytes]:
    reader, found = ShardReader(loaded, split), []
    for shard, entry in enumerate(loaded.shards(split)):
        where = np.full(entry.samples, shard, np.int64)
        found += reader.fetch(where, np.arange(entry.samples, dtype=np.int64))
    return found


def test_the_tars_stay_and_records_tell_the_truth(tmp_path: Path) -> None:
    folder = fill(tmp_path / "birds")
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.iterdir()}
    index = adopt(str(folder), str(folder), AdoptOptions())
    assert {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in before} == before
    assert set(contents(folder)) == {file.name for file in before} | {
        "index.json",
        *(f"part-{number}.idx" for number in range(3)),
    }
    loaded = load_index(str(folder))
    assert loaded.index == index
    assert (index.name, index.kind, index.encoding, index.build) == ("birds", "webdataset", "source", None)
    assert (index.geometry.name, index.geometry.size, index.geometry.channels) == ("none", 8, 3)
    assert (index.rejected, index.kept, index.classes) == (0, 12, [])
    digests = b"".join(bytes.fromhex(sha256_hex(file.read_bytes())) for file in sorted(before))
    assert index.source_sha256 == sha256_hex(digests)
    for split in ("train", "val"):
        for entry in loaded.shards(split):
            data = (folder / entry.name).read_bytes()
            assert (len(data), sha256_hex(data)) == (entry.bytes, entry.sha256)
            with tarfile.open(fileobj=io.BytesIO(data)) as archive:
                infos = archive.getmembers()
            records = load_records(loaded, entry)
            expected = [
                (i.offset_data, i.size, google_crc32c.value(data[i.offset_data : i.offset_data + i.size]))
                for i in infos
            ]
            assert records[["offset", "size", "crc32c"]].tolist() == expected[::2]
            assert records[["meta_offset", "meta_size", "meta_crc32c"]].tolist() == expected[1::2]
    report = verify(loaded)
    assert (report.problems, report.notes) == ([], [])
    with ImageStream(str(folder), seed=1, global_batch=5, channels=3, image_size=8) as stream:
        assert next(stream).images.shape == (5, 8, 8, 3)


LONG = "a.b/" + "long name " * 20
MIXED = [
    folder_member("a.b"),
    ("./a.b/000.json", b'{"label": 1}'),
    ("./a.b/000.png", picture(0, form="PNG")),
    ("./a.b/000.caption.txt", b"a bird"),
    ("__index__", b"of somebody"),
    ("__notes__/1.jpg", b"no picture"),
    ("readme", b"no dot"),
    (LONG + ".JPEG", picture(1)),
    (LONG + ".features.npy", b"\x93NUMPY"),
    ("ä/001.webp", picture(2, form="WEBP")),
    ("ä/002.cls", b"7"),
    ("ä/002.npy", npy_by_hand("8, 8, 3", bytes(192))),
    ("ä/003.npy", npy_by_hand("512", bytes(512))),  # a picture's features, before it
    ("ä/003.ppm", picture(3, form="PPM")),
    ("ä/004.jpg", picture(4)),
    ("ä/004.json", b""),
]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_plain_webdataset_reads_the_same_bytes(tmp_path: Path, form: int) -> None:
    folder = fill(tmp_path, 1)
    (folder / "a-val.tar").write_bytes(tar_of(MIXED, form))
    index = adopt(str(folder), str(folder), AdoptOptions())
    assert (index.samples("train"), index.samples("val"), index.rejected) == (4, 6, 0)
    loaded = load_index(str(folder))
    for split, extensions in (("train", ["jpg"]), ("val", ["png", "jpeg", "webp", "ppm", "jpg", "npy"])):
        urls = [f"{folder}/{entry.name}" for entry in loaded.shards(split)]
        theirs = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
        first = [next(sample[e] for e in extensions if e in sample) for sample in theirs]
        assert everything(loaded, split) == first
        metas = []
        for entry in loaded.shards(split):
            data = (folder / entry.name).read_bytes()
            for record in load_records(loaded, entry):
                start, size = int(record["meta_offset"]), int(record["meta_size"])
                metas.append(data[start : start + size])
                assert google_crc32c.value(metas[-1]) == record["meta_crc32c"]
        assert metas == [sample.get("json", b"") for sample in theirs]
    (images,) = read_split(str(folder), "val", channels=3, image_size=8, batch=10)
    assert images.shape == (6, 8, 8, 3)
    assert verify(loaded).problems == []


NAMES = st.builds(
    "{}{}{}".format,
    st.sampled_from(["", "./", "a/", "a.b/", "__a__/", "a/__b__/"]),
    st.sampled_from(["0", "1", "é", "__x__", "__x"]),
    st.sampled_from(["", ".jpg", ".JPG", ".json", ".png", ".txt", ".seg.png"]),
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(names=st.lists(NAMES, max_size=12), window=st.integers(1, 3000))
def test_samples_are_grouped_as_webdataset_does(tmp_path: Path, names: list[str], window: int) -> None:
    data = tar_of([(name, f"{place} {name}".encode()) for place, name in enumerate(names)])
    (tmp_path / "a.tar").write_bytes(data)
    try:
        theirs = list(group_by_keys(tar_file_expander([{"url": "a", "stream": io.BytesIO(data)}])))
    except ValueError:
        assume(False)  # a name stands twice: that is an error there
    file = StreamedFile(Storage(str(tmp_path)), "a.tar", window=window)
    ours = list(samples(file))
    assert [sample.key for sample in ours] == [sample["__key__"] for sample in theirs]
    assert file.finish() == sha256_hex(data)
    seen = set()
    for one, other in zip(ours, theirs, strict=True):
        first = next((other[e] for e in other if e in ("jpg", "png")), None)
        assert (one.picture.data if one.picture else None) == (None if one.key in seen else first)
        assert (one.meta.data if one.meta else None) == other.get("json")
        assert bool(one.problem) == (one.picture is None)
        seen.add(one.key)


def test_what_is_no_sample_is_rejected_and_listed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = fill(tmp_path)
    sparse = tarfile.TarInfo("sparse.jpg")
    sparse.pax_headers = {"GNU.sparse.map": "0,1", "GNU.sparse.size": "1"}
    odd = [
        ("0000.jpg", picture(1)),
        ("only.json", b"{}"),
        ("only.txt", b"of a picture that is missing"),
        ("twice.jpg", picture(2)),
        ("twice.jpg", picture(3)),
        ("two.png", picture(4, form="PNG")),
        ("two.jpg", picture(5)),
        ("late.jpg", picture(6)),
        link("linked.jpg"),
        ("linked.json", b"{}"),
        ("cut.jpg", picture(7)[:200]),
        ("deep.png", coded(Image.new("I;16", (8, 8)), "PNG")),
        ("late.json", b"{}"),
        ("._0009.jpg", b"Mac OS X"),
        ("0009.jpg", picture(9)),
        ("._0009.json", b"Mac OS X"),
        ("0009.json", b"{}"),
        ("sparse.jpg", sparse),
        ("\x1b[2J.txt", b"hostile"),
    ]
    (folder / "odd.tar").write_bytes(tar_of(odd, tarfile.PAX_FORMAT))
    with pytest.raises(UserError, match=r"8 of 24 samples .* at most 1 .*first odd\.tar/only: no picture"):
        adopt(str(folder), str(folder), AdoptOptions())
    assert not (folder / "index.json").exists()
    index = adopt(str(folder), str(folder), AdoptOptions(max_rejected=0.4))
    assert "1 samples have several pictures" in caplog.text
    rows = [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]
    assert {row["schema"] for row in rows} == {"rejected/1"}
    reasons = {row["path"]: row["reason"] for row in rows}
    expected = {
        "only": "no picture among its members (.json, .txt)",
        "twice": "two of its members end in .jpg",
        "linked": "its .jpg is a link",
        "cut": "damaged picture",
        "deep": "not 8 bits",
        "late": "stands in the tar before",
        "sparse": "stored sparsely",
        "\\x1b[2J": "no picture",
    }
    assert list(reasons) == [f"odd.tar/{key}" for key in expected]
    for key, reason in expected.items():
        assert reason in reasons[f"odd.tar/{key}"]
    assert (index.rejected, index.kept) == (8, 16)
    loaded = load_index(str(folder))
    assert verify(loaded).problems == []
    (entry,) = (entry for split in index.splits for entry in loaded.shards(split) if entry.name == "odd.tar")
    records = load_records(loaded, entry)
    data = (folder / entry.name).read_bytes()
    found = [data[int(r["offset"]) : int(r["offset"]) + int(r["size"])] for r in records]
    assert found == [picture(1), picture(4, form="PNG"), picture(6), picture(9)]
    assert records["meta_size"].tolist() == [0, 0, 0, 2]


GOOD = tar_of(plain(0))


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def record(kind: bytes, body: bytes) -> bytes:
    """A GNU or PAX record before a header."""
    info = tarfile.TarInfo("record")
    info.type, info.size = kind, len(body)
    return info.tobuf(tarfile.USTAR_FORMAT) + body + bytes(-len(body) % 512)


def huge(size: int) -> bytes:
    info = tarfile.TarInfo("0000.jpg")
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


LAST = GOOD.rstrip(b"\0")
HOSTILE = {
    "empty": (b"", "at byte 0: it ends without the mark"),
    "half a header": (GOOD[:300], "at byte 0: it ends without"),
    "text": (b"<html>" * 1000, "at byte 0: no tar archive"),
    "gzip": (gzip.compress(GOOD), "at byte 0: compressed by gzip"),
    "cut in a picture": (GOOD[:700], r"at byte 0: it ends within the member that begins here \(\d+ bytes\)"),
    "cut between members": (GOOD[: GOOD.index(b"0001.jpg")], r"at byte \d+: it ends without the mark"),
    "cut before the end": (LAST + bytes(-len(LAST) % 512), r"at byte \d+: it ends without the mark"),
    "damaged header": (flipped(GOOD, GOOD.index(b"0002.json")), r"at byte \d+: damaged header"),
    "two in one": (GOOD + GOOD, r"at byte \d+: it ends, and then goes on"),
    "member of 8 EB": (huge((1 << 63) - 1) + GOOD, "at byte 0: it ends within"),
    "member of less than nothing": (huge(-512) + GOOD, "at byte 0: "),
    "record of 1 GB": (record(b"x", b"")[:124] + b"%011o\0" % (1 << 30) + GOOD, "at byte 0: no tar"),
    "records without end": (record(b"x", b"9 a=bcde\n") * 2000 + GOOD, "at byte 0: no tar"),
    "record of nothing": (record(b"x", b"0 a=b\n") + GOOD, "at byte 0: no tar"),
    "long name of nothing": (record(b"L", b"x" * 600), "at byte 0: no tar"),
    "long name of 2 MB": (record(b"L", b"x" * (2 << 20)) + GOOD, "at byte 0: no tar"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_damaged_tars_are_refused_by_name_and_byte(tmp_path: Path, name: str) -> None:
    data, message = HOSTILE[name]
    folder = fill(tmp_path)
    (folder / "part-1.tar").write_bytes(data)
    before = contents(folder)
    with pytest.raises(UserError, match=rf"part-1\.tar: {message}") as caught:
        adopt(str(folder), str(folder), AdoptOptions())
    assert "\n" not in str(caught.value)
    assert contents(folder) == before, "nothing is written beside tars that cannot be adopted"


def test_the_walk_agrees_with_tarfile_and_forgets_what_has_passed(tmp_path: Path) -> None:
    data = tar_of([*MIXED, ("big.bin", bytes(100_000)), ("after.jpg", b"x")], tarfile.PAX_FORMAT)
    (tmp_path / "a.tar").write_bytes(data)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        expected = [(info.name, info.offset_data, info.size) for info in archive.getmembers()]
    copy = io.BytesIO()
    file = StreamedFile(Storage(str(tmp_path)), "a.tar", copy=copy, window=1024)
    found = []
    for member in members(file):
        found.append((member.name, member.offset, member.size))
        if member.name != "big.bin":
            assert file.read_at(member.offset, member.size) == data[member.offset :][: member.size]
    assert found == expected
    assert (file.finish(), copy.getvalue()) == (sha256_hex(data), data)
    with pytest.raises(AssertionError, match="has passed"):
        file.read_at(0, 1)
    (tmp_path / "b.tar").write_bytes(tar_of([folder_member("a")])[:600])
    with pytest.raises(TarDamage, match="at byte 512: it ends without") as caught:
        list(members(StreamedFile(Storage(str(tmp_path)), "b.tar")))
    assert caught.value.offset == 512


def test_pictures_must_be_squares_of_one_size(tmp_path: Path) -> None:
    folder = fill(tmp_path)
    odd = folder / "part-1.tar"
    odd.write_bytes(tar_of([*plain(0), ("big.jpg", picture(1, size=16))]))
    remedy = r"unpack them and build new shards with `ddpm data build folder … --size N`$"
    with pytest.raises(
        UserError,
        match=rf"part-1\.tar: pictures differ in size: 0000 has 8 x 8 pixels, big 16 x 16; {remedy}",
    ):
        adopt(str(folder), str(folder), AdoptOptions())
    odd.write_bytes(tar_of([("big.jpg", picture(1, size=16))]))
    (folder / "part-2.tar").write_bytes(b"")  # never looked at: what came before does not fit already
    with pytest.raises(UserError, match=rf"those of part-0\.tar have 8 x 8 .* part-1\.tar 16 x 16; {remedy}"):
        adopt(str(folder), str(folder), AdoptOptions())
    odd.write_bytes(tar_of([("wide.png", coded(draw(9, 8), "PNG"))]))
    with pytest.raises(UserError, match=rf"part-1\.tar: wide has 9 x 8 pixels, which is no square; {remedy}"):
        adopt(str(folder), str(folder), AdoptOptions())


@pytest.mark.parametrize(
    ("pictures", "channels", "turned"),
    [
        ([picture(1, mode="L"), picture(2, mode="L", form="PNG"), npy_by_hand("8, 8", bytes(64))], 1, 0),
        ([picture(1, mode="L"), picture(2, mode="L"), picture(3)], 3, 0),
        ([picture(1, mode="L"), picture(3, mode="LA", form="PNG")], 1, 0),
        ([picture(1, mode="L"), picture(3, mode="P", form="PNG")], 3, 0),
        ([picture(1, mode="RGBA", form="PNG"), picture(2, mode="CMYK"), picture(3, form="BMP")], 3, 0),
        ([picture(1), coded(draw(8, 8), "JPEG", exif=turned_by(6))], 3, 1),
    ],
)
def test_channels_are_those_of_the_pictures(
    tmp_path: Path, pictures: list[bytes], channels: int, turned: int, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(2):
        named = [(f"{place}.png", data) for place, data in enumerate(pictures)]
        (tmp_path / f"{number}.tar").write_bytes(tar_of([*named, ("notes", bytes([number]))]))
    index = adopt(str(tmp_path), str(tmp_path), HALF)
    assert index.geometry.channels == channels
    assert ("1 pictures are to be turned" in caplog.text, "turned" in caplog.text) == (False, turned == 1)
    assert verify(load_index(str(tmp_path))).problems == []


@pytest.mark.parametrize(
    ("names", "val"),
    [
        (["train-0", "train-1", "val-0", "val-1"], {"val-0", "val-1"}),
        (["imagenet_TRAIN_0", "imagenet_Validation_0"], {"imagenet_Validation_0"}),
        (["a", "b.test.0", "val2017"], {"b.test.0", "val2017"}),
        (["valley-train-0", "val-train-1", "valid"], {"valid"}),
    ],
)
def test_names_divide_the_tars(tmp_path: Path, names: list[str], val: set[str]) -> None:
    for place, name in enumerate(names):
        (tmp_path / f"{name}.tar").write_bytes(tar_of(plain(10 * place)))
    index = adopt(str(tmp_path), str(tmp_path), AdoptOptions())
    found = {split: [entry.name for entry in entries] for split, entries in index.splits.items()}
    assert found["val"] == sorted(f"{name}.tar" for name in val)
    assert found["train"] == sorted(f"{name}.tar" for name in set(names) - val)


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.21, 0.5, 0.99])
def test_hashes_divide_tars_whose_names_do_not(tmp_path: Path, fraction: float) -> None:
    sizes = [1, 3, 2, 4]
    for place, size in enumerate(sizes):
        (tmp_path / f"{place}.tar").write_bytes(tar_of(plain(10 * place, size)))
    (tmp_path / "empty.tar").write_bytes(tar_of([]))
    index = adopt(str(tmp_path), str(tmp_path), AdoptOptions(val_fraction=fraction))
    by_hash = sorted(range(4), key=lambda place: sha256_hex((tmp_path / f"{place}.tar").read_bytes()))
    val: list[int] = []
    while sum(sizes[place] for place in val) < fraction * 10 and len(val) < 3:
        val.append(by_hash[len(val)])
    assert [entry.name for entry in index.splits["val"]] == sorted(f"{place}.tar" for place in val)
    assert index.splits["train"][-1].name == "empty.tar"
    assert index.splits["train"][-1].samples == 0
    loaded = load_index(str(tmp_path))
    assert verify(loaded).problems == []
    with ImageStream(str(tmp_path), seed=1, global_batch=8, channels=3, image_size=8) as stream:
        next(stream)


MISTAKES = {
    "no tars": ({}, "no WebDataset tars"),
    "only compressed ones": ({"a.tar.gz": b""}, r"only compressed ones \(a\.tar\.gz"),
    "one tar": ({"a.tar": GOOD}, "a single tar cannot be divided"),
    "one tar and an empty one": ({"a.tar": GOOD, "b.tar": tar_of([])}, "a single tar cannot be divided"),
    "only val": ({"val-0.tar": GOOD, "val-1.tar": GOOD}, "none of the pictures is for 'train'"),
    "empty val": ({"a.tar": GOOD, "val.tar": tar_of([])}, "none of the pictures is for 'val'"),
    "no pictures": (
        {"a.tar": tar_of([("0.seg.png", b"")]), "b.tar": tar_of([])},
        r"no pictures in its tars, first a\.tar/0: no picture among its members \(\.seg\.png\)",
    ),
    "no samples": (
        {"a.tar": tar_of([]), "b.tar": tar_of([("x", b"")])},
        "no pictures in its tars; are these",
    ),
    "a name to trip over": ({"a.tar": GOOD, "{b}.tar": GOOD}, r"\{b\}\.tar: cannot be a shard's name"),
    "an unfinished build": ({"a.tar": GOOD, "b.tar": GOOD, "unfinished.json": b""}, "unfinished build"),
    "DALI's index": ({"a.tar": GOOD, "b.tar": GOOD, "a.idx": b"v1.2 4"}, r"a\.idx: is there already.*DALI"),
    "DALI's index at a tar before a bad one": (
        {"a.tar": GOOD, "b.tar": b"", "a.idx": b"v1.2 4"},
        r"a\.idx: is there already",
    ),
    "another rejected.jsonl": ({"a.tar": GOOD, "b.tar": b"", "rejected.jsonl": b"{}"}, "something else"),
    "another index": ({"a.tar": GOOD, "b.tar": GOOD, "index.json": b"{}"}, "schema is None"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(tmp_path: Path, name: str) -> None:
    files, message = MISTAKES[name]
    for file, data in files.items():
        (tmp_path / file).write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        adopt(str(tmp_path), str(tmp_path), AdoptOptions())
    assert "\n" not in str(caught.value)
    assert {name: contents(tmp_path)[name] for name in files} == files
    assert name == "another index" or not (tmp_path / "index.json").exists()


def test_other_mistakes_are_named(tmp_path: Path) -> None:
    folder = fill(tmp_path)
    with pytest.raises(UserError, match="is a single tar; name the folder"):
        adopt(str(folder / "part-0.tar"), str(folder), AdoptOptions())
    for options in ({"val_fraction": 0.0}, {"val_fraction": 1.0}, {"max_rejected": -0.1}):
        with pytest.raises(UserError, match="must lie between 0 and 1"):
            AdoptOptions(**options)


def test_the_same_adoption_again_changes_nothing_and_another_is_refused(tmp_path: Path) -> None:
    folder = fill(tmp_path / "in")
    index = adopt(str(folder), str(folder), AdoptOptions())
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert adopt(str(folder), str(folder), AdoptOptions()) == index
    assert adopt(f"{folder}/../in/", str(folder), AdoptOptions(name="in")) == index
    with pytest.raises(UserError, match=r"already holds the data set 'in'.*\(different: name\)"):
        adopt(str(folder), str(folder), AdoptOptions(name="other"))
    with pytest.raises(UserError, match=r"\(different: splits\)"):
        adopt(str(folder), str(folder), AdoptOptions(val_fraction=0.9))
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before
    (folder / "part-9.tar").write_bytes(tar_of(plain(90)))
    with pytest.raises(UserError, match=r"\(different: source_sha256, splits, kept\)"):
        adopt(str(folder), str(folder), AdoptOptions())


def test_a_built_data_set_is_not_adopted_in_place(damageable_url: Path) -> None:
    before = contents(damageable_url)
    with pytest.raises(UserError, match=r"\(different: kind"):
        adopt(str(damageable_url), str(damageable_url), AdoptOptions())
    assert contents(damageable_url) == before


def test_tars_are_copied_byte_for_byte(tmp_path: Path, scratch: Path) -> None:
    source, out = fill(tmp_path / "in"), tmp_path / "out"
    before = contents(source)
    index = adopt(str(source), str(out), AdoptOptions())
    assert contents(source) == before
    assert {name: data for name, data in contents(out).items() if name.endswith(".tar")} == before
    assert adopt(str(source), str(source), AdoptOptions()) == index
    assert contents(out) == contents(source)
    assert files_in(scratch) == []
    kept = {file: file.stat().st_mtime_ns for file in out.iterdir() if file.suffix == ".tar"}
    (out / "index.json").unlink()
    assert adopt(str(source), str(out), AdoptOptions()) == index
    assert {file: file.stat().st_mtime_ns for file in kept} == kept, "what lies there is not copied again"


def test_copies_never_replace_something_else(tmp_path: Path) -> None:
    source, out = fill(tmp_path / "in"), tmp_path / "out"
    out.mkdir()
    for name, data, message in (
        ("part-1.tar", b"short", r"out/part-1\.tar: is not the tar of that name in"),
        ("part-1.tar", flipped((source / "part-1.tar").read_bytes(), 9), "is not the tar of that name in"),
        ("other.tar", GOOD, r"holds other\.tar, which is not in"),
        ("unfinished.json", b"", "holds an unfinished build"),
    ):
        (out / name).write_bytes(data)
        with pytest.raises(UserError, match=message):
            adopt(str(source), str(out), AdoptOptions())
        assert contents(out)[name] == data
        assert "index.json" not in contents(out)
        (out / name).unlink()


KILLED = """
import itertools, os, signal, sys
from data_pipeline.tars.adopt import AdoptOptions, adopt
from data_pipeline.local_files import LocalFiles

publish = LocalFiles._publish
for deadly in itertools.count():
    if os.fork():
        if os.wait()[1] != signal.SIGKILL:
            break
        continue
    left = itertools.count(deadly, -1)

    def dying(path, fill, name_it):
        def name_or_die(temporary, final):
            if next(left) == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            name_it(temporary, final)
        publish(path, fill, name_or_die)

    LocalFiles._publish = staticmethod(dying)
    adopt(sys.argv[1], f"{sys.argv[2]}/{deadly}", AdoptOptions(max_rejected=0.5))
    os._exit(0)
print(deadly)
"""


def test_an_adoption_goes_on_after_a_kill_at_any_write(tmp_path: Path, scratch: Path) -> None:
    source, options = fill(tmp_path / "in"), AdoptOptions(max_rejected=0.5)
    (source / "part-3.tar").write_bytes(tar_of([("0.txt", b"")]))
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(source), str(tmp_path / "out")],
        env={**os.environ, "TMPDIR": str(scratch)},
        capture_output=True,
        text=True,
        check=True,
    )
    clean = tmp_path / "clean"
    adopt(str(source), str(clean), options)
    kills = int(done.stdout)
    assert kills == 2 + 4 + 1 + 4 + 1, "the probe twice, tars, rejected.jsonl, records, index.json"
    for deadly in range(kills):
        out = tmp_path / "out" / str(deadly)
        assert not (out / "index.json").exists()
        left = {file: file.stat().st_mtime_ns for file in out.glob("*.tar")}
        adopt(str(source), str(out), options)
        assert contents(out) == contents(clean)
        assert {file: file.stat().st_mtime_ns for file in left} == left
    assert files_in(scratch) == []


def test_several_processes_find_the_same(tmp_path: Path) -> None:
    folder = fill(tmp_path / "one", 5)
    alone = adopt(str(folder), str(folder), AdoptOptions())
    assert adopt(str(folder), str(tmp_path / "two"), AdoptOptions(name="one"), workers=2) == alone
    assert contents(tmp_path / "two") == contents(folder)
    loaded = load_index(str(folder))
    assert verify(loaded, workers=2) == verify(loaded)
    (folder / "part-3.tar").write_bytes(HOSTILE["two in one"][0])
    (tmp_path / "one" / "index.json").unlink()
    with pytest.raises(UserError, match=r"part-3\.tar: at byte"):
        adopt(str(folder), str(folder), AdoptOptions(), workers=2)


def test_tars_on_s3_are_adopted_and_copied(s3_prefix: str, tmp_path: Path) -> None:
    source, there = fill(tmp_path / "in"), Storage(s3_prefix)
    for file in source.iterdir():
        there.upload(file.name, file)
    index = adopt(s3_prefix, s3_prefix, AdoptOptions(name="birds"))
    assert there.list() == sorted(
        [*(f"part-{n}.{e}" for n in range(3) for e in ("idx", "tar")), "index.json"]
    )
    remote = load_index(s3_prefix)
    assert verify(remote).problems == []
    for url in (str(tmp_path / "out"), f"{s3_prefix}-copy"):
        assert adopt(s3_prefix, url, AdoptOptions(name="birds")) == index
        copied = load_index(url)
        assert copied.sha256 == remote.sha256
        assert everything(copied, "train") == everything(remote, "train")
    with pytest.raises(UserError, match="no WebDataset tars"):
        adopt(f"{s3_prefix}-nothing", s3_prefix, AdoptOptions())


def test_names_of_shards_are_safe() -> None:
    entry = {"bytes": 0, "sha256": "", "samples": 0, "idx_bytes": 0, "idx_sha256": ""}
    document = {
        "schema": "index/1",
        "name": "x",
        "kind": "webdataset",
        "source_sha256": "",
        "geometry": {"name": "none", "size": 8, "channels": 3, "versions": {}},
        "encoding": "source",
        "rejected": 0,
    }

    def read(name: str) -> Index:
        content = {**document, "splits": {"train": [{"name": name, **entry}]}}
        return Index.from_json(json.dumps(content).encode(), "index.json")

    for name in ("shard-000000.tar", "a=1,b.c_+@-.tar"):
        assert read(name).splits["train"][0].idx_name == name.removesuffix(".tar") + ".idx"
    for name in ("../a.tar", "a/b.tar", ".tar", ".a.tar", "a.tar\n", "a.TAR", "a b.tar", "-a.tar", "{a}.tar"):
        with pytest.raises(UserError, match="name"):
            read(name)
