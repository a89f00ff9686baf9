import io
import os
from collections.abc import Iterator
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
    assert len(items) == source.count() == 1797
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
    assert (source.ignored, source.count()) == (2, 6)


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
    class Vanishing(FolderSource):
        def _pictures(self) -> Iterator[Path]:
            for path in super()._pictures():
                path.unlink()  # another program deletes it between listing and reading
                yield path

    (tmp_path / "gone.png").write_bytes(png())
    (item,) = Vanishing(tmp_path)
    assert item.problem == "cannot be read: No such file or directory"
    assert item.data == b""


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such folder"):
        FolderSource(tmp_path / "nowhere")
