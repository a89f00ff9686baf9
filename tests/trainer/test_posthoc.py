"""Averages made after training: equal to those tracked directly, and usable wherever weights are."""

import json
import logging
from pathlib import Path

import pytest
import safetensors.torch
import torch

from data_pipeline.documents import sha256_hex
from data_pipeline.errors import UserError
from data_pipeline.storage import Storage
from tests.support import make_run
from tests.trainer.power_support import BATCH, SHA, Walk, distance, manifest_of, walked_run
from trainer.checkpoint import DamagedCheckpointError
from trainer.power_ema import PowerAverage, fit
from trainer.recipe_sections import EmaProfile
from trainer.snapshots import live_snapshots, write_snapshot
from trainer.weights import load_for_inference
from trainer.weights.inference import read_weights
from trainer.weights.posthoc import (
    Opened,
    PosthocOptions,
    Reconstruction,
    ema_name,
    open_reconstruction,
    reconstruct,
)

EXTRA = (0.06, 0.08, 0.12)
NAME = f"{256 * BATCH:010d}-000001"


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Walk:
    return walked_run(tmp_path_factory.mktemp("walk") / "run", extra=EXTRA)


def make(walk: Walk, std: float, out: Path, at: int | None = None, last: int | None = None) -> Opened:
    place, facts = reconstruct(walk.run, PosthocOptions(std, at, last, str(out)))
    opened = open_reconstruction(Storage(place))
    assert opened is not None
    assert opened.facts == facts
    return opened


@pytest.mark.parametrize("std", EXTRA)
def test_as_if_it_had_been_tracked(walk: Walk, tmp_path: Path, std: float) -> None:
    made = make(walk, std, tmp_path)
    tracked = walk.averages[str(std)]
    assert distance(made.weights(), tracked) < 1e-4
    nearest = min(distance(walk.averages[name], tracked) for name in ("short", "long"))
    assert nearest > 0.01, "the stored averages themselves are far from it"
    assert 1e-3 < made.facts.residual < 4e-3
    assert all(tensor.dtype == torch.float32 for tensor in made.weights().values())


@pytest.mark.parametrize(("profile", "std"), [("short", 0.05), ("long", 0.1)])
def test_a_stored_average_comes_back_bit_for_bit(
    walk: Walk, tmp_path: Path, profile: str, std: float
) -> None:
    made = make(walk, std, tmp_path)
    (source,) = made.facts.sources
    assert (source.profile, source.std, source.snapshot) == (profile, std, NAME)
    assert source.coefficient == pytest.approx(1.0, abs=1e-12)
    weights = made.weights()
    assert all(torch.equal(weights[name], tensor) for name, tensor in walk.averages[profile].items())


def test_the_sum_is_the_files_times_the_coefficients(walk: Walk, tmp_path: Path) -> None:
    """Re-done from the facts alone, all in float64."""
    made = make(walk, 0.07, tmp_path)
    total = dict.fromkeys(made.weights(), torch.zeros((), dtype=torch.float64))
    for source in made.facts.sources:
        data = walk.run.storage.read(f"snapshots/{source.snapshot}/{source.path}")
        assert sha256_hex(data) == source.sha256
        for name, tensor in safetensors.torch.load(data).items():
            total[name] = total[name] + tensor.double() * source.coefficient
    weights = made.weights()
    assert all(torch.equal(weights[name], tensor.float()) for name, tensor in total.items())
    offered = [PowerAverage(s.images, file.std) for s in live_snapshots(walk.run) for file in s.files]
    coefficients = fit(offered, PowerAverage(walk.images, 0.07)).coefficients
    assert made.facts.offered == len(offered) == 32
    assert [source.coefficient for source in made.facts.sources] == coefficients[coefficients != 0].tolist()


def test_an_earlier_moment_and_fewer_snapshots(walk: Walk, tmp_path: Path) -> None:
    at = 128 * BATCH
    early = make(walk, 0.08, tmp_path / "early", at=at)
    assert early.facts.images == at
    assert {source.snapshot for source in early.facts.sources} <= {
        snapshot.name for snapshot in live_snapshots(walk.run) if snapshot.images <= at
    }
    assert distance(early.weights(), walk.averages["0.08"]) > 0.1
    fewer = make(walk, 0.08, tmp_path / "fewer", last=3)
    assert fewer.facts.offered == 6
    assert fewer.facts.residual > 2 * make(walk, 0.08, tmp_path / "all").facts.residual


def test_it_is_one_more_average_of_its_checkpoint(tmp_path: Path) -> None:
    walk = walked_run(tmp_path / "run", updates=64, extra=(0.08,))
    name = walk.run.select(None)
    with pytest.raises(UserError, match=r"holds no weights 'std0\.0800'; known: raw, main, short, long$"):
        read_weights(walk.run, walk.run.manifest(name), "std0.0800")
    place, facts = reconstruct(walk.run, PosthocOptions(0.08))
    assert place == f"{walk.run.url}/ema/{name}-std0.0800"
    assert facts.checkpoint == name
    model = load_for_inference(walk.run, name, ema="std0.0800", device="cpu").model
    found = {key: parameter.detach() for key, parameter in model.named_parameters()}
    assert distance(found, walk.averages["0.08"]) < 5e-3
    with pytest.raises(UserError, match=r"holds no weights 'std0\.09'; known: raw, .*, std0\.0800$"):
        read_weights(walk.run, walk.run.manifest(name), "std0.09")
    with pytest.raises(UserError, match="holds a reconstruction already"):
        reconstruct(walk.run, PosthocOptions(0.08))
    assert sorted(path.name for path in Path(place).iterdir()) == [
        "posthoc.json",
        "recipe.yaml",
        "weights.safetensors",
    ]


def test_a_bad_fit_is_warned_of(walk: Walk, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        good = make(walk, 0.08, tmp_path / "good")
        assert caplog.messages == []
        bad = make(walk, 0.01, tmp_path / "bad")
    (message,) = caplog.messages
    assert message.startswith(f"std 0.01 at {walk.images} images is not what these snapshots can express")
    assert f"off by {100 * bad.facts.residual:.1f}%" in message
    assert "(0.05, 0.1)" in message
    assert bad.facts.residual > 0.05 > good.facts.residual


def test_names() -> None:
    assert [ema_name(std) for std in (0.05, 0.1, 0.0801, 0.08015)] == [
        "std0.0500",
        "std0.1000",
        "std0.0801",
        "std0.08015",
    ]


@pytest.mark.parametrize("std", [0.0, -1.0, 0.2887, float("nan")])
def test_impossible_widths(walk: Walk, tmp_path: Path, std: float) -> None:
    with pytest.raises(UserError, match=r"--std .*: must be more than 0 and less than 0\.2887"):
        make(walk, std, tmp_path)


def test_moments_without_a_snapshot(walk: Walk, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--at 1100: .* has no snapshot there; the nearest is at 1024"):
        make(walk, 0.08, tmp_path, at=1100)
    with pytest.raises(UserError, match="the nearest is at 1024"):
        make(walk, 0.08, tmp_path, at=1)
    run = make_run(str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"holds no snapshots; .* ema\.short\.std=0\.05"):
        reconstruct(run, PosthocOptions(0.08))


def test_snapshots_that_were_branched_off_do_not_count(tmp_path: Path) -> None:
    walk = walked_run(tmp_path / "run", updates=64)
    middle = live_snapshots(walk.run)[1].name
    walk.run.claim_attempt(middle, "test-host", walk.recipe, SHA)
    facts = make(walk, 0.08, tmp_path / "out").facts
    assert (facts.checkpoint, facts.offered) == (middle, 4)


def test_averages_changed_on_the_way_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    walk = walked_run(tmp_path / "run", updates=64)
    last = live_snapshots(walk.run)[-1]
    changes = {"long": EmaProfile(std=0.2), "new": EmaProfile(std=0.15)}
    later = walk.recipe.model_copy(update={"ema": {**walk.recipe.ema, **changes}})
    second = walk.run.claim_attempt(last.name, "test-host", later, SHA).attempt
    at = walk.images + BATCH
    manifest = manifest_of(walk.run, later, second, at)
    write_snapshot(walk.run, manifest, {**walk.averages, "new": walk.averages["long"]}, later.ema)
    with caplog.at_level(logging.WARNING):
        made = make(walk, 0.06, tmp_path / "out")
    assert "added or changed during training, so left out: long, new" in caplog.messages[0]
    assert made.facts.offered == 2 * 4 + 1
    assert [source.std for source in made.facts.sources if source.snapshot == manifest.name] == [0.05]
    assert {source.std for source in made.facts.sources} == {0.05, 0.1}
    assert made.recipe.ema["long"].std == 0.2, "the recipe of that moment"
    only = walk.recipe.model_copy(update={"ema": {"long": EmaProfile(std=0.2)}})
    third = walk.run.claim_attempt(last.name, "test-host", only, SHA).attempt
    write_snapshot(walk.run, manifest_of(walk.run, only, third, at), walk.averages, only.ema)
    with pytest.raises(
        UserError, match=r"-000003 holds no average that was tracked from the start \(long: added"
    ):
        make(walk, 0.06, tmp_path / "none")


def test_a_damaged_snapshot_makes_nothing(tmp_path: Path) -> None:
    walk = walked_run(tmp_path / "run", updates=32)
    path = tmp_path / "run" / "snapshots" / live_snapshots(walk.run)[0].name / "ema-long.safetensors"
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(DamagedCheckpointError, match=r"ema-long\.safetensors: size or SHA-256 differs"):
        reconstruct(walk.run, PosthocOptions(0.08))
    assert not (tmp_path / "run" / "ema").exists()


def test_a_reconstruction_that_was_altered(walk: Walk, tmp_path: Path) -> None:
    made = make(walk, 0.08, tmp_path)
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(DamagedCheckpointError, match=r"weights\.safetensors: size or SHA-256 differs"):
        made.weights()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("seed: 0", "seed: 1", 1))
    with pytest.raises(UserError, match=r"recipe\.yaml: is not what posthoc\.json names"):
        open_reconstruction(Storage(str(tmp_path)))
    recipe.unlink()
    with pytest.raises(UserError, match=r"recipe\.yaml: is missing"):
        open_reconstruction(Storage(str(tmp_path)))
    assert open_reconstruction(Storage(str(tmp_path / "nothing"))) is None


def test_the_facts(walk: Walk, tmp_path: Path) -> None:
    make(walk, 0.08, tmp_path)
    content = json.loads((tmp_path / "posthoc.json").read_text())
    assert content["schema"] == "posthoc-ema/1"
    facts = Reconstruction.from_json((tmp_path / "posthoc.json").read_bytes(), "posthoc.json")
    assert facts.run == walk.run.attempts()[0].run
    assert (facts.checkpoint, facts.images, facts.std) == (NAME, walk.images, 0.08)
    assert facts.recipe_sha == walk.recipe.sha256
    assert sum(source.coefficient for source in facts.sources) == pytest.approx(1, abs=1e-9)
    data = (tmp_path / "weights.safetensors").read_bytes()
    assert (facts.weights.bytes, facts.weights.sha256) == (len(data), sha256_hex(data))
