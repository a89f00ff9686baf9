"""The run directory: attempts, lineage, fencing, pins and retention."""

from pathlib import Path

import pytest

from data_pipeline.errors import UserError
from tests.support import make_run, publish_checkpoint, tiny_recipe
from trainer.checkpoint import SupersededError
from trainer.manifest import AttemptEnd, parse_checkpoint_name
from trainer.recipe_sections import CheckpointSection
from trainer.retention import Retention
from trainer.run import PIN_LIFETIME_SECONDS, CheckpointGoneError, Run
from trainer.unet import UNet

SHA = "0" * 64


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"recipe\.yaml is missing"):
        Run(str(tmp_path)).recipe()
    with pytest.raises(UserError, match="add run="):
        Run("")
    assert Run(str(tmp_path)).checkpoints() == []
    assert Run(str(tmp_path)).ended() is None


def test_another_recipe_is_refused_by_key(tmp_path: Path) -> None:
    run = make_run(str(tmp_path), images_list=())
    run.adopt_recipe(tiny_recipe(["train.images=1", "batch.micro=2"]))
    with pytest.raises(UserError, match=r"seed: 0 -> 7"):
        run.adopt_recipe(tiny_recipe(["seed=7"]))


def test_changed_keys_are_listed_and_may_be_allowed_one_by_one_or_by_section(tmp_path: Path) -> None:
    run = make_run(str(tmp_path), images_list=())
    changed = tiny_recipe(["seed=7", "optimizer.learning_rate=0.1", "optimizer.clip_norm=2", "guard.skips=3"])
    with pytest.raises(UserError) as caught:
        run.check_recipe(changed)
    for key in (
        "seed: 0 -> 7",
        "optimizer.learning_rate: 0.003 -> 0.1",
        "optimizer.clip_norm",
        "guard.skips",
    ):
        assert key in str(caught.value)
    assert "--allow" in str(caught.value)
    with pytest.raises(UserError, match=r"\(optimizer.clip_norm: 1.0 -> 2.0\)"):
        run.check_recipe(changed, ["seed", "optimizer.learning_rate", "guard"])
    run.check_recipe(changed, ["seed", "optimizer", "guard"])


def test_an_allowed_change_holds_from_its_attempt_on(tmp_path: Path) -> None:
    run = make_run(str(tmp_path), images_list=())
    changed = tiny_recipe(["optimizer.learning_rate=0.1"])
    run.adopt_recipe(changed, ["optimizer.learning_rate"])
    run.claim_attempt(None, "host", changed, SHA)
    run.check_recipe(changed)
    with pytest.raises(UserError, match=r"learning_rate: 0.1 -> 0.003"):
        run.check_recipe(tiny_recipe())


def test_no_allowance_changes_the_network(tmp_path: Path) -> None:
    run = make_run(str(tmp_path), images_list=())
    with pytest.raises(UserError, match=r"--allow cannot change the network .model.base_channels: 8 -> 16"):
        run.check_recipe(tiny_recipe(["model.base_channels=16"]), ["model"])
    run.check_recipe(tiny_recipe(["model.dropout=0.3"]), ["model"])


def test_attempts_count_up_and_share_the_runs_identity(tmp_path: Path) -> None:
    run, recipe = Run(str(tmp_path)), tiny_recipe()
    claims = [run.claim_attempt(None, "host", recipe, SHA) for _ in range(3)]
    assert [claim.attempt for claim in claims] == [1, 2, 3]
    assert len({claim.run for claim in claims}) == 1
    assert run.newest_attempt() == 3
    run.end_attempt(AttemptEnd(attempt=3, outcome="finished", images=64, checkpoint=None))
    end = run.ended()
    assert end is not None
    assert end.outcome == "finished"
    assert run.newest_attempt() == 3, "the end record is no attempt"


def test_lineage_follows_parents(tmp_path: Path) -> None:
    run = make_run(str(tmp_path), images_list=(64, 128, 192))
    recipe = run.recipe()
    second = run.claim_attempt("0000000128-000001", "host", recipe, SHA)
    assert run.live_checkpoints() == ["0000000064-000001", "0000000128-000001"]
    publish_checkpoint(run, recipe, second.attempt, 192, UNet(recipe.unet_config()), SHA)
    assert run.live_checkpoints() == ["0000000064-000001", "0000000128-000001", "0000000192-000002"]
    assert not run.is_live("0000000192-000001")
    assert "0000000192-000001" in run.checkpoints(), "superseded checkpoints stay readable"
    run.claim_attempt(None, "host", recipe, SHA)
    assert run.live_checkpoints() == []


def test_only_the_newest_attempt_publishes(tmp_path: Path) -> None:
    run = make_run(str(tmp_path), images_list=(64,))
    recipe = run.recipe()
    run.claim_attempt("0000000064-000001", "other-host", recipe, SHA)
    with pytest.raises(SupersededError, match="attempt 2 has taken the run over"):
        publish_checkpoint(run, recipe, 1, 128, UNet(recipe.unet_config()), SHA)
    assert run.checkpoints() == ["0000000064-000001"]


def test_select(tmp_path: Path) -> None:
    run = make_run(str(tmp_path), images_list=(64, 128))
    assert run.select(None) == "0000000128-000001"
    assert run.select("0000000064-000001") == "0000000064-000001"
    with pytest.raises(UserError, match="no checkpoint"):
        run.select("0000000065-000001")
    with pytest.raises(UserError, match="look like"):
        parse_checkpoint_name("latest")


def test_pins_protect_from_retention_until_they_fall_silent(tmp_path: Path) -> None:
    run = make_run(str(tmp_path), images_list=(64, 128, 192, 256))
    now = [0.0]
    retention = Retention(run, CheckpointSection(every_images=1, keep=2), monotonic=lambda: now[0])
    pin = run.pin("0000000064-000001", "evaluator")
    with pin:
        retention.apply()
        assert run.checkpoints() == ["0000000064-000001", "0000000192-000001", "0000000256-000001"]
        parts = tmp_path / "checkpoints" / "0000000128-000001"
        assert (parts / "weights.safetensors").exists(), "parts outlive the manifest by a pin lifetime"
        now[0] = PIN_LIFETIME_SECONDS - 1
        pin.beat()
        retention.apply()
        now[0] += PIN_LIFETIME_SECONDS - 1
        retention.apply()
        assert "0000000064-000001" in run.checkpoints(), "the pin had changed"
        assert not (parts / "weights.safetensors").exists()
        now[0] += 2
        retention.apply()
        assert "0000000064-000001" not in run.checkpoints(), "the pin fell silent"
    assert run.pins() == {}


def test_pinning_what_has_gone(tmp_path: Path) -> None:
    run = make_run(str(tmp_path), images_list=(64,))
    with pytest.raises(CheckpointGoneError), run.pin("0000000032-000001", "w"):
        pass
    assert run.pins() == {}
