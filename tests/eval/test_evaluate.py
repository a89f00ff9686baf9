import io
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from data_pipeline.documents import sha256_hex
from data_pipeline.errors import UserError
from data_pipeline.index import load_index
from eval.evaluate import Baseline, evaluate, make_protocol, prepare
from eval.features import FeatureChoice, FeatureNetwork, open_network
from eval.metrics.frechet import frechet_distance
from eval.protocol import Protocol
from eval.reference import REFERENCE_FILE, RealJob, real_statistics
from eval.results import Result, ResultBook
from eval.service import Service, WatchOptions
from eval.team import Team
from tests.eval.helpers import start_run
from tests.support import reseal
from trainer.run import Run


@dataclass(frozen=True)
class Prepared:
    protocol: Protocol
    book: ResultBook
    network: FeatureNetwork
    baseline: Baseline


@pytest.fixture
def prepared(run: Run, data_url: str, inception: FeatureChoice, team: Team) -> Prepared:
    protocol, choice = make_protocol(run.recipe(), "quick", load_index(data_url).sha256, inception)
    book = ResultBook(run, protocol)
    network = open_network(choice, team.device)
    return Prepared(protocol, book, network, prepare(book, data_url, network, team))


def test_reference_is_all_of_the_training_split(prepared: Prepared, data_url: str, team: Team) -> None:
    loaded = load_index(data_url)
    reference = prepared.baseline.reference
    assert reference.count == loaded.index.samples("train") > 20
    # By another way: all features at once, in another chunk size.
    wanted = RealJob(data_url, "train")
    again = real_statistics(team, prepared.network, wanted, chunk=7, shape=(8, 8, 1))
    torch.testing.assert_close(again.moments.mean, reference.mean, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(again.moments.scatter, reference.scatter, rtol=1e-4, atol=1e-6)
    stored = safetensors.torch.load(prepared.book.storage.read(REFERENCE_FILE))
    assert torch.equal(stored["mean"], reference.mean)
    assert torch.equal(stored["scatter"], reference.scatter)


def test_held_out_row(prepared: Prepared, data_url: str, team: Team) -> None:
    held_out = prepared.baseline.held_out
    assert (held_out.samples, held_out.requested) == (8, 8)
    name = prepared.protocol.features.distance_name
    wanted = RealJob(data_url, "val", 8)
    val = real_statistics(team, prepared.network, wanted, chunk=4, shape=(8, 8, 1))
    expected = frechet_distance(val.moments, prepared.baseline.reference)
    assert held_out.metrics[name].value == pytest.approx(expected)
    assert expected > 0
    assert prepared.book.held_out() == held_out


def test_preparing_again_reads_what_is_stored(
    prepared: Prepared, data_url: str, team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eval.evaluate.real_statistics", None)  # computing again would call it
    again = prepare(prepared.book, data_url, prepared.network, team)
    assert again.held_out == prepared.baseline.held_out
    assert torch.equal(again.reference.scatter, prepared.baseline.reference.scatter)


def test_too_few_held_out_pictures_are_stated(
    run: Run, data_url: str, inception: FeatureChoice, team: Team
) -> None:
    recipe = run.recipe()
    spec = recipe.evaluation["quick"].model_copy(update={"samples": 1000})
    recipe = recipe.model_copy(update={"evaluation": {"quick": spec}})
    protocol, choice = make_protocol(recipe, "quick", load_index(data_url).sha256, inception)
    network = open_network(choice, team.device)
    held_out = prepare(ResultBook(run, protocol), data_url, network, team).held_out
    assert held_out.samples == load_index(data_url).index.samples("val") < 20
    assert held_out.requested == 1000
    assert "held-out pictures exist for 1000 samples" in held_out.warnings[-1]


def test_result_of_one_checkpoint(prepared: Prepared, run: Run, team: Team) -> None:
    name = run.checkpoints()[0]
    result, png = evaluate(run, name, prepared.protocol, prepared.network, prepared.baseline, team)
    assert (result.checkpoint, result.images, result.samples) == (name, 64, 8)
    assert result.manifest_sha256 == run.manifest_sha256(name)
    features = prepared.protocol.features
    assert set(result.metrics) == {features.distance_name, features.score_name}
    assert result.metrics[features.distance_name].value > result.held_out[features.distance_name].value > 0
    assert 1 <= result.metrics[features.score_name].value <= 1008
    assert any("8 pictures for 2048 features" in warning for warning in result.warnings)
    grid = Image.open(io.BytesIO(png))
    assert grid.size == (3 * 50 + 2, 3 * 50 + 2)
    again, png_again = evaluate(run, name, prepared.protocol, prepared.network, prepared.baseline, team)
    assert again.metrics == result.metrics
    assert png_again == png


def test_non_finite_samples_are_stated(prepared: Prepared, run: Run, team: Team) -> None:
    name = run.checkpoints()[0]
    folder = Path(run.url, "checkpoints", name)
    path = next(folder.glob("ema-*.safetensors"))
    weights = {key: value * torch.nan for key, value in safetensors.torch.load_file(path).items()}
    path.write_bytes(safetensors.torch.save(weights))
    manifest = json.loads((folder / "manifest.json").read_bytes())
    for entry in manifest["files"]:
        if entry["path"] == path.name:
            entry |= {"sha256": sha256_hex(path.read_bytes()), "bytes": path.stat().st_size}
    (folder / "manifest.json").write_bytes(reseal(manifest))
    result, _ = evaluate(run, name, prepared.protocol, prepared.network, prepared.baseline, team)
    assert "8 of 8 samples are not finite" in result.warnings[-1]
    assert all(np.isfinite(metric.value) for metric in result.metrics.values())


def test_changed_data_are_refused(prepared: Prepared, tmp_path: Path, data_url: str, team: Team) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(data_url, changed)
    index = changed / "index.json"
    index.write_bytes(index.read_bytes() + b"\n")
    with pytest.raises(UserError, match="a data set must not change under its URL"):
        prepare(prepared.book, str(changed), prepared.network, team)


def test_damaged_reference_is_refused(prepared: Prepared, data_url: str, team: Team) -> None:
    path = Path(prepared.book.url, REFERENCE_FILE)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"reference\.safetensors: damaged .*; delete it"):
        prepare(prepared.book, data_url, prepared.network, team)


def test_two_processes_equal_one(
    tmp_path: Path, data_url: str, inception: FeatureChoice, inception_option: str, team: Team
) -> None:
    """9 samples in chunks of 4: three chunks, so the processes get two and one, the last one padded."""
    alone = start_run(tmp_path / "alone", data_url, images=(64,), overrides=("evaluation.quick.samples=9",))
    shutil.copytree(alone.url, tmp_path / "pair")
    (one,) = _once(Service(alone.url, WatchOptions(features=inception), team))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "launch.cli", "eval", "once", str(tmp_path / "pair"), "--json", "--threads", "1"]
    done = subprocess.run(
        [*torchrun, *command, "--features", inception_option],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    two = Result.from_json(done.stdout.encode(), "stdout")
    assert (one.environment.processes, two.environment.processes) == (1, 2)
    for metric, value in one.metrics.items():
        assert two.metrics[metric].value == pytest.approx(value.value, rel=1e-9)
    folders = [tmp_path / name / "eval" / one.protocol for name in ("alone", "pair")]
    grids = [(folder / one.grid).read_bytes() for folder in folders]
    assert grids[0] == grids[1]
    moments = [safetensors.torch.load_file(folder / REFERENCE_FILE) for folder in folders]
    for name in ("mean", "scatter"):
        torch.testing.assert_close(moments[1][name], moments[0][name], rtol=1e-9, atol=1e-12)


def _once(service: Service) -> list[Result]:
    found: list[Result] = []
    service.once(None, found.append)
    return found
