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
from data_pipeline.split_reader import read_split
from eval.baseline import REFERENCE_FILE, Baseline, prepare
from eval.evaluate import evaluate
from eval.features import FeatureNetwork, open_network
from eval.metrics.frechet import frechet_distance
from eval.plan import make_plan
from eval.protocol import Protocol
from eval.reference import RealJob, real_statistics
from eval.reference_cache import ReferenceCache
from eval.results import Result, ResultBook
from eval.service import Service, WatchOptions
from eval.statistics import Job, Pictures, accumulate
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
def prepared(run: Run, data_url: str, inception_option: str, team: Team) -> Prepared:
    plan = make_plan(run.recipe(), "quick", load_index(data_url).sha256, inception_option)
    book = ResultBook(run, plan.protocol)
    network = open_network(plan.features, team.device)
    baseline = prepare(book, data_url, network, team, ReferenceCache())
    return Prepared(plan.protocol, book, network, baseline)


def test_reference_is_all_of_the_training_split(prepared: Prepared, data_url: str, team: Team) -> None:
    loaded = load_index(data_url)
    reference = prepared.baseline.reference.moments
    assert reference.count == loaded.index.samples("train") > 20
    # By another way: in chunks of another size.
    pictures = np.concatenate(list(read_split(data_url, "train", channels=1, image_size=8, batch=64)))
    job = Job(total=len(pictures), chunk=7, shape=(8, 8, 1))
    again = accumulate(team, prepared.network, lambda index: _chunk(pictures, index, job.chunk), job)
    torch.testing.assert_close(again.moments.mean, reference.mean, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(again.moments.scatter, reference.scatter, rtol=1e-4, atol=1e-6)
    stored = safetensors.torch.load(prepared.book.storage.read(REFERENCE_FILE))
    assert torch.equal(stored["mean"], reference.mean)
    assert torch.equal(stored["scatter"], reference.scatter)


def test_held_out_row(prepared: Prepared, data_url: str, team: Team) -> None:
    held_out = prepared.baseline.held_out
    assert (held_out.samples, held_out.requested) == (8, 8)
    name = prepared.protocol.features.distance_name
    val = real_statistics(team, prepared.network, RealJob(data_url, "val", limit=8))
    expected = frechet_distance(val.moments, prepared.baseline.reference.moments)
    assert held_out.metrics[name].value == pytest.approx(expected)
    assert expected > 0
    assert prepared.book.held_out() == held_out


def test_preparing_again_reads_what_is_stored(
    prepared: Prepared, data_url: str, team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eval.baseline.real_statistics", None)  # computing again would call it
    again = prepare(prepared.book, data_url, prepared.network, team, ReferenceCache())
    assert again.held_out == prepared.baseline.held_out
    assert torch.equal(again.reference.moments.scatter, prepared.baseline.reference.moments.scatter)


def test_too_few_held_out_pictures_are_stated(
    run: Run, data_url: str, inception_option: str, team: Team
) -> None:
    recipe = run.recipe()
    spec = recipe.evaluation["quick"].model_copy(update={"samples": 1000})
    recipe = recipe.model_copy(update={"evaluation": {"quick": spec}})
    plan = make_plan(recipe, "quick", load_index(data_url).sha256, inception_option)
    network = open_network(plan.features, team.device)
    book = ResultBook(run, plan.protocol)
    held_out = prepare(book, data_url, network, team, ReferenceCache()).held_out
    assert held_out.samples == load_index(data_url).index.samples("val") < 20
    assert held_out.requested == 1000
    assert "held-out pictures exist for 1000 samples" in held_out.warnings[-1]


def test_result_of_one_checkpoint(prepared: Prepared, run: Run, team: Team) -> None:
    name = run.checkpoints()[0]
    result, png = _evaluated(prepared, run, name, team)
    assert (result.checkpoint, result.images, result.samples) == (name, 64, 8)
    assert result.manifest_sha256 == run.manifest_sha256(name)
    features = prepared.protocol.features
    assert set(result.metrics) == {features.distance_name, features.score_name}
    assert result.metrics[features.distance_name].value > result.held_out[features.distance_name].value > 0
    assert 1 <= result.metrics[features.score_name].value <= 1008
    assert any("8 pictures for 2048 features" in warning for warning in result.warnings)
    grid = Image.open(io.BytesIO(png))
    assert grid.size == (3 * 50 + 2, 3 * 50 + 2)
    again, png_again = _evaluated(prepared, run, name, team)
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
    result, _ = _evaluated(prepared, run, name, team)
    assert any("8 of 8 samples are not finite" in warning for warning in result.warnings)
    assert any("8 of 8 pictures have one colour" in warning for warning in result.warnings)
    assert all(np.isfinite(metric.value) for metric in result.metrics.values())


def test_changed_data_are_refused(prepared: Prepared, tmp_path: Path, data_url: str, team: Team) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(data_url, changed)
    index = changed / "index.json"
    index.write_bytes(index.read_bytes() + b"\n")
    with pytest.raises(UserError, match="a data set must not change under its URL"):
        prepare(prepared.book, str(changed), prepared.network, team, ReferenceCache())


def test_protocol_written_before_fields_were_added(prepared: Prepared, data_url: str, team: Team) -> None:
    """Its folder has the same name, though the file's bytes differ; another protocol's file is refused."""
    path = Path(prepared.book.url, "protocol.json")
    content = json.loads(path.read_bytes())
    for field in ("metrics", "constants", "bits", "reference_file"):
        assert content.pop(field) is None
    del content["features"]["spatial"], content["features"]["function"]
    path.write_text(json.dumps(content))
    prepare(prepared.book, data_url, prepared.network, team, ReferenceCache())
    path.write_text(json.dumps(content | {"seed": 5}))
    with pytest.raises(UserError, match="is not its folder's protocol"):
        prepare(prepared.book, data_url, prepared.network, team, ReferenceCache())


def test_damaged_reference_is_refused(prepared: Prepared, data_url: str, team: Team) -> None:
    path = Path(prepared.book.url, REFERENCE_FILE)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"reference\.safetensors: damaged .*; delete it"):
        prepare(prepared.book, data_url, prepared.network, team, ReferenceCache())


def test_three_processes_equal_one(
    tmp_path: Path, data_url: str, inception_option: str, team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    """9 samples in chunks of 4: three chunks, one for each process, the last one padded."""
    alone = start_run(tmp_path / "alone", data_url, images=(64,), overrides=("evaluation.quick.samples=9",))
    shutil.copytree(alone.url, tmp_path / "three")
    (one,) = _once(Service(alone.url, WatchOptions(features=inception_option), team))
    monkeypatch.setenv("DDPM_REFERENCES", str(tmp_path / "references"))  # the three compute all anew
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    command = ["-m", "launch.cli", "eval", "once", str(tmp_path / "three"), "--json", "--threads", "1"]
    done = subprocess.run(
        [*torchrun, *command, "--features", inception_option],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    three = Result.from_json(done.stdout.encode(), "stdout")
    assert (one.environment.processes, three.environment.processes) == (1, 3)
    for metric, value in one.metrics.items():
        assert three.metrics[metric].value == pytest.approx(value.value, rel=1e-9)
    folders = [tmp_path / name / "eval" / one.protocol for name in ("alone", "three")]
    grids = [(folder / one.grid).read_bytes() for folder in folders]
    assert grids[0] == grids[1]
    moments = [safetensors.torch.load_file(folder / REFERENCE_FILE) for folder in folders]
    for name in ("mean", "scatter"):
        torch.testing.assert_close(moments[1][name], moments[0][name], rtol=1e-9, atol=1e-12)


def _evaluated(prepared: Prepared, run: Run, name: str, team: Team) -> tuple[Result, bytes]:
    outcome = evaluate(run, name, prepared.protocol, prepared.network, prepared.baseline, team)
    (png,) = outcome.files.values()
    return outcome.result, png


def _chunk(pictures: np.ndarray, index: int, chunk: int) -> Pictures:
    rows = pictures[index * chunk : (index + 1) * chunk]
    return Pictures(rows, np.ones(len(rows), dtype=np.bool_))


def _once(service: Service) -> list[Result]:
    found: list[Result] = []
    service.once(None, found.append)
    return found
