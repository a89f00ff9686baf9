"""Snapshots: what is kept, what counts, and that damage is noticed."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from data_pipeline.errors import UserError
from tests.support import make_run
from tests.trainer.power_support import POWER, SHA, manifest_of
from tests.trainer.weights_support import small_recipe
from trainer.checkpoint import DamagedCheckpointError, SupersededError
from trainer.recipe_sections import CheckpointSection, EmaProfile
from trainer.retention import Retention
from trainer.run import Run
from trainer.snapshots import live_snapshots, read_average, snapshot_is_due, write_snapshot

PROFILES = {
    "short": EmaProfile(std=0.05),
    "paper": EmaProfile(decay=0.9999, per_images=128),
    "long": EmaProfile(std=0.1),
}


def averages(value: float) -> dict[str, dict[str, Tensor]]:
    tensors = {"a": torch.full((2, 3), value), "b": torch.full((1,), -value)}
    return {name: {key: tensor.clone() for key, tensor in tensors.items()} for name in PROFILES}


def keep(run: Run, attempt: int, images: int, value: float = 1.0) -> None:
    write_snapshot(run, manifest_of(run, run.recipe(), attempt, images), averages(value), PROFILES)


def test_the_power_function_averages_are_kept_whole(tmp_path: Path) -> None:
    run = make_run(str(tmp_path))
    keep(run, 1, 64, 0.1)
    (snapshot,) = live_snapshots(run)
    assert (snapshot.name, snapshot.images) == ("0000000064-000001", 64)
    assert snapshot.recipe_sha == run.recipe().sha256
    assert [(file.profile, file.std) for file in snapshot.files] == [("short", 0.05), ("long", 0.1)]
    for file in snapshot.files:
        found = read_average(run, snapshot, file)
        assert {name: tensor.dtype for name, tensor in found.items()} == dict.fromkeys("ab", torch.float32)
        assert all(torch.equal(found[name], averages(0.1)["short"][name]) for name in "ab")


def test_without_power_functions_nothing_is_written(tmp_path: Path) -> None:
    run = make_run(str(tmp_path))
    flat = {"paper": PROFILES["paper"]}
    write_snapshot(run, manifest_of(run, run.recipe(), 1, 64), averages(1.0), flat)
    assert not (tmp_path / "snapshots").exists()


def test_when_they_are_due() -> None:
    recipe = small_recipe([*POWER, "checkpoint.every_images=256"])
    ends = [end for end in range(64, 1025, 64) if snapshot_is_due(recipe, end - 64, end)]
    assert ends == [256, 512, 768, 1024], "with every checkpoint"
    recipe = small_recipe([*POWER, "checkpoint.every_images=256", "checkpoint.snapshot_every_images=100"])
    ends = [end for end in range(64, 513, 64) if snapshot_is_due(recipe, end - 64, end)]
    assert ends == [128, 256, 320, 448, 512]
    assert not snapshot_is_due(small_recipe(["checkpoint.every_images=64"]), 0, 64)
    with pytest.raises(UserError, match=r"checkpoint.snapshot_every_images: only averages with a std"):
        small_recipe(["checkpoint.snapshot_every_images=64"])


def test_only_the_lineage_counts(tmp_path: Path) -> None:
    run = make_run(str(tmp_path), images_list=(64, 128, 192))
    for images in (192, 64, 128):
        keep(run, 1, images)
    assert [snapshot.images for snapshot in live_snapshots(run)] == [64, 128, 192]
    second = run.claim_attempt("0000000128-000001", "host", run.recipe(), SHA).attempt
    assert [snapshot.name for snapshot in live_snapshots(run)] == ["0000000064-000001", "0000000128-000001"]
    keep(run, second, 192)
    assert [snapshot.name for snapshot in live_snapshots(run)][-1] == "0000000192-000002"
    run.claim_attempt(None, "host", run.recipe(), SHA)
    assert live_snapshots(run) == []


def test_retention_never_touches_them(tmp_path: Path) -> None:
    run = make_run(str(tmp_path), images_list=(64, 128, 192, 256))
    for images in (64, 128, 192, 256):
        keep(run, 1, images)
    now = [0.0]
    retention = Retention(run, CheckpointSection(every_images=1, keep=2), monotonic=lambda: now[0])
    retention.apply()
    now[0] = 1e6
    retention.apply()
    assert run.checkpoints() == ["0000000192-000001", "0000000256-000001"]
    for snapshot in live_snapshots(run):
        for file in snapshot.files:
            read_average(run, snapshot, file)
    assert len(live_snapshots(run)) == 4


def test_a_broken_off_snapshot_does_not_exist(tmp_path: Path) -> None:
    run = make_run(str(tmp_path))
    keep(run, 1, 64)
    (tmp_path / "snapshots" / "0000000064-000001" / "manifest.json").unlink()
    assert live_snapshots(run) == []
    keep(run, 1, 64)  # the same attempt may finish it
    keep(run, 1, 64)  # and repeat it with the same content
    assert len(live_snapshots(run)) == 1
    with pytest.raises(SupersededError, match="already published"):
        keep(run, 1, 64, value=2.0)


def test_only_the_newest_attempt_writes(tmp_path: Path) -> None:
    run = make_run(str(tmp_path))
    run.claim_attempt("0000000128-000001", "other-host", run.recipe(), SHA)
    with pytest.raises(SupersededError, match="attempt 2 has taken the run over from attempt 1"):
        keep(run, 1, 192)
    assert not (tmp_path / "snapshots" / "0000000192-000001" / "manifest.json").exists()


@pytest.mark.parametrize("damage", ["flipped", "short", "missing"])
def test_damage_is_named(tmp_path: Path, damage: str) -> None:
    run = make_run(str(tmp_path))
    keep(run, 1, 64)
    (snapshot,) = live_snapshots(run)
    path = tmp_path / "snapshots" / snapshot.name / "ema-long.safetensors"
    data = path.read_bytes()
    path.unlink()
    if damage == "flipped":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "short":
        path.write_bytes(data[:-1])
    assert not path.exists() or path.read_bytes() != data
    short, long = snapshot.files
    read_average(run, snapshot, short)
    with pytest.raises(DamagedCheckpointError, match=r"snapshots/0000000064-000001/ema-long\.safetensors"):
        read_average(run, snapshot, long)


def test_another_version_is_refused(tmp_path: Path) -> None:
    run = make_run(str(tmp_path))
    keep(run, 1, 64)
    manifest = tmp_path / "snapshots" / "0000000064-000001" / "manifest.json"
    text = manifest.read_text()
    assert "ema-snapshot/1" in text
    manifest.unlink()
    manifest.write_text(text.replace("ema-snapshot/1", "ema-snapshot/2"))
    with pytest.raises(UserError, match="this version reads 'ema-snapshot/1'"):
        live_snapshots(run)
