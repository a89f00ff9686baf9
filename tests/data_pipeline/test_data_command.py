import json
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from data_pipeline.errors import UserError
from data_pipeline.index import load_index
from launch.commands.data import app


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.stdout


def test_build_tells_what_it_did(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for i in range(30):
        Image.new("RGB", (10, 8), (8 * i, 0, 0)).save(source / f"{i:02d}.jpg")
    (source / "03.jpg").write_bytes(b"broken")
    (source / "notes.txt").write_bytes(b"hello")
    command = ["build", "folder", source, "--out", out, "--size", 8, "--val-fraction", 0.3]
    report = json.loads(run(*command, "--json"))
    assert report["schema"] == "data-build/1"
    assert report["samples"]["train"] + report["samples"]["val"] == 29
    assert (report["rejected"], report["ignored"], report["already_built"]) == (1, 1, False)
    assert report["index_sha256"] == load_index(str(out)).sha256
    text = run(*command)
    assert "already built" in text
    assert "1 unreadable, see" in text


def tree(folder: Path) -> Path:
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for i in range(20):
            colour = (8 * i, 255 * (name == "cat"), 0)
            Image.new("RGB", (8, 8), colour).save(folder / name / f"{i}.png")
    return folder


def test_every_kind_is_reached(tmp_path: Path) -> None:
    """One command each; what they do is tested with the sources."""
    folder = tree(tmp_path / "in")
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive, tarfile.open(tmp_path / "in.tar", "w") as tar:
        for file in sorted(folder.rglob("*.png")):
            archive.write(file, file.relative_to(folder))
            tar.add(file, file.relative_to(folder))
    images = np.random.default_rng(1).integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "in.npz", images=images)
    options = ["--val-fraction", 0.3, "--encoding", "source", "--json"]
    for kind, source, labels in (
        ("folder", folder, ["--labels"]),
        ("zip", tmp_path / "in.zip", ["--labels"]),
        ("tar", tmp_path / "in.tar", ["--labels"]),
        ("npz", tmp_path / "in.npz", []),
        ("celebahq", folder, []),
    ):
        report = json.loads(run("build", kind, source, "--out", tmp_path / f"{kind}-out", *options, *labels))
        assert sum(report["samples"].values()) == (30 if kind == "npz" else 40)
        assert report["kept"] == (0 if kind == "npz" else 40)
        index = load_index(str(tmp_path / f"{kind}-out")).index
        assert index.kind == kind
        assert index.classes == (["cat", "dog"] if labels else [])
        assert "sound" in run("verify", tmp_path / f"{kind}-out", "--workers", 1)
    stats = run("stats", tmp_path / "folder-out")
    assert "labelled: " in stats
    assert "40 with the source's own bytes" in stats


def test_tars_are_indexed_in_place_and_by_copy(tmp_path: Path) -> None:
    for number in range(2):
        with tarfile.open(tmp_path / f"part-{number}.tar", "w") as tar:
            for file in sorted(tree(tmp_path / f"in{number}").rglob("*.png")):
                tar.add(file, f"{file.parent.name}{file.name}")
    for number in range(2):
        shutil.rmtree(tmp_path / f"in{number}")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    copied = json.loads(
        run("build", "webdataset", tmp_path, "--out", tmp_path / "copy", "--workers", 1, "--json")
    )
    indexed = json.loads(run("index", tmp_path, "--workers", 1, "--json"))
    assert copied["samples"] == indexed["samples"] == {"train": 40, "val": 40}
    assert before.items() <= {f.name: f.read_bytes() for f in tmp_path.iterdir() if f.is_file()}.items()
    assert "sound" in run("verify", tmp_path / "copy", "--workers", 1)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["build", "lsun", "/nowhere", "--labels", "--out", "x"], "lsun has no labels"),
        (["build", "webdataset", "--out", "x"], "name the folder or URL of the tars"),
        (["build", "webdataset", "y", "--out", "x", "--size", "8"], "--size: tars are indexed as they are"),
        (["build", "digits", "--out", "x", "--encoding", "gif"], "--encoding gif: give source, png"),
        (["build", "digits", "--out", "x", "--size", "9999"], "--size 9999: must be a number of pixels"),
        (["build", "digits", "somewhere", "--out", "x"], "take no SOURCE"),
        (["build", "folder", "--out", "x"], "name the SOURCE after `folder`"),
        (["build", "folder", "/nowhere/at/all", "--out", "x"], "no such folder"),
        (["verify", "/nowhere/at/all"], "no finished data set"),
    ],
)
def test_mistakes_are_named(arguments: list[str], named: str) -> None:
    with pytest.raises(UserError, match=named):
        run(*arguments)


def test_verify_answers_by_exit_code(damageable_url: Path) -> None:
    assert "sound" in run("verify", damageable_url)
    first = load_index(str(damageable_url)).shards("train")[0]
    data = bytearray((damageable_url / first.name).read_bytes())
    data[520] ^= 1  # within the first picture
    (damageable_url / first.name).write_bytes(data)
    report = json.loads(run("verify", damageable_url, "--json", "--workers", 1, code=1))
    assert any("wrong CRC32C" in problem for problem in report["problems"])
    assert f"{len(report['problems'])} problem(s)" in run("verify", damageable_url, code=1)


def test_stats_equal_numpys(digits_url: str) -> None:
    report = json.loads(run("stats", digits_url, "--json"))
    assert report["schema"] == "data-stats/1"
    from data_pipeline.split_reader import read_split

    (whole,) = read_split(digits_url, "train", channels=1, image_size=8, batch=2000)
    train = report["splits"]["train"]
    assert train["samples"] == train["pixels_of"] == len(whole)
    assert train["mean"][0] == pytest.approx(whole.mean(), rel=1e-12)
    assert train["std"][0] == pytest.approx(whole.std(), rel=1e-9)
    assert "train" in run("stats", digits_url, "--limit", 10)


def test_order_and_preview(digits_url: str, tmp_path: Path) -> None:
    report = json.loads(run("order", digits_url, "--seed", 5, "--start", 1440, "-n", 20, "--keys", "--json"))
    assert [row["position"] for row in report["rows"]] == list(range(1440, 1460))
    assert [row["epoch"] for row in report["rows"]] == [p // report["epoch_size"] for p in range(1440, 1460)]
    text = run("order", digits_url, "--seed", 5, "--start", 1440, "-n", 1, "--keys")
    assert report["rows"][0]["key"] in text
    run("preview", digits_url, "--out", tmp_path / "sheet.png", "-n", 10)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (2 + 3 * 10, 2 + 4 * 10)  # 4 columns, 3 rows, border 2
    with pytest.raises(UserError, match="cannot be written"):
        run("preview", digits_url, "--out", tmp_path / "missing" / "sheet.png")
