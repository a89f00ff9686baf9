import pickle
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.decode import decode
from data_pipeline.errors import UserError
from data_pipeline.sources import Item
from data_pipeline.sources.tfrecord import TfRecordSource, byte_values, frames, int_values, parse_example
from tests.data_pipeline.tfrecord_support import (
    bytes_feature,
    crc32c,
    delimited,
    example,
    float_feature,
    frame,
    int_feature,
    masked,
    raw_picture,
    varint,
)

RNG = np.random.default_rng(4)


def pixels(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def write(path: Path, *records: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(map(frame, records)))
    return path


def only(path: Path) -> Item:
    (item,) = TfRecordSource(path)
    return item


def test_the_tests_own_checksum_is_crc32c() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    # RFC 3720, appendix B.4
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E
    assert crc32c(bytes(range(31, -1, -1))) == 0x113FDB5C


def test_raw_pixels_of_stylegan_are_planar_and_of_glow_are_not(tmp_path: Path) -> None:
    planar, packed, grey = pixels(3, 4, 4), pixels(4, 4, 3), pixels(1, 4, 4)
    path = write(
        tmp_path / "set.tfrecords",
        raw_picture((3, 4, 4), planar.tobytes()),
        raw_picture((4, 4, 3), packed.tobytes(), label=int_feature(0)),
        raw_picture((1, 4, 4), grey.tobytes(), label=int_feature(7, packed=False)),
    )
    source = TfRecordSource(path)
    items = list(source)
    np.testing.assert_array_equal(decode(items[0].data, 3), planar.transpose(1, 2, 0))
    np.testing.assert_array_equal(decode(items[1].data, 3), packed)
    np.testing.assert_array_equal(decode(items[2].data, 1)[:, :, 0], grey[0])
    assert [item.meta for item in items] == [{}, {"label": 0}, {"label": 7}]
    assert [item.key for item in items] == ["000000000", "000000001", "000000002"]
    assert [item.split for item in items] == [None] * 3
    assert items[0].where == "set.tfrecords@0"
    assert (source.name, source.native_size, source.default_channels) == ("set", None, 3)
    assert source.default_val_fraction == 0.05


def test_picture_files_are_kept_as_they_are(tmp_path: Path) -> None:
    path = write(
        tmp_path / "celeb_a_hq-train.tfrecord-00000-of-00001",
        example({"image": bytes_feature(b"\x89PNG 1"), "image/filename": bytes_feature(b"00001.png")}),
        example({"image/encoded": bytes_feature(b"\xff\xd8 2"), "label": int_feature(-1)}),
    )
    source = TfRecordSource(path.parent)
    first, second = source
    assert (first.data, first.where, first.meta) == (b"\x89PNG 1", "00001.png", {"path": "00001.png"})
    assert (second.data, second.meta, second.problem) == (b"\xff\xd8 2", {}, "")
    assert second.where.startswith("celeb_a_hq-train.tfrecord-00000-of-00001@")
    assert source.default_val_fraction == 0.05  # all train: the collection has no split of its own


def test_grey_collections_are_grey(tmp_path: Path) -> None:
    path = write(tmp_path / "m.tfrecords", raw_picture((1, 4, 4), bytes(16)))
    assert TfRecordSource(path).default_channels == 1


def test_places_are_found_without_reading_the_data(tmp_path: Path) -> None:
    records = [raw_picture((3, 2, 2), bytes([n] * 12)) for n in range(5)]
    path = write(tmp_path / "set.tfrecords", *records)
    damaged = bytearray(path.read_bytes())
    damaged[2 * len(frame(records[0])) + 20] ^= 4
    path.write_bytes(damaged)
    source = TfRecordSource(path)
    places = list(source.places())
    assert places == [(0, n * len(frame(records[0])), len(records[0])) for n in range(5)]
    assert source.survey().count == 5
    items = pickle.loads(pickle.dumps(source)).read(2, places[2:])
    assert [(item.key, item.problem) for item in items] == [
        ("000000002", "damaged record: checksum mismatch"),
        ("000000003", ""),
        ("000000004", ""),
    ]


def test_the_stamp_changes_with_the_files(tmp_path: Path) -> None:
    path = write(tmp_path / "set.tfrecords", raw_picture((3, 2, 2), bytes(12)))
    source = TfRecordSource(path)
    stamp = source.survey().stamp
    assert source.survey().stamp == stamp
    write(path, *[raw_picture((3, 2, 2), bytes(12))] * 2)
    assert source.survey().stamp != stamp
    (item,) = source.read(0, [(0, 3, len(raw_picture((3, 2, 2), bytes(12))))])
    assert item.problem == "damaged record: the file has changed since it was listed"


@pytest.mark.parametrize("position", [0, 7, 8, 11])
def test_a_damaged_length_ends_the_collection(tmp_path: Path, position: int) -> None:
    record = raw_picture((3, 2, 2), bytes(12))
    path = write(tmp_path / "set.tfrecords", record, record)
    damaged = bytearray(path.read_bytes())
    damaged[len(frame(record)) + position] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(
        UserError, match=rf"set.tfrecords: the record at byte {len(frame(record))} has a damaged length"
    ):
        list(TfRecordSource(path))


@pytest.mark.parametrize("missing", [1, 4, 5, 30])
def test_a_truncated_file_is_named_with_the_place(tmp_path: Path, missing: int) -> None:
    record = raw_picture((3, 2, 2), bytes(12))
    path = write(tmp_path / "set.tfrecords", record, record)
    path.write_bytes(path.read_bytes()[:-missing])
    with pytest.raises(
        UserError, match=rf"set.tfrecords: the record at byte {len(frame(record))} is cut short"
    ):
        list(TfRecordSource(path).places())
    path.write_bytes(frame(record) + frame(record)[:5])
    with pytest.raises(UserError, match=rf"byte {len(frame(record))} is cut short"):
        list(frames(path))


def test_an_absurd_length_with_a_right_checksum_is_a_truncation(tmp_path: Path) -> None:
    length = struct.pack("<Q", 2**64 - 1)
    path = tmp_path / "set.tfrecords"
    path.write_bytes(length + masked(length))
    with pytest.raises(UserError, match="at byte 0 is cut short"):
        TfRecordSource(path)


def test_other_files_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "set.tfrecords"
    path.write_bytes(b"\x1f\x8b" + bytes(40))
    with pytest.raises(UserError, match="compressed; unpack it"):
        TfRecordSource(path)
    path.write_bytes(b"no records, but long enough for one")
    with pytest.raises(UserError, match="no TFRecord file"):
        TfRecordSource(path)
    with pytest.raises(UserError, match="nowhere: no such file"):
        TfRecordSource(tmp_path / "nowhere")
    path.unlink()
    with pytest.raises(UserError, match=r"no \.tfrecords files in it"):
        TfRecordSource(tmp_path)


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        (raw_picture((3, 2, 2), bytes(11)), r"11 bytes of pixels do not fit the shape \[3, 2, 2\]"),
        (raw_picture((3, -2, -2), bytes(12)), r"do not fit the shape \[3, -2, -2\]"),
        (raw_picture((3, 2**62, 4), bytes(12)), "do not fit the shape"),
        (raw_picture((3, 0, 0), b""), "do not fit the shape"),
        (raw_picture((12,), bytes(12)), r"do not fit the shape \[12\]"),
        (raw_picture((1, 3, 2, 2), bytes(12)), "do not fit the shape"),
        (raw_picture((), b""), r"do not fit the shape \[\]"),
        (raw_picture((2, 3, 2), bytes(12)), "fits neither"),
        (raw_picture((3, 4, 3), bytes(36)), "fits both"),
        (example({"shape": int_feature(3, 2, 2), "data": bytes_feature()}), "'data' has no value"),
        (example({"shape": int_feature(3, 2, 2), "data": int_feature(1)}), "'data' has no value of its type"),
        (example({"image": bytes_feature(b"a", b"b")}), "'image' has several values"),
        (example({"image": bytes_feature(b"a"), "label": float_feature(1.0)}), "'label' has no value"),
        (
            example({"picture": bytes_feature(b"a"), "x": b""}),
            r"nor image/encoded among its features \(picture, x\)",
        ),
        (b"", r"among its features \(none\)"),
        (b"\x02\x00", "no protobuf message"),
        (b"\x8a" + b"\x80" * 9 + b"\x00\x00", "more than 64 bits"),  # padded beyond what 64 bits can need
        (delimited(1, delimited(1, b"\x0b")), "wire type 3"),
        (b"\x0a" + varint(2**63), "ends beyond it"),
        (b"\x0a" + b"\xff" * 10 + b"\x01", "more than 64 bits"),
        (b"\x0a" + b"\xff" * 9 + b"\x02", "more than 64 bits"),
        (b"\x0a\xff", "cut short"),
        (b"\x09\x00", "ends beyond it"),
        (delimited(1, delimited(1, b"") * 5000), "more than 4096 features"),
    ],
)
def test_an_unusable_record_is_an_item_with_a_problem(tmp_path: Path, record: bytes, problem: str) -> None:
    good = raw_picture((3, 2, 2), bytes(12))
    first, second, third = TfRecordSource(write(tmp_path / "set.tfrecords", good, record, good))
    assert re.search(problem, second.problem), second.problem
    assert second.problem.startswith("damaged record: ")
    assert second.data == first.problem.encode() == third.problem.encode() == b""


def test_unknown_fields_and_repeated_messages_are_read_as_protobuf_says(tmp_path: Path) -> None:
    unknown = varint(9 << 3) + varint(5) + varint(10 << 3 | 1) + bytes(8) + varint(11 << 3 | 5) + bytes(4)
    unknown += delimited(12, b"anything")
    entry = (
        unknown + delimited(1, b"image") + unknown + delimited(2, unknown + bytes_feature(b"new") + unknown)
    )
    record = (
        example({"image": bytes_feature(b"old"), "f": float_feature(0.5)})
        + unknown
        + delimited(1, delimited(1, entry))
    )
    assert only(write(tmp_path / "set.tfrecords", record)).data == b"new"


@given(
    st.dictionaries(st.text(max_size=8), st.lists(st.integers(-(2**63), 2**63 - 1), max_size=6)),
    st.booleans(),
)
def test_integers_survive(values: dict[str, list[int]], packed: bool) -> None:
    found = parse_example(example({name: int_feature(*row, packed=packed) for name, row in values.items()}))
    assert len(found) == len(values)
    assert [list(int_values(feature)) for feature in found.values()] == list(values.values())
    assert not any(list(byte_values(feature)) for feature in found.values())


@given(st.binary(max_size=60))
def test_any_bytes_are_a_message_or_a_value_error(data: bytes) -> None:
    for record in (
        data,
        delimited(1, data),
        delimited(1, delimited(1, delimited(1, b"image") + delimited(2, data))),
    ):
        try:
            for feature in parse_example(record).values():
                list(int_values(feature))
                list(byte_values(feature))
        except ValueError:
            pass


def multi_resolution(folder: Path, *levels: int) -> None:
    for level in levels:
        side = 2**level
        record = raw_picture((3, side, side), bytes([level]) * (3 * side * side))
        write(folder / f"celebahq-r{level:02d}.tfrecords", record)


def test_one_resolution_is_taken(tmp_path: Path) -> None:
    multi_resolution(tmp_path, 2, 3, 8)
    source = TfRecordSource(tmp_path)
    assert source.native_size == 256
    assert [path.name for path in source.files()] == ["celebahq-r08.tfrecords"]
    assert TfRecordSource(tmp_path, size=4).native_size == 4
    (item,) = TfRecordSource(tmp_path, size=8)
    assert (item.where, decode(item.data, 3).shape) == ("celebahq-r03.tfrecords@0", (8, 8, 3))
    with pytest.raises(UserError, match="has pictures of 4, 8, 256 pixels, none of 128; give --size"):
        TfRecordSource(tmp_path, size=128)
    # A single resolution is taken whatever the size: the build makes it smaller.
    assert TfRecordSource(tmp_path / "celebahq-r03.tfrecords", size=4).native_size == 8
    (tmp_path / "celebahq-r08.tfrecords").unlink()
    with pytest.raises(UserError, match="has pictures of 4, 8 pixels, none of 256"):
        TfRecordSource(tmp_path)
    write(tmp_path / "other.tfrecords", raw_picture((3, 4, 4), bytes(48)))
    with pytest.raises(UserError, match="with and without -rNN"):
        TfRecordSource(tmp_path)


def glow(folder: Path, split: str, shards: int) -> None:
    for shard in range(shards):
        record = raw_picture(
            (2, 2, 3), bytes([shard]) * 12, label=int_feature(0), attr=int_feature(*range(-5, 5))
        )
        write(folder / split / f"{split}-r01-s-{shard:04d}-of-{shards:04d}.tfrecords", record, record)


def test_glows_shards_bring_their_split(tmp_path: Path) -> None:
    glow(tmp_path, "validation", 2)
    glow(tmp_path, "train", 12)
    source = TfRecordSource(tmp_path)
    items = list(source)
    assert [item.split for item in items] == ["train"] * 24 + ["val"] * 4
    assert [item.data[-1] for item in items] == [n // 2 for n in (*range(24), *range(4))]
    assert items[-1].where.startswith("validation/validation-r01-s-0001-of-0002.tfrecords@")
    assert source.default_val_fraction is None
    assert source.native_size == 2
    only_train = TfRecordSource(tmp_path / "train")
    assert only_train.default_val_fraction == 0.05
    assert {item.split for item in only_train} == {None}


def test_the_split_may_stand_in_the_folder_alone(tmp_path: Path) -> None:
    record = raw_picture((3, 2, 2), bytes(12))
    for name in ("train/a.tfrecords", "valid/b.tfrecords"):
        write(tmp_path / name, record)
    assert [item.split for item in TfRecordSource(tmp_path)] == ["train", "val"]
    write(tmp_path / "more/c.tfrecords", record)
    assert [item.split for item in TfRecordSource(tmp_path)] == [None] * 3


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    glow(tmp_path, "train", 12)
    (tmp_path / "train/train-r01-s-0007-of-0012.tfrecords").unlink()
    with pytest.raises(
        UserError, match=r"train/train-r01-s-0007-of-0012\.tfrecords: this shard is missing, 11 of 12"
    ):
        TfRecordSource(tmp_path)
    path = write(tmp_path / "x-train.tfrecord-00000-of-00003", raw_picture((3, 2, 2), bytes(12)))
    with pytest.raises(UserError, match=r"x-train\.tfrecord-00001-of-00003: this shard is missing"):
        TfRecordSource([path])
    path = write(tmp_path / "y-s-0000-of-999999999.tfrecords", raw_picture((3, 2, 2), bytes(12)))
    with pytest.raises(UserError, match=r"y-s-0001-of-999999999\.tfrecords: this shard is missing, 1 of"):
        TfRecordSource(path)


def test_several_files_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    paths = [
        write(tmp_path / name, raw_picture((3, 1, 2), bytes([n] * 6))) for n, name in enumerate(("b", "a"))
    ]
    source = TfRecordSource(paths)
    assert [item.data[-1] for item in source] == [1, 0]
    paths[0].unlink()
    first, second = source.read(0, [(0, 0, len(raw_picture((3, 1, 2), bytes(6)))), (1, 0, 9)])
    assert (first.problem, second.problem) == ("", "cannot be read: No such file or directory")
