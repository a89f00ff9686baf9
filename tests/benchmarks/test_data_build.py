"""`python -m benchmarks.data_build` end to end with tiny numbers, and its parts."""

import io
import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import lmdb
import pytest
from PIL import Image
from webdataset import ShardWriter, WebDataset

from benchmarks.data_build.bake import InMemory, code_all
from benchmarks.data_build.command import DataBuildResult, main, passthrough, read
from benchmarks.data_build.large_index import index_costs
from benchmarks.data_build.passthrough import Passthrough
from benchmarks.data_build.pictures import write_database, write_large
from benchmarks.data_build.running import Rate
from benchmarks.harness import OURS, timed, tree_seconds
from benchmarks.peers.webdataset_writer import WEBDATASET, write_shards
from data_pipeline.encoding import Encoding
from data_pipeline.fit import Form
from data_pipeline.geometry import Geometry
from data_pipeline.team import Team

TINY = ["--pictures", "40", "--repeats", "1", "--workers", "1", "--index-samples", "3000"]


def test_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "build.json"
    result = main([*TINY, "--folder", str(tmp_path), "--json", str(file)])
    assert DataBuildResult.from_json(file.read_bytes(), file.name) == result
    content = json.loads(file.read_bytes())
    assert content["schema"] == "data-build-benchmark/1"
    assert content["settings"]["pictures"] == 40
    assert content["settings"]["large_pictures"] == 24
    assert content["environment"]["packages"]["webdataset"]
    names = [rate["name"] for rate in content["rates"]]
    assert names == [
        f"{OURS}, source",
        "webdataset",
        f"{OURS}, png",
        "codec only, png",
        f"{OURS}, webp-lossless",
        "codec only, webp-lossless",
    ]
    assert all(len(rate["wall"]) == len(rate["cpu"]) == 1 for rate in content["rates"])
    assert len(content["floor"]) == 5
    assert all(part["seconds"] > 0 for part in content["floor"])
    assert content["index"]["idx_bytes"] == 3000 * 32
    assert len(content["loads"]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert "all wrote the same 40 keys and pictures" in lines
    for line, name, target in zip(
        lines[-2:],
        ("small-build-passthrough-webdataset", "small-build-bake-codec-only"),
        ("5", "0.85"),
        strict=True,
    ):
        word, found, value, wanted, verdict = line.split()
        assert (word, found, wanted, verdict) == ("bar", name, target, "short")  # one repeat decides nothing
        assert float(value) > 0
    assert [path.name for path in tmp_path.iterdir()] == ["build.json"], "all else is removed again"


def test_a_missing_peer_is_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = replace(WEBDATASET, distribution="no-such-distribution")
    outcome, parts = passthrough(replace(read(TINY), peer=missing), tmp_path)
    assert [rate.name for rate in outcome.rates] == [f"{OURS}, source"]
    assert len(parts) == 5
    assert outcome.bar.line() == "bar small-build-passthrough-webdataset nan 5 short"
    assert "webdataset is not installed: its bar is short" in capsys.readouterr().out


def test_full_runs_carry_the_bars_names() -> None:
    full, small = read(["--workers", "2"]), read(["--pictures", "99999"])
    assert (full.bar_name("build-x"), small.bar_name("build-x")) == ("build-x", "small-build-x")
    assert (full.val_fraction, small.val_fraction) == (None, 0.5)
    assert full.large == 2000
    assert full.index_samples == 3_000_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pictures", "0"], "every N must be at least 1"),
        (["--repeats", "0"], "every N must be at least 1"),
        (["--folder", "/no/such"], "--folder /no/such: no such folder"),
    ],
)
def test_wrong_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        read(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_the_database_holds_different_pictures_that_fit(tmp_path: Path) -> None:
    write_database(tmp_path / "a_lmdb", 310)
    with (
        lmdb.open(str(tmp_path / "a_lmdb"), readonly=True, lock=False) as environment,
        environment.begin() as t,
    ):
        files = list(t.cursor().iternext(keys=False, values=True))
    assert len(set(files)) == 310
    pictures = [Image.open(io.BytesIO(data)) for data in files]
    assert {(picture.format, picture.size) for picture in pictures} == {("JPEG", (256, 256))}
    assert len({picture.tobytes() for picture in pictures}) == 300


def test_large_pictures_are_larger_and_sound(tmp_path: Path) -> None:
    write_large(tmp_path / "large", 64)
    files = sorted((tmp_path / "large").iterdir())
    assert len({file.read_bytes() for file in files}) == len(files) == 64
    pictures = [Image.open(file) for file in files]
    assert [picture.format for picture in pictures[:4]] == ["JPEG", "JPEG", "JPEG", "PNG"]
    for picture in pictures:
        picture.load()
        assert min(picture.size) > 256


def test_writers_in_parts_write_everything_once(tmp_path: Path) -> None:
    write_database(tmp_path / "a_lmdb", 30)
    out = tmp_path / "out"
    out.mkdir()
    for part in range(2):
        write_shards(tmp_path / "a_lmdb", out, 100_000, part, parts=2)
    shards = [str(path) for path in sorted(out.iterdir())]
    assert len(shards) >= 4
    found = [sample["__key__"] for sample in WebDataset(shards, shardshuffle=False)]
    assert len(found) == len(set(found)) == 30


@pytest.mark.parametrize("wrong", ["fewer", "picture", "key", "twice", "nothing"])
def test_other_pictures_are_refused(tmp_path: Path, wrong: str) -> None:
    write_database(tmp_path / "a_lmdb", 30)
    task = Passthrough(tmp_path / "a_lmdb", 30, workers=1, val_fraction=0.5)

    def write(out: Path) -> None:
        task.webdataset(out)
        samples = list(WebDataset([str(path) for path in out.iterdir()], shardshuffle=False))
        for path in out.iterdir():
            path.unlink()
        if wrong == "fewer":
            samples.pop()
        elif wrong == "picture":
            samples[0]["jpg"] = samples[1]["jpg"]
        elif wrong == "key":
            samples[0]["__key__"] = samples[0]["__key__"][::-1]
        elif wrong == "twice":
            samples.append(samples[0])
        with ShardWriter(str(out / "%06d.tar"), encoder=False, verbose=0) as sink:
            for sample in samples:
                sink.write({"__key__": sample["__key__"], "jpg": sample["jpg"]})

    if wrong == "nothing":
        task.check(tmp_path / "ours", {"peer": write})
    else:
        with pytest.raises(ValueError, match="nothing was timed"):
            task.check(tmp_path / "ours", {"peer": write})
    assert not (tmp_path / "theirs").exists()
    assert (tmp_path / "ours").exists()


def test_coding_alone_deals_with_every_picture_in_two_processes(tmp_path: Path) -> None:
    write_large(tmp_path / "large", 5)
    held = InMemory(tmp_path / "large", parts=2)
    paths = sorted((tmp_path / "large").iterdir())
    assert [len(held.share(part)) for part in range(2)] == [3, 2]
    assert {*held.share(0), *held.share(1)} == {path.read_bytes() for path in paths}
    form = Form(256, Geometry.DDPM_LSUN, Encoding.PNG, channels=3)
    with Team(partial(InMemory, tmp_path / "large", 2), 2) as team:
        code_all(team, form, limit=1)
        before = tree_seconds()
        wall, processor = code_all(team, form)
        assert tree_seconds() - before > 0.5 * processor, "processes that still run are counted"
    assert wall > 0
    assert processor > 0


def test_processor_time_of_ended_processes_counts() -> None:
    burn = "import time\nwhile time.process_time() < 0.3: pass"
    wall, processor = timed(
        lambda: subprocess.run([sys.executable, "-S", "-c", burn], check=True), tree_seconds
    )
    assert 0.25 < processor < 2 * wall + 0.1


def test_the_index_is_a_real_one(tmp_path: Path) -> None:
    costs = index_costs(200_000, 1000, tmp_path / "index")
    assert costs.shards == -(-198_000 // 528) + -(-2_000 // 528)
    assert costs.idx_bytes == 200_000 * 32
    assert 200 * costs.shards < costs.json_bytes < 500 * costs.shards
    assert "an index of 200,000 samples in 379 shards" in costs.line()
    assert not (tmp_path / "index").exists()


def test_rates() -> None:
    rate = Rate(name="a", pictures=100, wall=[2.0, 1.0, 4.0], cpu=[3.0, 3.0, 3.0])
    assert rate.per_second == 50
    assert rate.row() == ("a", "50", "2.000", "1.000–4.000", "3.000", "30000.0")
