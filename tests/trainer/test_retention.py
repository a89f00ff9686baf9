"""Which checkpoints keep their files, and what becomes of what dead attempts left."""

import json
from pathlib import Path

import pytest
import torch

from data_pipeline.storage import Storage
from tests.support import make_run, publish_checkpoint
from trainer.manifest import AttemptEnd
from trainer.recipe_sections import CheckpointSection
from trainer.retention import Retention, orphans
from trainer.run import PIN_LIFETIME_SECONDS, Run
from trainer.unet import UNet

IMAGES = (64, 128, 192, 256, 320, 384)


def names(*images: int, attempt: int = 1) -> list[str]:
    return [f"{count:010d}-{attempt:06d}" for count in images]


def retain(run: Run, **section: object) -> list[str]:
    """Apply retention and wait long enough; return what is left."""
    now = [0.0]
    settings = CheckpointSection.model_validate({"every_images": 64, "keep": 2, **section})
    retention = Retention(run, settings, monotonic=lambda: now[0])
    for _ in range(2):
        retention.apply()
        now[0] += PIN_LIFETIME_SECONDS
    retention.apply()
    assert sorted(run.storage.list("checkpoints")) == run.checkpoints(), "folders go with their manifests"
    return run.checkpoints()


def test_the_newest_stay(tmp_path: Path) -> None:
    assert retain(make_run(str(tmp_path), images_list=IMAGES), keep=3) == names(256, 320, 384)


def test_multiples_stay(tmp_path: Path) -> None:
    run = make_run(str(tmp_path), images_list=IMAGES)
    for _ in range(2):
        assert retain(run, keep_every_images=150) == names(192, 320, 384), "after 150, 300; the newest"


def test_the_best_stay_unless_they_need_not(tmp_path: Path) -> None:
    run = make_run(str(tmp_path), images_list=IMAGES)
    for protocol, checkpoint in (("trend-0", names(128)[0]), ("paper-1", names(192)[0]), ("odd-2", "")):
        content = json.dumps({"checkpoint": checkpoint}) if checkpoint else "damaged"
        run.storage.write(f"eval/{protocol}/best.json", content.encode())
    assert retain(run) == names(128, 192, 320, 384)
    assert retain(run, keep_best=False) == names(320, 384)


def test_a_damaged_one_is_not_among_the_newest_to_keep(tmp_path: Path) -> None:
    run = make_run(str(tmp_path), images_list=IMAGES)
    (tmp_path / "checkpoints" / names(320)[0] / "weights.safetensors").unlink()
    assert retain(run) == names(256, 320, 384)


def test_superseded_ones_stay_and_what_dead_attempts_left_goes(tmp_path: Path) -> None:
    run = make_run(str(tmp_path), images_list=IMAGES)
    recipe = run.recipe()
    attempt = run.claim_attempt(names(128)[0], "test", recipe, "0" * 64).attempt
    for images in (192, 256, 320):
        torch.manual_seed(images)
        publish_checkpoint(run, recipe, attempt, images, UNet(recipe.unet_config()), "0" * 64)
    run.storage.write(f"checkpoints/{names(448)[0]}/state/rank-0000.safetensors", b"unfinished")
    run.storage.write(f"checkpoints/{names(384, attempt=2)[0]}/weights.safetensors", b"being written")
    live, superseded = names(256, 320, attempt=2), names(192, 256, 320, 384)
    section = CheckpointSection(every_images=64, keep=2)
    now = [0.0]
    retention = Retention(run, section, monotonic=lambda: now[0])
    retention.apply()
    assert run.live_checkpoints() == live
    assert set(run.checkpoints()) == {*live, *superseded}
    assert run.storage.sizes(f"checkpoints/{names(448)[0]}") == {"state/rank-0000.safetensors": 10}
    now[0] = PIN_LIFETIME_SECONDS
    retention.apply()
    assert set(run.storage.list("checkpoints")) == {*live, *superseded, names(384, attempt=2)[0]}


@pytest.mark.parametrize("place", ["disk", "s3"])
def test_orphans_are_told_from_what_may_still_be_written(
    tmp_path: Path, request: pytest.FixtureRequest, place: str
) -> None:
    url = str(tmp_path) if place == "disk" else request.getfixturevalue("s3_prefix")
    run = make_run(f"{url}/run", images_list=(64,))
    left = names(128)[0]
    for folder in ("checkpoints", "snapshots"):
        run.storage.write(f"{folder}/{left}/ema-main.safetensors", b"four")
    assert orphans(run) == [], "the attempt may be writing them"
    run.end_attempt(AttemptEnd(attempt=1, outcome="failed", images=64, checkpoint=names(64)[0]))
    found = orphans(run)
    assert [orphan.path for orphan in found] == [f"checkpoints/{left}", f"snapshots/{left}"]
    assert run.storage.sizes(found[0].path) == {"ema-main.safetensors": 4}
    for orphan in found:
        run.storage.delete_folder(orphan.path)
    assert orphans(run) == []
    assert run.checkpoints() == names(64)
    assert Storage(run.url).sizes("checkpoints/none") == {}
    run.storage.delete_folder("checkpoints/none")
