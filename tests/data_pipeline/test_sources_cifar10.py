import contextlib
import io
import os
import pickle
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline.decode import decode
from data_pipeline.errors import UserError
from data_pipeline.sources import Item
from data_pipeline.sources.cifar10 import Cifar10Source
from data_pipeline.sources.cifar10_pickle import batch_records
from tests.data_pipeline.cifar10_support import LABELS, NAMES, PIXELS, binary, python_2, python_3

pytestmark = pytest.mark.usefixtures("scratch")

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def put(folder: Path, write: Any, suffix: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, pixels, labels in zip(NAMES, PIXELS, LABELS, strict=True):
        (folder / f"{name}{suffix}").write_bytes(write(pixels, labels))
    return folder


def pack(archive: Path, folder: Path, mode: str = "w:gz", name: str | None = None) -> Path:
    with tarfile.open(archive, mode) as tar:  # type: ignore[call-overload]
        tar.add(folder, arcname=folder.name if name is None else name)
    return archive


def official(items: list[Item]) -> list[tuple[object, ...]]:
    return [(item.key, item.where, item.data, item.meta, item.problem, item.split) for item in items]


def check(source: Cifar10Source) -> list[Item]:
    """Check that a source of batches gives the pictures, labels and split of this module."""
    items = list(source)
    expected = np.concatenate(PIXELS).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(np.stack([decode(item.data, 3) for item in items]), expected)
    assert [item.meta for item in items] == [{"label": label} for row in LABELS for label in row]
    assert [item.split for item in items] == ["train"] * 12 + ["val"] * 3
    assert [item.key for item in items] == [f"{number:09d}" for number in range(15)]
    assert (items[3].where, items[-1].where) == ("data_batch_2[0]", "test_batch[2]")
    assert (source.kind, source.name, source.native_size, source.default_channels) == (
        "cifar10",
        "cifar10",
        32,
        3,
    )
    assert source.default_val_fraction is None
    assert source.classes == CLASSES
    assert source.survey().count == 15
    return items


def unpacked(scratch: Path) -> list[str]:
    return sorted(path.name for path in scratch.rglob("*") if path.is_file() and path.suffix != ".lock")


def test_every_form_of_the_batches_gives_the_same_items(root: Path, scratch: Path) -> None:
    python = put(root / "cifar-10-batches-py", python_2)
    (python / "batches.meta").write_bytes(b"not looked at")
    (python / "readme.html").write_text("hello")
    binaries = put(root / "bin" / "cifar-10-batches-bin", binary, ".bin")
    sources = [
        python,
        root,  # the folder around it
        binaries,
        binaries.parent,
        pack(root / "cifar-10-python.tar.gz", python),
        pack(root / "cifar-10-binary.tar.gz", binaries),
        pack(root / "bare.tar.xz", python, "w:xz", "."),
        pack(root / "plain.tar", binaries, "w"),
    ]
    found = []
    for path in sources:
        source = Cifar10Source(path)
        found.append(official(check(source)))
        source.close()
        assert unpacked(scratch) == []
    assert all(items == found[0] for items in found)


@pytest.mark.parametrize("keys", [bytes, str])
@pytest.mark.parametrize("protocol", range(6))
def test_pickles_of_python_3(root: Path, keys: type, protocol: int) -> None:
    put(root, lambda pixels, labels: python_3(pixels, labels, keys=keys, protocol=protocol))
    source = Cifar10Source(root)
    check(source)
    source.close()


def test_arrays_in_fortran_order() -> None:
    records = batch_records(python_3(np.asfortranarray(PIXELS[0]), LABELS[0]), "batch")
    assert records == binary(PIXELS[0], LABELS[0])
    records = batch_records(python_3(np.asfortranarray(PIXELS[0]), LABELS[0], protocol=5), "batch")
    assert records == binary(PIXELS[0], LABELS[0])


def test_a_worker_gets_what_is_unpacked_and_leaves_it(root: Path, scratch: Path) -> None:
    source = Cifar10Source(put(root, python_2))
    assert unpacked(scratch) == []
    copy = pickle.loads(pickle.dumps(source))
    assert len(unpacked(scratch)) == 6
    assert [item.where for item in copy.read(13, [(5, 1), (5, 2)])] == ["test_batch[1]", "test_batch[2]"]
    copy.close()
    check(source)
    source.close()
    (item,) = copy.read(0, [(0, 0)])
    assert item.problem == "cannot be read: No such file or directory"


def test_what_a_killed_process_left_is_used_again(root: Path, scratch: Path) -> None:
    archive = pack(root / "cifar-10-python.tar.gz", put(root / "x", python_2))
    killed = Cifar10Source(archive)
    list(killed)
    times = {path: path.stat().st_mtime_ns for path in scratch.rglob("*.bin")}
    assert len(times) == 6
    os.close(killed._content._scratch._lock)  # type: ignore[union-attr]  # what the kernel does for the dead
    source = Cifar10Source(archive)
    check(source)
    assert {path: path.stat().st_mtime_ns for path in scratch.rglob("*.bin")} == times
    source.close()


def test_an_incomplete_set_is_said(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = Cifar10Source(put(root, binary, ".bin"))
    list(source)
    list(source)
    assert [record.message for record in caplog.records] == [
        f"{root}: 12 training and 3 test pictures, not CIFAR-10's 50000 and 10000"
    ]


@pytest.mark.parametrize(("write", "suffix"), [(python_2, ""), (binary, ".bin")])
def test_a_missing_batch_is_named(root: Path, scratch: Path, write: Any, suffix: str) -> None:
    folder = put(root / "x", write, suffix)
    (folder / f"data_batch_4{suffix}").unlink()
    with pytest.raises(UserError, match=rf"data_batch_4{suffix}: this batch is missing"):
        list(Cifar10Source(folder))
    archive = pack(root / "set.tar.gz", folder)
    for _ in range(2):
        with pytest.raises(UserError, match=r"set\.tar\.gz: the batch data_batch_4 is missing"):
            list(Cifar10Source(archive))
    assert unpacked(scratch) == []


def test_wrong_sizes_are_named(root: Path) -> None:
    put(root, binary, ".bin")
    path = root / "data_batch_3.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="data_batch_3 has 12291 bytes, which are no records of 3073"):
        list(Cifar10Source(root))
    path.write_bytes(b"")
    with pytest.raises(UserError, match="data_batch_3 has 0 bytes"):
        list(Cifar10Source(root))


def test_a_wrong_label_or_a_shrunken_batch_is_an_item_with_a_problem(root: Path) -> None:
    put(root, binary, ".bin")
    path = root / "data_batch_1.bin"
    path.write_bytes(b"\x0a" + path.read_bytes()[1:])
    source = Cifar10Source(root)
    first, second, *_ = source
    assert (first.problem, first.data, first.meta) == ("its label 10 is none of 0 … 9", b"", {})
    assert second.problem == ""
    path.write_bytes(path.read_bytes()[:4000])
    source.close()
    copy = pickle.loads(pickle.dumps(Cifar10Source(put(root, binary, ".bin"))))
    path.write_bytes(path.read_bytes()[:4000])
    assert [item.problem for item in copy.read(0, [(0, 0), (0, 1)])] == ["", "the batch ends before it"]


HOSTILE = {
    "os.system": b"cos\nsystem\n(S'touch TRACE'\ntR.",
    "posix.system": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x0btouch TRACE\x85R.",
    "builtins.eval": b'cbuiltins\neval\n(S\'open("TRACE", "w")\'\ntR.',
    "__builtin__.file": b"c__builtin__\nfile\n(S'TRACE'\nS'w'\ntR.",
    "numpy.load": b"cnumpy\nload\n(S'TRACE'\ntR.",
    "numpy.core.multiarray.scalar": b"cnumpy.core.multiarray\nscalar\n.",
    "numpy.ndarray.tofile": b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.",
    "the operation INST": b"(S'touch TRACE'\nios\nsystem\n.",
    "the operation OBJ": b"(cos\nsystem\nS'touch TRACE'\no.",
    "the operation NEWOBJ": b"\x80\x02cos\nsystem\nS'touch TRACE'\n\x85\x81.",
    "the operation EXT1": b"\x82\x01.",
    "the operation PERSID": b"Pid\n.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pickle_runs_nothing(root: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(root)
    put(root, python_2)
    (root / "data_batch_2").write_bytes(HOSTILE[name])
    with pytest.raises(
        UserError, match=rf"data_batch_2: no CIFAR-10 batch, its pickle asks for {name}, which was not run"
    ):
        list(Cifar10Source(root))
    archive = pack(root / "set.tar.gz", root)
    with pytest.raises(UserError, match=rf"asks for {name}"):
        list(Cifar10Source(archive))
    assert not (root / "TRACE").exists()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"text",
        python_2(PIXELS[0], LABELS[0])[:-1],
        b"cnumpy\nndarray\n(I5\ntR.",  # calling what only stands for a class
        b"c_codecs\nencode\n(VWHATEVER\nVrot13\ntR.",
        b"c_codecs\nencode\n}S'x'\nI1\nsb.",  # setting attributes of a function
        b"cnumpy\ndtype\n}S'name'\nI1\nsb.",
        b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"x.",  # bytes of an absurd length
        b"\x80\x04\x96" + struct.pack("<Q", 2**34) + b"x.",
        b"(" * 100_000 + b".",
        b"}" + b"(" * 3 + b"u.",
    ],
)
def test_a_damaged_pickle_is_named(data: bytes) -> None:
    with pytest.raises(UserError, match=r"^set: data_batch_1: ") as caught:
        batch_records(data, "set: data_batch_1")
    assert "\n" not in str(caught.value)


def test_a_pickle_cannot_fill_the_memory_with_a_table() -> None:
    with pytest.raises(UserError, match="object number 268435456 after 2 operations"):
        batch_records(b"\x80\x02]r" + struct.pack("<I", 2**28) + b".", "data_batch_1")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "no uint8 array"),
        ({"labels": [1]}, "no uint8 array"),
        ({"data": b"x" * 3072, "labels": [1]}, "no uint8 array"),
        ({"data": np.zeros((1, 3072)), "labels": [1]}, "no uint8 array"),
        ({"data": np.zeros((1, 3072), np.int8), "labels": [1]}, "no uint8 array"),
        ({"data": np.zeros((1, 3072), object), "labels": [1]}, "no uint8 array"),
        ({"data": np.zeros((1, 1024), np.uint8), "labels": [1]}, "no uint8 array"),
        ({"data": np.zeros((1, 3, 1024), np.uint8), "labels": [1]}, "no uint8 array"),
        ({"data": np.zeros((1, 3072), np.uint8), "fine_labels": [1]}, "one of CIFAR-10's labels per picture"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [1]}, "one of CIFAR-10's labels per picture"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": [10]}, "none of 0 … 9"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": [-1]}, "none of 0 … 9"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": [1.0]}, "none of 0 … 9"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": [True]}, "none of 0 … 9"),
    ],
)
def test_a_pickle_of_something_else_is_refused(values: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        batch_records(pickle.dumps(values, 2), "data_batch_1")


def test_lying_shapes_of_an_array_are_refused() -> None:
    good = python_2(PIXELS[0], LABELS[0])
    shape = b"J" + struct.pack("<i", 3) + b"J" + struct.pack("<i", 3072)
    assert good.count(shape) == 1
    for count, width in ((-3, 3072), (2**31 - 1, 3072), (3, -3072), (9216, 1)):
        lying = b"J" + struct.pack("<i", count) + b"J" + struct.pack("<i", width)
        with pytest.raises(UserError, match="no uint8 array"):
            batch_records(good.replace(shape, lying), "data_batch_1")


def test_any_flipped_byte_gives_records_or_one_line() -> None:
    good = python_2(PIXELS[3], LABELS[3])
    start = good.index(PIXELS[3].tobytes())
    places = [*range(start), *range(start + 3072, len(good))]
    for place in places:
        for bit in (1, 16, 128):
            data = good[:place] + bytes([good[place] ^ bit]) + good[place + 1 :]
            with contextlib.suppress(UserError):
                assert len(batch_records(data, "batch")) == 3073


def picture(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (seed, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def tree(root: Path, names: tuple[str, ...]) -> Path:
    for split in ("train", "test"):
        for number, name in enumerate(names):
            (root / split / name).mkdir(parents=True)
            for picture_number in range(2):
                (root / split / name / f"{picture_number:04d}.png").write_bytes(picture(number))
    return root


def test_a_tree_of_class_folders(root: Path, scratch: Path) -> None:
    folder = tree(root / "cifar", ("cat", "airplane", "truck"))
    (folder / "readme.txt").write_text("hello")
    (folder / "train" / "labels.csv").write_text("hello")
    archives = [
        pack(root / "tree.tar", folder, "w"),
        pack(root / "tree.tar.gz", folder, "w:gz"),
        pack(root / "tree.tar.xz", folder, "w:xz", "."),
    ]
    for path in (folder, *archives):
        source = Cifar10Source(path)
        items = list(source)
        assert len(items) == source.survey().count == 12
        for item in items:
            split, name, _ = item.meta["path"].split("/")[-3:]
            assert item.meta["label"] == CLASSES.index(name)
            assert item.split == ("train" if split == "train" else "val")
            assert item.data == picture({"cat": 0, "airplane": 1, "truck": 2}[name])
        assert (source.name, source.native_size, source.classes) == ("cifar10", None, CLASSES)
        assert (source.default_val_fraction, source.ignored) == (None, 2)
        copy = pickle.loads(pickle.dumps(source))
        (second,) = copy.read(1, list(source.places())[1:2])
        assert official([second]) == official([items[1]])
        copy.close()
        source.close()
    assert unpacked(scratch) == []


def test_a_tree_with_names_of_its_own(root: Path) -> None:
    source = Cifar10Source(tree(root, ("plane", "car", "cat")))
    assert source.classes == ("car", "cat", "plane")
    assert {(item.meta["path"].split("/")[1], item.meta["label"]) for item in source} == {
        ("car", 0),
        ("cat", 1),
        ("plane", 2),
    }


def test_a_tree_that_is_none_is_refused(root: Path, scratch: Path) -> None:
    folder = tree(root / "a", ("cat",))
    (folder / "preview.png").write_bytes(picture(1))
    archive = pack(root / "a.tar.gz", folder, "w:gz", ".")
    for path in (folder, archive, archive):
        with pytest.raises(UserError, match=r"preview\.png lies in neither train/<class>/ nor test/<class>/"):
            Cifar10Source(path)
    folder = tree(root / "b", ("cat",))
    (folder / "train" / "cat" / "0000.png").unlink()
    (folder / "train" / "cat" / "0001.png").unlink()
    with pytest.raises(UserError, match="no pictures in train/<class>/"):
        Cifar10Source(folder)
    with pytest.raises(UserError, match="has 11 classes, not CIFAR-10's 10"):
        Cifar10Source(tree(root / "c", tuple("abcdefghijk")))
    assert unpacked(scratch) == []


def test_anything_else_is_refused_in_one_line(root: Path) -> None:
    (root / "empty").mkdir()
    (root / "text").write_text("hello" * 1000)
    with tarfile.open(root / "other.tar", "w") as tar:
        tar.add(root / "text", "train")
    put(root / "x", binary, ".bin")
    cut = pack(root / "cut.tar.gz", root / "x")
    cut.write_bytes(cut.read_bytes()[:-2000])
    for path, message in (
        ("nowhere", "no such file"),
        ("empty", "holds nothing of CIFAR-10"),
        ("other.tar", "holds nothing of CIFAR-10"),
        ("text", "no tar, or a damaged one"),
        ("cut.tar.gz", "damaged"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            list(Cifar10Source(root / path))
        assert str(caught.value).startswith(f"{root / path}: ")
        assert "\n" not in str(caught.value)
