import json
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


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["build", "digits", "somewhere", "--out", "x"], "take no SOURCE"),
        (["build", "folder", "--out", "x"], "name the folder"),
        (["build", "folder", "/nowhere/at/all", "--out", "x"], "no such folder"),
        (["verify", "/nowhere/at/all"], "no finished data set"),
    ],
)
def test_mistakes_are_named(arguments: list[str], named: str) -> None:
    with pytest.raises(UserError, match=named):
        run(*arguments)


def test_verify_finds_every_kind_of_damage(damageable_url: Path) -> None:
    assert "sound" in run("verify", damageable_url)
    loaded = load_index(str(damageable_url))
    first, second, third = loaded.shards("train")[:3]
    data = bytearray((damageable_url / first.name).read_bytes())
    data[520] ^= 1  # within the first picture
    (damageable_url / first.name).write_bytes(data)
    (damageable_url / second.name).unlink()
    (damageable_url / third.idx_name).write_bytes(b"")
    report = json.loads(run("verify", damageable_url, "--json", code=1))
    found = "\n".join(report["problems"])
    assert f"{first.name}: SHA-256 differs" in found
    assert f"{first.name}: member 0: picture has a wrong CRC32C" in found
    assert f"{second.name}: missing" in found
    assert f"{third.idx_name}: size or SHA-256 differ" in found
    assert len(report["problems"]) == 4


def test_stats_equal_numpys(digits_url: str) -> None:
    report = json.loads(run("stats", digits_url, "--json"))
    assert report["schema"] == "data-stats/1"
    from data_pipeline.stream import read_split

    (whole,) = read_split(digits_url, "train", channels=1, image_size=8, batch=2000)
    train = report["splits"]["train"]
    assert train["samples"] == train["pixels_of"] == len(whole)
    assert train["mean"][0] == pytest.approx(whole.mean(), rel=1e-12)
    assert train["std"][0] == pytest.approx(whole.std(), rel=1e-9)
    assert "train" in run("stats", digits_url, "--limit", 10)


def test_order_and_preview(digits_url: str, tmp_path: Path) -> None:
    report = json.loads(run("order", digits_url, "--seed", 5, "--position", 1440, "-n", 20, "--json"))
    assert [row["position"] for row in report["rows"]] == list(range(1440, 1460))
    assert [row["epoch"] for row in report["rows"]] == [p // report["epoch_size"] for p in range(1440, 1460)]
    assert report["rows"][0]["key"] in run("order", digits_url, "--seed", 5, "--position", 1440, "-n", 1)
    run("preview", digits_url, "--out", tmp_path / "sheet.png", "-n", 10)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (2 + 3 * 10, 2 + 4 * 10)  # 4 columns, 3 rows, border 2
    with pytest.raises(UserError, match="cannot be written"):
        run("preview", digits_url, "--out", tmp_path / "missing" / "sheet.png")
