import io
import logging
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.decode import decode
from data_pipeline.errors import UserError
from data_pipeline.sources.celebahq import CelebaHqSource
from tests.data_pipeline.tfrecord_support import bytes_feature, example, frame, int_feature, raw_picture

pytestmark = pytest.mark.usefixtures("scratch")

FACES = np.random.default_rng(30).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)


def png(face: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(face).save(buffer, "PNG")
    return buffer.getvalue()


NAMES = [f"{number:05d}.png" for number in range(1, 5)]
FILES = dict(zip(NAMES, map(png, FACES), strict=True))


def as_folder(root: Path) -> Path:
    for name, data in FILES.items():
        (root / name).write_bytes(data)
    (root / "stats.npy").write_bytes(b"something beside the pictures")
    return root


def as_zip(root: Path) -> Path:
    with zipfile.ZipFile(root / "data256x256.zip", "w") as archive:
        for name, data in FILES.items():
            archive.writestr(f"data256x256/{name}", data)
        archive.writestr("stats.npy", b"something beside the pictures")
    return root / "data256x256.zip"


def as_tar(root: Path, mode: str = "w") -> Path:
    path = root / "data256x256.tar"
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in FILES.items():
            member = tarfile.TarInfo(f"data256x256/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def as_tar_gz(root: Path) -> Path:
    return as_tar(root, "w:gz")


def as_pggan(root: Path) -> Path:
    records = [raw_picture((3, 8, 8), face.transpose(2, 0, 1).tobytes()) for face in FACES]
    (root / "celebahq-r03.tfrecords").write_bytes(b"".join(map(frame, records)))
    (root / "celebahq-rxx.labels").write_bytes(b"none")
    (root / "preview.png").write_bytes(FILES[NAMES[0]])
    return root


def as_one_tfrecord(root: Path) -> Path:
    as_pggan(root)
    return (root / "celebahq-r03.tfrecords").rename(root / "faces")  # told by content, not by its name


def as_tfds(root: Path) -> Path:
    records = [
        example({"image": bytes_feature(data), "image/filename": bytes_feature(name.encode())})
        for name, data in FILES.items()
    ]
    for number in range(2):
        path = root / f"celeb_a_hq-train.tfrecord-{number:05d}-of-00002"
        path.write_bytes(b"".join(map(frame, records[2 * number : 2 * number + 2])))
    return root


def as_npy(root: Path) -> Path:
    np.save(root / "celebahq.npy", FACES)
    return root / "celebahq.npy"


def as_npz(root: Path) -> Path:
    np.savez_compressed(root / "celebahq.npz", FACES)
    return root / "celebahq.npz"


def as_npy_folder(root: Path) -> Path:
    for number, face in enumerate(FACES):
        np.save(root / f"imgHQ{number:05d}.npy", face.transpose(2, 0, 1)[None])
    (root / "preview.png").write_bytes(FILES[NAMES[0]])
    return root


FORMS = (
    as_folder,
    as_zip,
    as_tar,
    as_tar_gz,
    as_pggan,
    as_one_tfrecord,
    as_tfds,
    as_npy,
    as_npz,
    as_npy_folder,
)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_pictures(root: Path, scratch: Path, form: Callable[[Path], Path]) -> None:
    source = CelebaHqSource(form(root))
    survey = source.survey()
    assert survey.count == 4
    items = list(source)
    assert [item.problem for item in items] == [""] * 4
    np.testing.assert_array_equal(np.stack([decode(item.data, 3) for item in items]), FACES)
    assert [item.key for item in items] == [f"{number:09d}" for number in range(4)]
    assert (source.kind, source.name, source.default_size, source.classes) == (
        "celebahq",
        "celebahq",
        None,
        (),
    )
    assert (source.default_channels, source.default_val_fraction) == (3, 0.05)
    assert source.native_size == (8 if form in (as_pggan, as_npy, as_npz) else None)
    copy = pickle.loads(pickle.dumps(source))
    (third,) = copy.read(2, list(source.places())[2:3])
    assert (third.data, third.where, third.meta) == (items[2].data, items[2].where, items[2].meta)
    copy.close()
    assert source.survey() == survey
    source.close()
    assert not [path for path in scratch.rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_the_resolution_is_the_users(root: Path) -> None:
    for level in (2, 3):
        record = raw_picture((3, 2**level, 2**level), bytes(3 * 4**level))
        (root / f"celebahq-r{level:02d}.tfrecords").write_bytes(frame(record))
    assert CelebaHqSource(root, size=4).native_size == 4
    with pytest.raises(UserError, match="has pictures of 4, 8 pixels, none of 256"):
        CelebaHqSource(root)


def test_a_split_of_its_own_is_kept(root: Path) -> None:
    for split in ("train", "validation"):
        (root / split).mkdir()
        record = raw_picture((2, 2, 3), bytes(12), label=int_feature(0))
        (root / split / f"{split}-r01-s-0000-of-0001.tfrecords").write_bytes(frame(record))
    source = CelebaHqSource(root)
    assert source.default_val_fraction is None
    assert [item.split for item in source] == ["train", "val"]


def test_another_number_of_pictures_is_said_once(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = CelebaHqSource(as_folder(root))
    assert caplog.messages == []
    source.survey()
    list(source)
    assert caplog.messages == [f"{root}: 4 pictures, not CelebA-HQ's 30000"]
    assert caplog.records[0].levelno == logging.WARNING


def test_the_right_number_is_not_remarked_upon(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    np.save(root / "all.npy", np.zeros((30_000, 1, 2, 3), np.uint8).transpose(0, 2, 1, 3))
    assert CelebaHqSource(root / "all.npy").survey().count == 30_000
    assert caplog.messages == []


def test_what_lies_beside_the_pictures_is_counted(root: Path) -> None:
    source = CelebaHqSource(as_folder(root))
    list(source.places())
    assert source.ignored == 1


def test_anything_else_is_refused_in_one_line(root: Path) -> None:
    (root / "empty").mkdir()
    (root / "empty" / ".hidden.png").write_bytes(FILES[NAMES[0]])
    (root / "list.txt").write_text("hello, this is a list of pictures")
    (root / "tiny").write_bytes(b"x")
    (root / "celeba.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    for name in ("empty", "list.txt", "tiny", "celeba.h5", "nowhere"):
        with pytest.raises(
            UserError, match=r"name a folder, zip or tar of pictures, .*tfrecords.*npy"
        ) as caught:
            CelebaHqSource(root / name)
        assert str(caught.value).startswith(f"{root / name}: ")
        assert "\n" not in str(caught.value)


def test_a_damaged_zip_is_refused(root: Path) -> None:
    path = as_zip(root)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"data256x256\.zip"):
        CelebaHqSource(path)
