import inspect
import io
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from data_pipeline.decode import decode
from data_pipeline.errors import UserError
from data_pipeline.sources.digits import DigitsSource
from data_pipeline.sources.folder import FolderSource


def png(colour: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (4, 4), colour).save(buffer, "PNG")
    return buffer.getvalue()


def test_digits_are_the_real_ones() -> None:
    source, real = DigitsSource(), load_digits()
    items = list(source)
    assert len(items) == source.survey().count == 1797
    images = np.stack([decode(item.data, 1)[:, :, 0] for item in items])
    np.testing.assert_array_equal(images, np.rint(real.images * 255 / 16).astype(np.uint8))
    assert (images.min(), images.max()) == (0, 255)
    assert [item.meta["label"] for item in items] == real.target.tolist()
    assert len({item.key for item in items}) == 1797


def test_folder_takes_pictures_by_name_or_content(tmp_path: Path) -> None:
    for name, data in {
        "b/2.png": png(2),
        "b/10.PNG": png(3),
        "a.b.c/with.dots.png": png(1),
        "broken.jpg": b"not a picture",
        "no-suffix": png(4),
        "renamed.txt": png(5),
        "readme.txt": b"hello",
        "labels.csv": b"",
        ".hidden.png": png(6),
        ".cache/x.png": png(7),
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    source = FolderSource(tmp_path)
    items = list(source)
    assert [item.where for item in items] == [
        "a.b.c/with.dots.png",
        "b/10.PNG",
        "b/2.png",
        "broken.jpg",
        "no-suffix",
        "renamed.txt",
    ]
    assert [item.key for item in items] == [f"{i:09d}" for i in range(6)]
    assert all(item.meta == {"path": item.where} for item in items)
    assert (source.ignored, source.survey().count) == (2, 6)


def test_folder_survives_odd_entries(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "loop").symlink_to(tmp_path)
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.png")
    elsewhere = tmp_path / "deep" / "real.png"
    elsewhere.write_bytes(png())
    (tmp_path / "link.png").symlink_to(elsewhere)
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png")).write_bytes(png())
    assert [item.where for item in FolderSource(tmp_path)] == ["deep/real.png", "link.png", "\\xff.png"]


def test_unreadable_file_is_an_item_with_a_problem(tmp_path: Path) -> None:
    (tmp_path / "gone.png").write_bytes(png())
    (tmp_path / "huge.png").touch()
    os.truncate(tmp_path / "huge.png", (256 << 20) + 1)
    (tmp_path / "zero.png").touch()
    source = FolderSource(tmp_path)
    places = list(source.places())
    (tmp_path / "gone.png").unlink()  # another program deletes it between listing and reading
    assert [(item.data, item.problem) for item in source.read(0, places)] == [
        (b"", "cannot be read: No such file or directory"),
        (b"", "file of 268435457 bytes is larger than 268435456"),
        (b"", ""),
    ]


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such folder"):
        FolderSource(tmp_path / "nowhere")


def test_folder_names_cannot_break_a_line(tmp_path: Path) -> None:
    for name in ("a\nb.png", "a\x1b[2Jb.png", "a\u202egnp.png", "no\xa0break äöü.png"):
        (tmp_path / name).write_bytes(png())
    assert sorted(item.where for item in FolderSource(tmp_path)) == [
        "a\\nb.png",
        "a\\u202egnp.png",
        "a\\x1b[2Jb.png",
        "no\xa0break äöü.png",
    ]


def test_folder_order_is_that_of_the_paths_bytes(tmp_path: Path) -> None:
    names = ["a", "a-b.png", "a.png", "a/z.png", "a/é.png", "a0.png", "b", "Z.png"]
    for name in names:
        path = tmp_path / name
        if path.suffix:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(png())
    # Folder `a` stands where its name does, before every name it is the beginning of.
    expected = ["Z.png", "a/z.png", "a/é.png", "a-b.png", "a.png", "a0.png"]
    assert list(FolderSource(tmp_path).places()) == expected


def test_folder_depth_does_not_use_up_the_stack(tmp_path: Path) -> None:
    deep = tmp_path / "/".join("d" * 300)
    deep.mkdir(parents=True)
    (deep / "x.png").write_bytes(png())
    source, limit = FolderSource(tmp_path), sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 100)
    try:
        (place,) = source.places()
    finally:
        sys.setrecursionlimit(limit)
    assert place == "d/" * 300 + "x.png"


def test_folder_copies_and_parts_give_the_same_items(tmp_path: Path) -> None:
    for number in range(7):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    (tmp_path / "0" / "sub").mkdir(parents=True)
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/0/sub/\xff.png")).write_bytes(png(8))
    source = FolderSource(tmp_path)
    items, places = list(source), list(source.places())
    copy = pickle.loads(pickle.dumps(source))
    apart = [*copy.read(0, places[:3]), *copy.read(3, pickle.loads(pickle.dumps(places[3:])))]
    assert apart == items
    assert [item.where for item in items][:2] == ["0/sub/\\xff.png", "0.png"]


def test_folder_stamp_follows_names_sizes_and_times(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(png(number))
        os.utime(tmp_path / f"{number}.png", ns=(1, 1))
    source = FolderSource(tmp_path)
    stamps = [source.survey()]
    assert source.survey() == stamps[0]
    os.utime(tmp_path / "1.png", ns=(1, 2))
    stamps.append(source.survey())
    (tmp_path / "1.png").write_bytes(png(1) + b"0")
    os.utime(tmp_path / "1.png", ns=(1, 2))
    stamps.append(source.survey())
    (tmp_path / "1.png").rename(tmp_path / "11.png")
    stamps.append(source.survey())
    assert len({survey.stamp for survey in stamps}) == 4
    assert {survey.count for survey in stamps} == {3}


def test_folder_labels_are_the_top_level_folders_in_order(tmp_path: Path) -> None:
    for name in ("dog/1.png", "cat/2024/2.png", "cat/3.png", "éléphant/4.png", ".hidden/5.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png())
    (tmp_path / "readme.txt").write_text("hello")
    source = FolderSource(tmp_path, labels=True)
    assert source.classes == ("cat", "dog", "éléphant")
    assert [(item.where, item.meta["label"]) for item in pickle.loads(pickle.dumps(source))] == [
        ("cat/2024/2.png", 0),
        ("cat/3.png", 0),
        ("dog/1.png", 1),
        ("éléphant/4.png", 2),
    ]
    assert all("label" not in item.meta for item in FolderSource(tmp_path))
    (tmp_path / "stray.png").write_bytes(png())
    with pytest.raises(UserError, match=r"stray\.png: lies in no sub-folder.*build without labels"):
        list(source.places())


@pytest.mark.parametrize(
    ("name", "content", "hint"),
    [
        ("data.mdb", b"", "holds data.mdb.*use kind lsun"),
        ("all.zip", b"PK\x03\x04", "nothing but the archive all.zip; use kind zip"),
        ("all.tgz", b"\x1f\x8b\x08", "nothing but the archive all.tgz; use kind tar"),
    ],
)
def test_folder_that_holds_another_kind_is_told_so(
    tmp_path: Path, name: str, content: bytes, hint: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=hint):
        FolderSource(tmp_path)
    if content:
        with pytest.raises(UserError, match=f"{name}: no such folder; use kind (zip|tar) for that file"):
            FolderSource(tmp_path / name)
        (tmp_path / "picture.png").write_bytes(png())
        assert [item.where for item in FolderSource(tmp_path)] == ["picture.png"]


def test_numpy_files_between_pictures_are_ignored(tmp_path: Path) -> None:
    np.save(tmp_path / "features.npy", np.zeros((3, 4)))
    (tmp_path / "picture.png").write_bytes(png())
    source = FolderSource(tmp_path)
    assert list(source.places()) == ["picture.png"]
    assert source.ignored == 1
