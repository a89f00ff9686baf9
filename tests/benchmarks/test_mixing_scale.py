"""`benchmarks.mixing` and `benchmarks.scale` end to end with small numbers, and their parts."""

import json
import statistics
from pathlib import Path

import numpy as np
import pytest

from benchmarks import mixing, scale
from benchmarks.harness import OURS
from benchmarks.mixing import FULL_SHUFFLE, MixingResult, correlation, dispersion, overlap, same_group
from benchmarks.scale import INDEX_FILE, ScaleResult, divided, make_index, measure_reading, own_positions
from data_pipeline import feed
from data_pipeline.index import RECORD, Index

SMALL_MIXING = ["--shards", "40", "--samples", "100", "--classes", "20", "--seeds", "3"]
SMALL_SCALE = [
    *("--shards", "300", "--samples", "200", "--picture-bytes", "3000", "--ranks", "16", "--per-rank", "4"),
    *("--prefetch-bytes", "4000000", "--repeats", "1"),
]


def test_mixing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mixing.json"
    result = mixing.main([*SMALL_MIXING, "--json", str(file)])
    assert MixingResult.from_json(file.read_bytes(), file.name) == result
    assert json.loads(file.read_bytes())["schema"] == "mixing-benchmark/1"
    assert result.environment.packages["webdataset"]
    found = {contender.name: contender for contender in result.contenders}
    windows = [f"{OURS}, window of 1 shard", *(f"{OURS}, window of {n} shards" for n in (4, 16))]
    peers = ["webdataset, shuffle(1000)", "webdataset, shuffle(10000)"]
    assert list(found) == [FULL_SHUFFLE, *windows, *peers], "no window is larger than the data set"
    assert all(len(c.dispersion) == len(c.overlap) == 3 for c in result.contenders)
    full = found[FULL_SHUFFLE]
    assert statistics.median(full.dispersion) == pytest.approx(1, abs=0.2)
    assert statistics.median(full.same_shard) == pytest.approx(1, abs=0.1)
    assert statistics.median(full.overlap) == pytest.approx(1, abs=0.4)
    assert max(full.rho) < 0.08  # five standard deviations
    for measure in ("dispersion", "same_shard", "overlap"):
        medians = [statistics.median(getattr(found[name], measure)) for name in (*windows, FULL_SHUFFLE)]
        assert medians == sorted(medians, reverse=True), f"larger windows have less {measure}"
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines if "(" in line and line.startswith(OURS)] == windows
    assert sum(line.startswith("spreads classes over batches") for line in lines) == 2


@pytest.mark.parametrize("name", ["full", "ours", "webdataset"])
def test_epochs_differ_and_come_again(name: str) -> None:
    options = mixing.read(SMALL_MIXING)
    found = {
        contender.split(",")[0].split()[0]: deliver
        for contender, (_, deliver) in mixing.contenders(options).items()
    }
    deliver = found[name]
    assert np.array_equal(deliver(1, 0), deliver(1, 0))
    assert np.array_equal(np.sort(deliver(1, 1)), np.arange(4000))
    assert not np.array_equal(deliver(1, 0), deliver(1, 1))
    assert not np.array_equal(deliver(1, 0), deliver(2, 0))


def test_an_epoch_that_lacks_samples_is_refused() -> None:
    options = mixing.read(SMALL_MIXING)
    with pytest.raises(ValueError, match="broken: an epoch does not hold every sample"):
        mixing.measure(options, "broken", 1, lambda seed, epoch: np.zeros(4000, dtype=np.int64))


def test_measures_of_orders_that_are_known() -> None:
    sorted_order = np.arange(1280)
    classes = sorted_order // 128
    # A batch of one class alone: ((128 - 12.8)^2 / 12.8 + 9 * 12.8) over 9 * 1152 / 1279.
    assert dispersion(classes, 10) == pytest.approx(1152 / (9 * 1152 / 1279))
    assert dispersion(np.arange(1280) % 10, 10) < 0.03, "as even as whole numbers can be"
    assert same_group(classes) == pytest.approx(1 / (127 / 1279))
    assert same_group(np.arange(1280) % 128) == 0
    assert correlation(sorted_order) == pytest.approx(1)
    assert correlation(sorted_order[::-1].copy()) == pytest.approx(1)
    pairs = sum(1280 - apart for apart in range(1, 9))
    assert overlap(sorted_order, sorted_order[::-1].copy()) == pytest.approx(1280 * 1279 / 2 / pairs)
    assert overlap(sorted_order, (sorted_order * 609) % 1280) == 0  # neighbours are moved at least 9 apart


def test_scale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "scale.json"
    result = scale.main([*SMALL_SCALE, "--json", str(file)])
    assert ScaleResult.from_json(file.read_bytes(), file.name) == result
    content = json.loads(file.read_bytes())
    assert content["schema"] == "scale-benchmark/1"
    assert content["settings"]["ranks"] == 16
    assert result.index_bytes == len(make_index(scale.read(SMALL_SCALE)).to_json())
    assert {time.calls for time in result.times} == {1, 100}
    assert all(len(time.wall) == 1 and time.microseconds > 0 for time in result.times)
    index, *orders = result.memory
    assert index.peak >= index.kept > result.index_bytes
    assert orders[0].kept < orders[1].kept < orders[2].kept
    assert [reading.world for reading in result.readings] == [1, 8, 16, 64]
    for reading in result.readings:
        assert reading.pictures * 3000 >= 4_000_000, "the reading ahead is filled"
        assert reading.requests <= reading.pictures
        assert reading.bytes >= reading.pictures * 3000
        assert 0 < reading.idx_reads <= 16 * reading.windows
    assert result.start.pictures == 4
    assert 1 <= result.start.requests <= 4
    assert result.start.idx_reads == 16, "of every shard of the window"
    out = capsys.readouterr().out
    for word in ("order", INDEX_FILE, "start", "reading", "store"):
        assert f"\n{word}: " in out


def test_the_index_is_one() -> None:
    options = scale.read(SMALL_SCALE)
    index = Index.from_json(make_index(options).to_json(), INDEX_FILE)
    assert index.samples("train") == 300 * 200
    entry = index.splits["train"][0]
    assert entry.idx_bytes == options.idx_bytes == 200 * RECORD.itemsize
    assert entry.bytes % 10_240 == 0, "a whole number of tar records"


def test_ranks_share_the_positions() -> None:
    options = scale.read(SMALL_SCALE)
    assert own_positions(options, 1, 13, 29).tolist() == list(range(13, 29))
    assert own_positions(options, 3, 0, 30).tolist() == [4, 5, 6, 7, 16, 17, 18, 19, 28, 29]
    assert own_positions(options, 3, 6, 18).tolist() == [6, 7, 16, 17]


def test_reading_everything_is_reading_from_end_to_end() -> None:
    options = scale.read([*SMALL_SCALE, "--window-shards", "1", "--prefetch-bytes", "1200000"])
    reading = measure_reading(options, world=1)
    # A shard has 600,000 bytes of pictures: one part, in ranges of at most a quarter of the reading ahead.
    assert (reading.windows, reading.parts, reading.idx_reads, reading.pictures) == (2, 2, 2, 400)
    assert reading.requests == 2 * 3
    headers = 2 * 200 * (options.member_bytes - 3000)
    assert 0 < reading.bytes - reading.pictures * 3000 < headers


@pytest.mark.parametrize("pictures", [1, 600, 1333, 5000])
def test_windows_are_divided_as_the_stream_does(pictures: int) -> None:
    options = scale.read(SMALL_SCALE)
    cuts = feed._cuts(np.full(pictures, options.picture_bytes), 0, options.prefetch_bytes // 2)
    ours = [len(part) for part in divided(options, pictures)]
    assert len(ours) == len(cuts) - 1
    assert np.abs(np.array(ours) - np.diff(cuts)).max() <= 1


@pytest.mark.parametrize("benchmark", [mixing, scale])
def test_impossible_numbers_are_refused(benchmark: object, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.read(["--shards", "0"])  # type: ignore[attr-defined]
    assert "must be at least 1" in capsys.readouterr().err
