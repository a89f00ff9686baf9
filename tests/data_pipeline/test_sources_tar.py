import io
import os
import pickle
import tarfile
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import UserError
from data_pipeline.sources.tar_archive import TarSource
from tests.data_pipeline.archive_support import LEFT_OUT, LIMIT, SOUND, contents, picture, write_tar


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_gives_the_same_pictures_as_a_folder(tmp_path: Path, form: int) -> None:
    long = "/".join(["folder" * 10] * (2 if form == tarfile.USTAR_FORMAT else 20))
    sound = {name.replace("a/", f"./{long}/"): data for name, data in reversed(SOUND.items())}
    if form == tarfile.USTAR_FORMAT:
        sound = {name.replace("x" * 120, "x"): data for name, data in sound.items()}
    path = write_tar(tmp_path / "pets.tar", LEFT_OUT | sound, form)
    source = TarSource(path)
    found = contents(source)
    assert found == sound
    assert list(found) == list(sound)
    assert (source.name, source.kind, source.ignored, source.survey().count) == ("pets", "tar", 2, 5)


def test_tar_takes_regular_files_only(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as archive:
        for name, kind in [
            ("link.png", tarfile.SYMTYPE),
            ("hard.png", tarfile.LNKTYPE),
            ("device.png", tarfile.CHRTYPE),
            ("pipe.png", tarfile.FIFOTYPE),
            ("folder.png", tarfile.DIRTYPE),
            ("sparse.png", tarfile.GNUTYPE_SPARSE),
            ("strange.png", b"?"),
        ]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "../../etc/passwd"
            archive.addfile(info)
        info = tarfile.TarInfo("last.png")
        archive.addfile(info)
    source = TarSource(tmp_path / "a.tar")
    assert [place.name for place in source.places()] == ["last.png"]
    assert source.ignored == 6
    sparse = write_tar(tmp_path / "pax.tar", {"b.png": picture()})
    with tarfile.open(sparse, "a") as archive:
        info = tarfile.TarInfo("sparse.png")
        info.pax_headers = {"GNU.sparse.map": "0,1", "GNU.sparse.size": "1"}
        archive.addfile(info)
    source = TarSource(sparse)
    assert ([place.name for place in source.places()], source.ignored) == (["b.png"], 1)


def test_tar_names_are_only_text(tmp_path: Path) -> None:
    names = ["../../x.png", "/etc/x.png", "a\nb.png", "\udcff.png", "same.png", "same.png"]
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "a.tar"
    with tarfile.open(path, "w", errors="surrogateescape") as archive:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = len(picture(number))
            archive.addfile(info, io.BytesIO(picture(number)))
    items = list(pickle.loads(pickle.dumps(TarSource(path))))
    assert [item.where for item in items] == [
        "../../x.png",
        "/etc/x.png",
        "a\\nb.png",
        "\\xff.png",
        "same.png",
        "same.png",
    ]
    assert [item.data for item in items] == [picture(number) for number in range(6)]
    assert sorted(found.name for found in tmp_path.rglob("*")) == ["a.tar", "in"]


def header(name: bytes, size: bytes, kind: bytes = b"0", magic: bytes = b"ustar\x0000") -> bytes:
    """A tar header with any size field."""
    block = bytearray(512)
    block[: len(name)] = name
    block[100:124] = b"0000644\x000000000\x000000000\x00"
    block[124:136] = size
    block[136:148] = b"00000000000\x00"
    block[148:156] = b" " * 8
    block[156:157] = kind
    block[257:265] = magic
    block[148:156] = b"%06o\x00 " % sum(block)
    return bytes(block)


def octal(size: int) -> bytes:
    return b"%011o\x00" % size


END = bytes(1024)
SMALL = header(b"a.png", octal(3)) + b"abc".ljust(512, b"\0")


def test_tar_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {f"{n}.png": picture(n) * 4 for n in range(4)})
    whole, places = path.read_bytes(), list(TarSource(path).places())
    end = places[-1].offset + 512
    for length in [*range(1, end + 512, 37), end, end + 511]:
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"a\.tar: (after .* it ends|no tar archive)"):
            list(TarSource(path).places())
    path.write_bytes(whole[: end + 512])
    assert list(TarSource(path).places()) == places
    path.write_bytes(whole[: places[2].offset + 100])
    with pytest.raises(UserError, match=r"after 1\.png it ends within the next one, 2\.png"):
        list(TarSource(path).places())


HEADERS = {
    "checksum": SMALL + b"\xff" + SMALL[1:] + END,
    "size too small": header(b"0.png", octal(3)) + b"x" * 1024 + SMALL + END,
    "size beyond the end": SMALL + header(b"b.png", octal(1 << 30)) + END,
    "negative size": SMALL + header(b"b.png", b"\xff" * 10 + b"\xfe\x00") + END,
    "astronomic size": SMALL + header(b"b.png", b"\x80" + b"\xff" * 11) + END,
    "negative folder": SMALL + header(b"b", b"\xff" * 10 + b"\xfc\x00", b"x") + END,
    "no number": SMALL + header(b"b.png", b"not a number") + END,
    "long name too long": SMALL + header(b"././@LongLink", octal(1 << 32), b"L") + END,
    "long name of nothing": SMALL + header(b"././@LongLink", octal(9), b"L") + b"x" * 512 + END,
    "endless names": SMALL + (header(b"L", octal(1), b"L") + b"x" * 512) * 2000 + SMALL + END,
    "absurd record": SMALL + header(b"P", octal(512), b"x") + b"9" * 505 + b" path=x" + SMALL + END,
    "sparse at the end": SMALL + header(b"s.png", octal(0), b"S", b"ustar  \x00")[:482] + b"\1" + bytes(29),
    "two archives": SMALL + END + SMALL + END,
    "rubbish after it": SMALL + END + bytes(4 << 20) + b"x",
    "no mark": SMALL,
    "half a mark": SMALL + bytes(511),
}


@pytest.mark.parametrize("name", HEADERS)
def test_tar_that_cannot_be_read_to_its_end_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.tar").write_bytes(HEADERS[name])
    with pytest.raises(
        UserError, match=r"a\.tar: after (a|0)\.png it (ends|goes).*download or pack it again"
    ):
        list(TarSource(tmp_path / "a.tar").places())


def test_tar_header_record_is_not_read_whatever_its_size(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(SMALL + header(b"././@LongLink", octal(200 << 20), b"L"))
    os.truncate(path, 300 << 20)
    source = TarSource(path)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"after a\.png it goes on with a damaged header"):
            list(source.places())
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_tar_member_of_too_many_bytes_is_a_problem(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(header(b"0.png", octal(LIMIT + 1)))
    os.truncate(path, 512 + LIMIT + 512)
    with path.open("ab") as file:
        file.write(SMALL + END)
    first, second = TarSource(path)
    assert (first.data, first.problem) == (b"", f"file of {LIMIT + 1} bytes is larger than {LIMIT}")
    assert second.data == b"abc"


def test_tar_that_shrank_since_gives_problems(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"a.png": picture(), "b.png": picture()})
    source = TarSource(path)
    places = list(source.places())
    os.truncate(path, places[1].offset + 5)
    assert [item.problem for item in source.read(0, places)] == ["", "the archive ends before it"]
    path.unlink()
    (item,) = pickle.loads(pickle.dumps(source)).read(0, places[:1])
    assert item.problem == "cannot be read: No such file or directory"


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([b"0", b"\0", b"1", b"5", b"L", b"K", b"x", b"g", b"S", b"V", b"\xff"]),
            st.one_of(st.integers(0, 1500).map(octal), st.binary(min_size=12, max_size=12)),
            st.binary(max_size=600),
        ),
        max_size=5,
    ),
    st.sampled_from([b"", END]),
)
def test_tar_of_any_headers_is_listed_or_refused(
    tmp_path_factory: pytest.TempPathFactory, members: list[tuple[bytes, bytes, bytes]], end: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.tar"
    blocks = (
        header(b"b.png", size, kind) + data.ljust(-len(data) % 512, b"\0") for kind, size, data in members
    )
    path.write_bytes(SMALL + b"".join(blocks) + end)
    source = TarSource(path)
    try:
        items = list(source)
    except UserError:
        return
    assert items[0].data == b"abc"


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 4 * 1024 - 1), st.integers(1, 255))
def test_tar_with_a_damaged_byte_never_loses_a_picture(
    tmp_path_factory: pytest.TempPathFactory, position: int, change: int
) -> None:
    whole = bytearray(SMALL * 4 + END)
    whole[position] ^= change
    path = tmp_path_factory.getbasetemp() / "damaged.tar"
    path.write_bytes(whole)
    try:
        places = list(TarSource(path).places())
    except UserError:
        return
    assert len(places) == 4


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"PK\x03\x04", "is no tar archive; use kind zip"),
        (b"\x28\xb5\x2f\xfd" + bytes(600), "compressed by zstd; unpack it first"),
        (b"hello" * 200, "no tar archive"),
        (b"hello", "it ends without"),
    ],
)
def test_what_is_no_tar_is_told(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(UserError, match=f"a.tar: .*{reason}"):
        list(TarSource(tmp_path / "a.tar").places())


def test_empty_tar_holds_nothing(tmp_path: Path) -> None:
    assert list(TarSource(write_tar(tmp_path / "a.tar", {})).places()) == []
