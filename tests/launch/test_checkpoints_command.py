"""`ddpm checkpoints`, as people call it."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from launch.cli import app
from tests.support import make_run, publish_checkpoint
from trainer.run import Run
from trainer.unet import UNet

FIRST, SECOND, THIRD = "0000000064-000001", "0000000128-000001", "0000000128-000002"


def ddpm(*arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(app, ["checkpoints", *arguments], env={"COLUMNS": "200"})
    assert done.exit_code == code, done.output
    return done.output


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run whose second attempt has superseded a checkpoint of its first."""
    run = make_run(str(tmp_path / "run"), images_list=(64, 128))
    changed = run.recipe().model_copy(update={"seed": 1})
    attempt = run.claim_attempt(FIRST, "test", changed, "0" * 64).attempt
    torch.manual_seed(3)
    publish_checkpoint(run, changed, attempt, 128, UNet(changed.unet_config()), "0" * 64)
    run.storage.write("eval/trend-0/best.json", json.dumps({"checkpoint": FIRST}).encode())
    return run


def test_list_marks_what_is_live_best_and_read(run: Run) -> None:
    with run.pin(FIRST, "reader"):
        lines = ddpm("list", run.url).splitlines()
        rows = json.loads(ddpm("list", run.url, "--json"))
    assert [line.split()[:2] for line in lines] == [[FIRST, "live"], [SECOND, "superseded"], [THIRD, "live"]]
    assert lines[0].endswith("best, pinned")
    assert [(row["name"], row["live"], row["best"], row["pinned"]) for row in rows] == [
        (FIRST, True, True, 1),
        (SECOND, False, False, 0),
        (THIRD, True, False, 0),
    ]
    assert rows[2]["sha256"] == run.manifest_sha256(THIRD)
    assert rows[2]["images"] == 128


def test_list_shows_what_is_damaged(run: Run) -> None:
    manifest = Path(run.url) / "checkpoints" / SECOND / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-10])
    lines = ddpm("list", run.url).splitlines()
    assert [line.split()[0] for line in lines] == [FIRST, SECOND, THIRD]
    assert lines[1].endswith("damaged")
    assert [row["damaged"] for row in json.loads(ddpm("list", run.url, "--json"))] == [False, True, False]
    assert "the manifest is damaged" in ddpm("verify", run.url, "--all", code=1)


def test_show(run: Run) -> None:
    assert json.loads(ddpm("show", run.url))["attempt"] == 2
    assert json.loads(ddpm("show", run.url, FIRST))["images"] == 64


def test_verify_names_what_is_damaged(run: Run) -> None:
    assert ddpm("verify", run.url).startswith(f"{THIRD}: 3 parts verified")
    part = Path(run.url) / "checkpoints" / SECOND / "weights.safetensors"
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)
    lines = ddpm("verify", run.url, "--all", code=1).splitlines()
    assert run.pins() == {}
    assert [line.split(":")[0] for line in lines] == [FIRST, SECOND, THIRD]
    assert "damaged" in lines[1]
    assert "weights.safetensors" in lines[1]


def test_diff(run: Run) -> None:
    same = json.loads(ddpm("diff", run.url, FIRST, FIRST, "--json"))
    assert (same["manifest"], same["recipe"]) == ({}, {})
    assert all(part["identical"] and part["relative_l2"] == 0 for part in same["weights"])
    found = json.loads(ddpm("diff", run.url, FIRST, "--json"))
    assert found["manifest"]["images"] == ["64", "128"]
    assert found["recipe"] == {"seed": "seed: 0 -> 1"}
    raw = found["weights"][0]
    one, other = (
        torch.cat([p.flatten() for _, p in sorted(run_weights(run, name).items())]).double()
        for name in (FIRST, THIRD)
    )
    assert raw["name"] == "raw"
    assert raw["relative_l2"] == pytest.approx(float((one - other).norm() / one.norm()), rel=1e-9)
    assert {tensor["parameter"] for tensor in raw["tensors"]} == set(run_weights(run, FIRST))
    shown = ddpm("diff", run.url, FIRST)
    assert "recipe: seed: 0 -> 1" in shown
    assert f"relative L2 distance {raw['relative_l2']:.3e}" in shown


def run_weights(run: Run, name: str) -> dict[str, torch.Tensor]:
    from trainer.weights.inference import read_weights

    return read_weights(run, run.manifest(name), "raw")


def test_gc_removes_what_dead_attempts_left_and_nothing_else(run: Run) -> None:
    left = "checkpoints/0000000192-000001"
    run.storage.write(f"{left}/state/rank-0000.safetensors", b"x" * 1000)
    run.storage.write("checkpoints/0000000192-000002/weights.safetensors", b"being written")
    before = run.storage.sizes()
    (row,) = json.loads(ddpm("gc", run.url, "--dry-run", "--json"))
    assert row == {"path": left, "bytes": 1000, "pins": [], "removed": False}
    assert "would be removed" in ddpm("gc", run.url, "--dry-run")
    pin = "pins/0000000192-000001.reader"
    run.storage.write(pin, b"alive")
    assert f"kept: pinned by {pin}" in ddpm("gc", run.url)
    run.storage.delete(pin)
    assert run.storage.sizes() == before
    assert "removed" in ddpm("gc", run.url)
    assert before.keys() - run.storage.sizes().keys() == {f"{left}/state/rank-0000.safetensors"}
    assert "0 orphaned folders" in ddpm("gc", run.url)
