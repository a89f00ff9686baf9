import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.documents import sha256_hex
from data_pipeline.errors import StorageFault, UserError
from data_pipeline.index import load_index
from data_pipeline.inspect import OrderReport, order_of, stats, summarise
from data_pipeline.order import Order
from data_pipeline.reader import ShardReader
from data_pipeline.split_reader import index_order
from data_pipeline.tars.adopt import AdoptOptions, adopt
from tests.data_pipeline.picture_support import npy_by_hand


def order_at(url: Path | str, *, with_keys: bool = False) -> OrderReport:
    return order_of(
        load_index(str(url)),
        split="train",
        seed=5,
        window_shards=2,
        start=1430,
        count=20,
        with_keys=with_keys,
    )


def test_the_order_needs_nothing_but_the_index(damageable_url: Path) -> None:
    named = order_at(damageable_url, with_keys=True)
    for file in damageable_url.iterdir():
        if file.name != "index.json":
            file.unlink()
    report = order_at(damageable_url)
    entries = load_index(str(damageable_url)).shards("train")
    order = Order([entry.samples for entry in entries], 5, 2)
    shards, members = order.locate(np.arange(1430, 1450))
    assert [row.position for row in report.rows] == list(range(1430, 1450))
    assert [row.epoch for row in report.rows] == [p // order.epoch_size for p in range(1430, 1450)]
    assert [row.shard for row in report.rows] == [entries[shard].name for shard in shards]
    assert [row.member for row in report.rows] == members.tolist()
    assert {row.key for row in report.rows} == {None}
    assert [row.model_copy(update={"key": None}) for row in named.rows] == report.rows
    assert len({row.key for row in named.rows}) == 20
    with pytest.raises(StorageFault, match="missing"):
        order_at(damageable_url, with_keys=True)
    with pytest.raises(UserError, match="no split"):
        order_of(load_index(str(damageable_url)), split="x", seed=0, window_shards=1, start=0, count=1)


@pytest.mark.parametrize("limit", [1, 100, 2000])
def test_stats_look_at_the_first_pictures(digits_url: str, limit: int) -> None:
    loaded = load_index(digits_url)
    report = stats(loaded, limit=limit)
    index = loaded.index
    assert (report.kept, report.duplicates, report.classes) == (index.kept, index.duplicates, index.classes)
    assert (report.encoding, report.rejected) == (index.encoding, 0)
    for split, found in report.splits.items():
        count = min(limit, index.samples(split))
        sizes: list[int] = []
        labels: list[int] = []
        reader = ShardReader(loaded, split)
        for shards, members in index_order(loaded, split, 1, limit):
            sizes += map(len, reader.fetch(shards, members))
            entry, record = loaded.shards(split)[int(shards[0])], reader.records(int(shards[0]))[members[0]]
            meta = (Path(digits_url) / entry.name).read_bytes()[int(record["meta_offset"]) :]
            labels.append(json.loads(meta[: int(record["meta_size"])])["label"])
        assert (found.samples, found.pixels_of, found.labelled) == (index.samples(split), count, count)
        assert found.picture_bytes == pytest.approx(np.mean(sizes), rel=1e-12)
        expected = {str(label): labels.count(label) for label in sorted(set(labels))}
        assert list(found.labels.values()) == list(expected.values())
        if not index.classes:
            assert found.labels == expected


def test_labels_are_what_the_meta_data_call_so(tmp_path: Path) -> None:
    metas = [b'{"label": 1}', b'{"label": 0}', b'{"label": 1}', b'{"label": 7}', b'{"label": "cat"}']
    metas += [b'{"label": true}', b"[1]", b"no JSON", b"\xff", b"", b'{"label": 10000000000000000000000}']
    for number in range(2):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as archive:
            for place, meta in enumerate(metas[number:]):
                picture = npy_by_hand("2, 2", bytes(4))
                for name, data in ((f"{place}.npy", picture), (f"{place}.json", meta)):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    (tmp_path / "0.tar").rename(tmp_path / "val.tar")
    adopt(str(tmp_path), str(tmp_path), AdoptOptions())
    content = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps({**content, "classes": ["cat", "dog"]}))
    found = stats(load_index(str(tmp_path)), limit=100).splits["val"]
    assert (found.pixels_of, found.labelled) == (11, 5)
    assert found.labels == {"cat": 1, "dog": 2, "7": 1, "10000000000000000000000": 1}
    data = (tmp_path / "val.tar").read_bytes()
    place = data.index(metas[0])
    (tmp_path / "val.tar").write_bytes(data[:place] + b"[" + data[place + 1 :])
    with pytest.raises(StorageFault, match=r"val\.tar: missing or damaged"):
        stats(load_index(str(tmp_path)), limit=100)


def test_the_summary_is_of_what_lies_there(digits_url: str) -> None:
    report = summarise(digits_url, already_built=True, ignored=3)
    assert report.index_sha256 == sha256_hex((Path(digits_url) / "index.json").read_bytes())
    index = load_index(digits_url).index
    assert (report.kept, report.duplicates, report.ignored) == (index.kept, index.duplicates, 3)
    assert sum(report.samples.values()) == 1797
