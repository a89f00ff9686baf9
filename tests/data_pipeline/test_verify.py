import io
import json
import re
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest

from data_pipeline.documents import sha256_hex
from data_pipeline.index import RECORD, Records, ShardEntry, load_index
from data_pipeline.tars.adopt import AdoptOptions, adopt
from data_pipeline.verify import VerifyReport, verify
from tests.data_pipeline.picture_support import npy_by_hand


def report_of(url: Path) -> VerifyReport:
    return verify(load_index(str(url)))


def train_shards(url: Path) -> list[ShardEntry]:
    return load_index(str(url)).shards("train")


def change_index(url: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((url / "index.json").read_text())
    change(content)
    (url / "index.json").write_text(json.dumps(content))


def forge(url: Path, number: int, tar: bytes, records: Records) -> None:
    """Replace a shard and its records, hashes in the index included: only looking inside finds it."""

    def change(content: dict[str, Any]) -> None:
        entry = content["splits"]["train"][number]
        entry.update(bytes=len(tar), sha256=sha256_hex(tar), samples=len(records))
        entry.update(idx_bytes=records.nbytes, idx_sha256=sha256_hex(records.tobytes()))

    entry = train_shards(url)[number]
    (url / entry.name).write_bytes(tar)
    (url / entry.idx_name).write_bytes(records.tobytes())
    change_index(url, change)


def shard_of(url: Path, number: int) -> tuple[bytes, Records]:
    entry = train_shards(url)[number]
    return (url / entry.name).read_bytes(), np.frombuffer((url / entry.idx_name).read_bytes(), RECORD).copy()


def flip(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def test_a_sound_data_set_is_sound_by_any_number_of_processes(digits_url: str) -> None:
    loaded = load_index(digits_url)
    report = verify(loaded)
    entries = [entry for split in loaded.index.splits.values() for entry in split]
    assert (report.problems, report.notes) == ([], [])
    assert (report.shards, report.samples) == (len(entries), 1797)
    assert report.bytes == sum(entry.bytes for entry in entries)
    assert verify(loaded, workers=2) == report


def test_every_kind_of_damage_is_found(damageable_url: Path) -> None:
    first, second, third, fourth = train_shards(damageable_url)[:4]
    data = (damageable_url / first.name).read_bytes()
    (damageable_url / first.name).write_bytes(flip(data, 520))  # within the first picture
    (damageable_url / second.name).unlink()
    (damageable_url / third.idx_name).write_bytes(b"")
    data = (damageable_url / fourth.name).read_bytes()
    (damageable_url / fourth.name).write_bytes(data[:20_000])
    report = report_of(damageable_url)
    assert report.problems[:2] == [
        f"{first.name}: SHA-256 differs from the index",
        f"{first.name}: member 0: picture has a wrong CRC32C",
    ]
    assert report.problems[2] == f"{second.name}: missing"
    assert report.problems[3].startswith(f"{third.name}: {damageable_url}/{third.idx_name}: 0 bytes, too few")
    assert report.problems[4:6] == [
        f"{fourth.name}: 20000 bytes, the index says {fourth.bytes}",
        f"{fourth.name}: SHA-256 differs from the index",
    ]
    assert any("the tar is damaged at byte" in problem for problem in report.problems[6:8])
    behind = [problem for problem in report.problems if "is behind the end of the tar" in problem]
    assert fourth.samples // 2 < len(behind) >= len(report.problems) - 8
    (damageable_url / third.idx_name).unlink()
    assert f"{third.idx_name}: missing though" in report_of(damageable_url).problems[3]


def test_behind_a_damaged_header_pictures_are_found_by_their_records(damageable_url: Path) -> None:
    data, records = shard_of(damageable_url, 0)
    header = int(records["offset"][7]) - 512
    behind = int(records["offset"][9]) + 20
    name = train_shards(damageable_url)[0].name
    (damageable_url / name).write_bytes(flip(flip(data, header), behind))
    assert report_of(damageable_url).problems == [
        f"{name}: SHA-256 differs from the index",
        f"{name}: the tar is damaged at byte {header}: damaged header",
        f"{name}: member 9: picture has a wrong CRC32C",
    ]


def moved(records: Records) -> None:
    records["offset"][3] += 512


def shortened(records: Records) -> None:
    records["size"][3] -= 1


def without_meta(records: Records) -> None:
    for name in ("meta_offset", "meta_size", "meta_crc32c"):
        records[name][3] = 0


def wrong_meta(records: Records) -> None:
    records["meta_crc32c"][3] += 1


def swapped(records: Records) -> None:
    for name in ("meta_offset", "meta_size", "meta_crc32c"):
        records[name][3:5] = records[name][3:5][::-1].copy()


def doubled(records: Records) -> None:
    records[4] = records[3]


@pytest.mark.parametrize(
    ("change", "problems"),
    [
        (moved, ["sample '.*' of the tar is in no record", "member 3: no picture of the tar begins at byte"]),
        (shortened, [r"member 3: \d+ bytes in the tar, the record says \d+"]),
        (
            without_meta,
            [r"member 3: meta data \(first byte, size\) is .* in the tar, \(0, 0\) in the record"],
        ),
        (wrong_meta, ["member 3: meta data has a wrong CRC32C"]),
        (swapped, ["member 3: meta data .first byte", "member 4: meta data .first byte"]),
        (doubled, ["sample '.*' of the tar is in no record", "member 3: no picture of the tar begins"]),
    ],
)
def test_records_and_tar_must_agree(
    damageable_url: Path, change: Callable[[Records], None], problems: list[str]
) -> None:
    data, records = shard_of(damageable_url, 1)
    change(records)
    forge(damageable_url, 1, data, records)
    report = report_of(damageable_url)
    assert len(report.problems) == len(problems)
    for problem, expected in zip(report.problems, problems, strict=True):
        assert re.match(rf"{train_shards(damageable_url)[1].name}: {expected}", problem), problem


def test_no_picture_of_a_tar_may_be_missing_from_the_records(damageable_url: Path) -> None:
    data, records = shard_of(damageable_url, 1)
    forge(damageable_url, 1, data, np.delete(records, 5))
    (problem,) = report_of(damageable_url).problems
    assert "of the tar is in no record" in problem
    # Members that are neither pictures nor their meta data do no harm.
    buffer = io.BytesIO(data)
    with tarfile.open(fileobj=buffer, mode="a") as archive:
        archive.addfile(tarfile.TarInfo("README"))
    forge(damageable_url, 1, buffer.getvalue(), records)
    assert report_of(damageable_url).problems == []


def test_no_key_stands_twice(damageable_url: Path) -> None:
    data, records = shard_of(damageable_url, 2)
    forge(damageable_url, 0, data, records)
    first, _, third = train_shards(damageable_url)[:3]
    assert report_of(damageable_url).problems == [
        f"{third.name}: {len(records)} of its keys stand in {first.name} too, such as that of member 0, "
        "there member 0"
    ]
    once = data[: len(data.rstrip(b"\0")) // 512 * 512 + 512]
    again = records.copy()
    for name in ("offset", "meta_offset"):
        again[name] += len(once)
    forge(damageable_url, 0, once + data, np.concatenate([records, again]))
    problems = report_of(damageable_url).problems
    assert "is in no record (its key stands in the tar before" in problems[0]


def test_pictures_must_have_the_size_of_the_index_and_decode(damageable_url: Path) -> None:
    change_index(damageable_url, lambda content: content["geometry"].update(size=9))
    problems = report_of(damageable_url).problems
    assert len(problems) == 1797
    assert problems[0].endswith("member 0: 8 x 8 pixels, the index says 9 x 9")
    change_index(damageable_url, lambda content: content["geometry"].update(size=8))
    data, records = shard_of(damageable_url, 0)
    start, size = int(records["offset"][2]), int(records["size"][2])
    data = data[:start] + bytes(size) + data[start + size :]
    records["crc32c"][2] = google_crc32c.value(bytes(size))
    forge(damageable_url, 0, data, records)
    (problem,) = report_of(damageable_url).problems
    assert problem.endswith("member 2: not a picture of any known format")


def test_what_does_not_belong_there_is_noted(damageable_url: Path) -> None:
    for number in range(7):
        (damageable_url / f"note\n{number}").write_bytes(b"")
    (damageable_url / "rejected.jsonl").write_bytes(b"")
    report = report_of(damageable_url)
    assert report.problems == []
    names = ", ".join(f"note\\n{number}" for number in range(5))
    assert report.notes == [f"not of the data set: {names} and 3 more"]
    for number in range(7):
        (damageable_url / f"note\n{number}").unlink()
    change_index(damageable_url, lambda content: content.update(rejected=2, duplicates=3))
    assert report_of(damageable_url).notes == ["duplicates.jsonl is missing, which listed 3"]


def test_adopted_tars_may_use_the_same_keys_but_hide_nothing(tmp_path: Path) -> None:
    for number in range(3):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as archive:
            for place in range(3):
                data = npy_by_hand("2, 2", bytes([number, place, 0, 0]))
                info = tarfile.TarInfo(f"{place}.npy")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    adopt(str(tmp_path), str(tmp_path), AdoptOptions())
    assert report_of(tmp_path).problems == []
    data, records = shard_of(tmp_path, 0)
    forge(tmp_path, 0, data, records[1:])
    assert report_of(tmp_path).problems == [
        "1 samples of the tars are in no record, the index counts 0 as rejected"
    ]


def test_memory_does_not_grow_with_the_shard(tmp_path: Path) -> None:
    side = 1024
    pixels = np.random.default_rng(0).integers(0, 256, side * side * 3, dtype=np.uint8).tobytes()
    data = npy_by_hand(f"{side}, {side}, 3", pixels)
    for number, pictures in enumerate((1, 32)):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as archive:
            for place in range(pictures):
                info = tarfile.TarInfo(f"{place}.npy")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    assert (tmp_path / "1.tar").stat().st_size > 100_000_000
    tracemalloc.start()
    try:
        adopt(str(tmp_path), str(tmp_path), AdoptOptions())
        adopting = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        assert report_of(tmp_path).problems == []
        verifying = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert max(adopting, verifying) < 40_000_000
