import io
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.decode import decode
from data_pipeline.errors import UserError
from data_pipeline.sources.arrays import ArraySource
from data_pipeline.sources.netpbm import netpbm
from tests.data_pipeline.archive_support import files_in

RNG = np.random.default_rng(3)


def pixels(*shape: int) -> np.ndarray[Any, Any]:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def npy(array: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def decoded(source: ArraySource) -> np.ndarray[Any, Any]:
    return np.stack([decode(item.data, source.default_channels) for item in source])


class Trap:
    """Leaves a trace if it is ever unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize(
    ("shape", "axes", "channels"),
    [
        ((5, 4, 4), (0, 1, 2), 1),
        ((1, 4, 4), (0, 1, 2), 1),
        ((5, 4, 4, 1), (0, 1, 2, 3), 1),
        ((5, 4, 4, 3), (0, 1, 2, 3), 3),
        ((5, 3, 4, 4), (0, 2, 3, 1), 3),
        ((5, 1, 4, 4), (0, 2, 3, 1), 1),
    ],
)
@pytest.mark.parametrize("order", ["C", "F"])
def test_layouts_of_one_array(
    tmp_path: Path, shape: tuple[int, ...], axes: tuple[int, ...], channels: int, order: Any
) -> None:
    array = pixels(*shape)
    np.save(tmp_path / "faces.npy", np.asarray(array, order=order))
    source = ArraySource(tmp_path / "faces.npy")
    expected = array.transpose(axes)
    np.testing.assert_array_equal(decoded(source), expected if expected.ndim == 4 else expected[..., None])
    assert (source.kind, source.name, source.native_size, source.default_size) == ("npz", "faces", 4, None)
    assert source.default_channels == channels
    items = list(source)
    assert [item.key for item in items] == [f"{n:09d}" for n in range(len(array))]
    assert items[-1].where == f"faces.npy[{len(array) - 1}]"
    assert items[0].meta == {}


def test_oblong_pictures_have_no_native_size(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", pixels(2, 4, 6, 3))
    source = ArraySource(tmp_path / "a.npy")
    assert source.native_size is None
    assert decoded(source).shape == (2, 4, 6, 3)


def test_an_array_of_no_pictures_is_empty(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", pixels(0, 4, 4, 3))
    np.savez(tmp_path / "a.npz", pixels(0, 4, 4, 3), np.zeros(0, np.int64))
    assert list(ArraySource(tmp_path / "a.npy")) == []
    source = pickle.loads(pickle.dumps(ArraySource(tmp_path / "a.npz", labels=True)))
    assert source.survey().count == 0


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 4, 3), np.uint8), r"shape \[4, 4, 3\] is one picture or several in grey"),
        (np.zeros((4, 4, 1), np.uint8), r"shape \[4, 4, 1\] is one picture or several"),
        (np.zeros((3, 4, 4), np.uint8), r"shape \[3, 4, 4\] is one picture or several"),
        (np.zeros((5, 3, 4, 3), np.uint8), r"shape \[3, 4, 3\] fits both"),
        (np.zeros((5, 4, 4, 4), np.uint8), r"shape \[4, 4, 4\] fits neither"),
        (np.zeros((5, 0, 0, 3), np.uint8), r"shape \[0, 0, 3\]"),
        (np.zeros((5, 4), np.uint8), r"shape \[5, 4\] is not \[N, H, W\]"),
        (np.zeros((1, 5, 4, 4, 3), np.uint8), r"shape \[1, 5, 4, 4, 3\] is not"),
        (np.zeros((5, 4, 4, 3), np.float32), r"values are float32, not uint8; bring the values to 0 … 255"),
        (np.zeros((5, 4, 4, 3), np.int8), "values are int8, not uint8"),
        (np.zeros((5, 4, 4), bool), "values are bool, not uint8"),
        (np.zeros((5, 4, 4), "u1,u1"), "not uint8"),
    ],
)
def test_other_arrays_are_refused_with_a_remedy(
    tmp_path: Path, array: np.ndarray[Any, Any], message: str
) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(UserError, match=message) as caught:
        ArraySource(tmp_path / "a.npy")
    assert str(tmp_path / "a.npy") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    array = np.array([Trap(tmp_path / "trace")] * 2, dtype=object).reshape(2, 1, 1)
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    np.savez(tmp_path / "only.npz", array)
    np.savez(tmp_path / "beside.npz", images=pixels(2, 4, 4, 3), labels=array[:, 0, 0])
    with pytest.raises(UserError, match="values are object, not uint8"):
        ArraySource(tmp_path / "a.npy")
    with pytest.raises(UserError, match=r"no uint8 array of pictures in it, only 'arr_0' object \[2, 1, 1\]"):
        ArraySource(tmp_path / "only.npz")
    with pytest.raises(UserError, match="no integer array of 2 labels in it"):
        ArraySource(tmp_path / "beside.npz", labels=True)
    (tmp_path / "folder").mkdir()
    np.save(tmp_path / "folder" / "1.npy", pixels(4, 4, 3))
    (tmp_path / "a.npy").rename(tmp_path / "folder" / "2.npy")
    source = ArraySource(tmp_path / "beside.npz")
    assert len([*source, *ArraySource(tmp_path / "folder")]) == 4
    source.close()
    assert not (tmp_path / "trace").exists()


def test_a_truncated_array_is_refused(tmp_path: Path) -> None:
    whole = npy(pixels(5, 4, 4, 3))
    (tmp_path / "a.npy").write_bytes(whole[:-1])
    with pytest.raises(UserError, match=f"a.npy: has {len(whole) - 1} of {len(whole)} bytes"):
        ArraySource(tmp_path / "a.npy")
    (tmp_path / "a.npy").write_bytes(whole[:40])
    with pytest.raises(UserError, match=r"a\.npy: damaged \(no sound \.npy header"):
        ArraySource(tmp_path / "a.npy")


def test_an_array_that_shrinks_later_is_reported_item_by_item(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    path.write_bytes(npy(pixels(5, 4, 4, 3)))
    source = ArraySource(path)
    path.write_bytes(path.read_bytes()[:-100])
    items = list(source.read(1, [1, 2]))
    assert [item.key for item in items] == ["000000001", "000000002"]
    assert all(item.problem.startswith("cannot be read: ") and not item.data for item in items)


@pytest.mark.parametrize(
    "shape", ["(-1, 4, 4)", "(10**30, 4, 4)", "5", "(2, 4, 4", "(2.0, 4, 4)", "[" * 3000]
)
def test_an_absurd_header_is_refused(tmp_path: Path, shape: str) -> None:
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    (tmp_path / "a.npy").write_bytes(
        b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(32)
    )
    with pytest.raises(UserError, match=r"a\.npy: "):
        ArraySource(tmp_path / "a.npy")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_is_unpacked_once_and_removed(tmp_path: Path, scratch: Path, save: Any) -> None:
    images, labels = pixels(6, 4, 4, 3), np.arange(6, dtype=np.uint8) % 4
    save(tmp_path / "set.npz", images, labels)
    source = ArraySource(tmp_path / "set.npz", labels=True)
    assert (source.name, source.native_size, source.default_channels) == ("set", 4, 3)
    survey = source.survey()
    assert survey.count == 6
    assert files_in(scratch) == []  # surveying alone unpacks nothing
    copy = pickle.loads(pickle.dumps(source))  # as a worker gets it, before anything was read
    np.testing.assert_array_equal(decoded(copy), images)
    assert [item.meta for item in copy] == [{"label": label} for label in labels.tolist()]
    copy.close()
    assert len(files_in(scratch)) == 1
    np.testing.assert_array_equal(decoded(source), images)
    with pytest.raises(UserError, match="is running on this machine already"):
        list(ArraySource(tmp_path / "set.npz", labels=True))
    source.close()
    assert files_in(scratch) == []
    assert list(source)[5].meta == {"label": 1}  # closed, but as good as new
    source.close()


def test_what_a_killed_process_left_is_used_again(tmp_path: Path, scratch: Path) -> None:
    images = pixels(6, 4, 4)
    np.savez(tmp_path / "set.npz", images)
    killed = ArraySource(tmp_path / "set.npz")
    next(iter(killed))
    (left,) = files_in(scratch)
    before = left.stat().st_mtime_ns
    os.close(killed._content._scratch._lock)  # type: ignore[union-attr]  # what the kernel does for a dead process
    source = ArraySource(tmp_path / "set.npz")
    np.testing.assert_array_equal(decoded(source)[..., 0], images)
    assert left.stat().st_mtime_ns == before
    source.close()


def test_what_was_left_without_labels_does_not_stand_for_both(tmp_path: Path, scratch: Path) -> None:
    np.savez(tmp_path / "set.npz", pixels(6, 4, 4), np.arange(6))
    killed = ArraySource(tmp_path / "set.npz")
    next(iter(killed))
    os.close(killed._content._scratch._lock)  # type: ignore[union-attr]
    source = ArraySource(tmp_path / "set.npz", labels=True)
    assert [item.meta["label"] for item in source] == list(range(6))
    source.close()


@pytest.mark.parametrize(
    ("arrays", "pictures", "labels"),
    [
        ({"arr_0": (5, 4, 4, 3), "arr_1": (5,)}, "arr_0", "arr_1"),
        ({"faces": (5, 4, 4, 3), "ids": (5,), "other": (6,)}, "faces", "ids"),
        ({"masks": (5, 4, 4, 1), "images": (5, 4, 4, 3), "labels": (5,), "ids": (5,)}, "images", "labels"),
        ({"x_test": (2, 4, 4), "x_train": (5, 4, 4), "y_train": (5,), "y_test": (2,)}, "x_train", "y_train"),
        ({"extra": (5, 4, 4), "data": (5, 3, 4, 4), "y": (5,), "z": (5,)}, "data", "y"),
    ],
)
def test_npz_arrays_are_chosen_by_shape_or_by_their_usual_names(
    tmp_path: Path, scratch: Path, arrays: dict[str, tuple[int, ...]], pictures: str, labels: str
) -> None:
    made = {
        name: RNG.integers(0, 100, shape).astype(np.uint8 if len(shape) > 2 else ">i4")
        for name, shape in arrays.items()
    }
    np.savez(tmp_path / "set.npz", **made)
    source = ArraySource(tmp_path / "set.npz", labels=True)
    items = list(source)
    assert b"".join(item.data[len(b"P5\n4 4\n255\n") :] for item in items) == b"".join(
        netpbm(picture)[len(b"P5\n4 4\n255\n") :] for picture in made[pictures]
    )
    assert [item.meta["label"] for item in items] == made[labels].tolist()
    source.close()
    assert list(ArraySource(tmp_path / "set.npz").read(0, [])) == []


def test_left_out_arrays_are_said(tmp_path: Path, scratch: Path, caplog: pytest.LogCaptureFixture) -> None:
    np.savez(tmp_path / "set.npz", x_train=pixels(5, 4, 4), x_test=pixels(2, 4, 4))
    ArraySource(tmp_path / "set.npz")
    assert "of 'x_train', 'x_test' takes 'x_train' alone" in caplog.text


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"a": np.zeros((5, 4, 4), np.uint8), "b": np.zeros((5, 4, 4), np.uint8)},
            "any of 'a', 'b' could be meant",
        ),
        ({"a": np.zeros((5, 4, 4), np.float32)}, r"only 'a' float32 \[5, 4, 4\]; bring the values"),
        ({}, r"neither an \.npy nor an \.npz"),
        (
            {"a": np.zeros((5, 4, 4), np.uint8), "b": np.zeros((5, 10), int)},
            "no integer array of 5 labels in it",
        ),
        ({"a": np.zeros((5, 4, 4), np.uint8), "b": np.zeros(5)}, r"'b' float64 \[5\]; save one class number"),
        (
            {"a": np.zeros((2, 4, 4), np.uint8), "b": np.zeros(2, int), "c": np.zeros(2, int)},
            "name the right one 'labels'",
        ),
    ],
)
def test_an_npz_that_leaves_a_choice_is_refused(
    tmp_path: Path, arrays: dict[str, np.ndarray[Any, Any]], message: str
) -> None:
    np.savez(tmp_path / "set.npz", **arrays)
    with pytest.raises(UserError, match=message):
        ArraySource(tmp_path / "set.npz", labels=True)


def test_negative_labels_are_refused(tmp_path: Path, scratch: Path) -> None:
    np.savez(tmp_path / "set.npz", pixels(3, 4, 4, 3), np.array([0, -1, 2]))
    source = ArraySource(tmp_path / "set.npz", labels=True)
    for _ in range(2):
        with pytest.raises(UserError, match="labels below 0"):
            list(source)
    assert files_in(scratch) == []


def test_a_member_is_never_written_under_its_own_name(tmp_path: Path, scratch: Path) -> None:
    images = pixels(2, 4, 4, 3)
    with zipfile.ZipFile(tmp_path / "set.npz", "w") as archive:
        archive.writestr("../../evil.npy", npy(images))
        archive.writestr("/tmp/readme.txt", b"no array")
    source = ArraySource(tmp_path / "set.npz")
    np.testing.assert_array_equal(decoded(source), images)
    (path,) = files_in(scratch)
    assert path.name == "pictures.npy"
    assert not list(tmp_path.rglob("evil*"))
    source.close()


def test_a_damaged_npz_is_refused(tmp_path: Path, scratch: Path) -> None:
    path = tmp_path / "set.npz"
    np.savez(path, pixels(50, 16, 16, 3))
    whole = path.read_bytes()
    path.write_bytes(whole[:20000] + bytes([whole[20000] ^ 1]) + whole[20001:])
    source = ArraySource(path)
    with pytest.raises(UserError, match=r"set\.npz: cannot be unpacked \(Bad CRC-32"):
        list(source)
    assert files_in(scratch) == []
    path.write_bytes(whole[:-30])
    with pytest.raises(UserError, match=r"set\.npz: damaged \(File is not a zip file"):
        ArraySource(path)


def test_an_npz_whose_sizes_disagree_is_refused(tmp_path: Path, scratch: Path) -> None:
    with zipfile.ZipFile(tmp_path / "set.npz", "w") as archive:
        archive.writestr("arr_0.npy", npy(pixels(2, 4, 4, 3)) + b"more")
    with pytest.raises(UserError, match=r"damaged \('arr_0' has \d+ bytes for uint8 \[2, 4, 4, 3\]"):
        ArraySource(tmp_path / "set.npz")


def test_an_encrypted_npz_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", pixels(2, 4, 4, 3))
    data = bytearray((tmp_path / "set.npz").read_bytes())
    directory = data.index(b"PK\x01\x02")
    data[6] |= 1
    data[directory + 8] |= 1
    (tmp_path / "set.npz").write_bytes(data)
    with pytest.raises(UserError, match="is encrypted"):
        ArraySource(tmp_path / "set.npz")


def test_no_labels_without_an_npz(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", pixels(2, 4, 4, 3))
    with pytest.raises(UserError, match="holds no labels"):
        ArraySource(tmp_path / "a.npy", labels=True)
    with pytest.raises(UserError, match="tells no labels"):
        ArraySource(tmp_path, labels=True)
    with pytest.raises(UserError, match="nowhere: no such file"):
        ArraySource(tmp_path / "nowhere")


def test_a_folder_holds_one_picture_in_each_file(tmp_path: Path) -> None:
    planar, packed, grey, single = pixels(3, 4, 4), pixels(4, 4, 3), pixels(4, 4), pixels(1, 3, 4, 4)
    for name, array in (("b", planar), ("a", packed), ("c", grey), ("d", single), (".hidden", grey)):
        np.save(tmp_path / f"{name}.npy", array)
    np.save(tmp_path / "e.npy", np.asfortranarray(packed))
    (tmp_path / "train.txt").write_text("a.npy")
    (tmp_path / "folder.npy").mkdir()
    source = ArraySource(tmp_path)
    items = list(source)
    assert [item.where for item in items] == [f"{name}.npy" for name in "abcde"]
    assert [item.meta for item in items] == [{"path": item.where} for item in items]
    found = [decode(item.data, 3) for item in items]
    np.testing.assert_array_equal(found[0], packed)
    np.testing.assert_array_equal(found[1], planar.transpose(1, 2, 0))
    np.testing.assert_array_equal(found[2], np.repeat(grey[..., None], 3, axis=2))
    np.testing.assert_array_equal(found[3], single[0].transpose(1, 2, 0))
    np.testing.assert_array_equal(found[4], packed)
    assert (source.native_size, source.default_channels, source.ignored) == (None, 3, 2)
    assert source.name == tmp_path.name
    copy = pickle.loads(pickle.dumps(source))
    assert [item.key for item in copy.read(3, ["d.npy", "e.npy"])] == ["000000003", "000000004"]
    stamp = source.survey().stamp
    np.save(tmp_path / "a.npy", packed[::-1])
    assert source.survey().stamp != stamp


def test_an_unusable_file_of_a_folder_is_an_item_with_a_problem(tmp_path: Path) -> None:
    np.save(tmp_path / "0.npy", pixels(4, 4, 3))
    np.save(tmp_path / "1.npy", np.zeros((4, 4, 3)))
    np.save(tmp_path / "2.npy", pixels(5, 4, 4, 3))
    (tmp_path / "3.npy").write_bytes(npy(pixels(4, 4, 3))[:-1])
    (tmp_path / "4.npy").write_bytes(b"")
    np.save(tmp_path / "5.npy", pixels(4, 4, 3))
    source = ArraySource(tmp_path)
    places = list(source.places())
    (tmp_path / "5.npy").unlink()
    problems = [item.problem for item in source.read(0, places)]
    assert problems[0] == ""
    assert problems[1] == "cannot be read: values are float64, not uint8"
    assert problems[2] == "cannot be read: shape [5, 4, 4, 3] is none of a picture"
    assert problems[3] == "cannot be read: ends after 47 of 48 values"
    assert problems[4].startswith("cannot be read: no sound .npy header")
    assert problems[5] == "cannot be read: No such file or directory"
    assert source.survey().count == 5


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no \.npy file directly in it"):
        ArraySource(tmp_path)
    np.save(tmp_path / "a.npy", pixels(5, 4, 4, 3))
    with pytest.raises(UserError, match=r"shape \[5, 4, 4, 3\] is none of a picture; each file is to be one"):
        ArraySource(tmp_path)
    np.save(tmp_path / "a.npy", np.zeros((4, 4, 3)))
    with pytest.raises(UserError, match=r"a\.npy: values are float64, not uint8"):
        ArraySource(tmp_path)
    (tmp_path / "a.npy").write_bytes(b"text")
    with pytest.raises(UserError, match=r"a\.npy: damaged"):
        ArraySource(tmp_path)
    with pytest.raises(UserError, match=r"neither an \.npy nor an \.npz"):
        ArraySource(tmp_path / "a.npy")
