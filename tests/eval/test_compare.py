import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
from typer.testing import CliRunner

from data_pipeline.documents import sha256_hex
from data_pipeline.errors import UserError
from eval.compare import Contender, compare
from eval.team import Team
from launch.cli import app
from tests.eval.helpers import start_run
from tests.support import reseal
from trainer.run import Run

FIRST, SECOND = "0000000064-000001", "0000000128-000001"


def test_a_side_of_its_own_is_refused(run: Run, small_network_option: str, team: Team) -> None:
    """Nor are the names of the second side looked at only after the first one was drawn."""
    for other, message in (
        (Contender(run), "both sides are .* with weights main; name OTHER"),
        (Contender(run, "0000009999-000001"), "no checkpoint 0000009999-000001"),
        (Contender(run, None, "narrow"), "narrow"),
    ):
        with pytest.raises(UserError, match=message):
            compare(Contender(run), other, None, small_network_option, team)
    assert not run.pins()


def test_other_data_are_refused(
    run: Run, tmp_path: Path, data_url: str, small_network_option: str, team: Team
) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(data_url, changed)
    index = changed / "index.json"
    index.write_bytes(index.read_bytes() + b"\n")
    other = start_run(tmp_path / "other", str(changed), images=(64,))
    with pytest.raises(UserError, match="differs from the other run's in reference, held_out; "):
        compare(Contender(run), Contender(other), None, small_network_option, team)


def test_equal_weights_under_two_names(run: Run, small_network_option: str, team: Team) -> None:
    found = compare(Contender(run, FIRST), Contender(run, FIRST, "raw"), None, small_network_option, team)
    assert (found.difference, found.low, found.high) == (0.0, 0.0, 0.0)
    assert found.a.distance == found.b.distance
    assert found.samples == 8


def test_two_checkpoints_and_their_mirror(run: Run, small_network_option: str, team: Team) -> None:
    sides = Contender(run, FIRST), Contender(run, SECOND)
    found = compare(*sides, None, small_network_option, team)
    mirror = compare(*reversed(sides), None, small_network_option, team)
    assert found.difference == pytest.approx(found.a.distance - found.b.distance)
    assert found.difference == pytest.approx(-mirror.difference)
    assert found.low <= found.high
    assert (mirror.low, mirror.high) == pytest.approx((-found.high, -found.low))
    assert found.probability_a_better + mirror.probability_a_better == pytest.approx(1)
    assert found.a.manifest_sha256 == run.manifest_sha256(FIRST)


def test_average_against_raw_weights(run: Run, small_network_option: str) -> None:
    """The test run's averages are its weights, until one is changed."""
    command = ["eval", "compare", run.url, "--other-ema", "raw", "--features", small_network_option]
    done = CliRunner().invoke(app, [*command, "--json"], catch_exceptions=False)
    same = json.loads(done.stdout)
    assert (same["a"]["ema"], same["b"]["ema"]) == ("main", "raw")
    assert same["difference"] == 0
    folder = Path(run.url, "checkpoints", SECOND)
    path = next(folder.glob("ema-main.safetensors"))
    weights = {key: value + 0.02 for key, value in safetensors.torch.load_file(path).items()}
    path.write_bytes(safetensors.torch.save(weights))
    manifest = json.loads((folder / "manifest.json").read_bytes())
    for entry in manifest["files"]:
        if entry["path"] == path.name:
            entry |= {"sha256": sha256_hex(path.read_bytes()), "bytes": path.stat().st_size}
    (folder / "manifest.json").write_bytes(reseal(manifest))
    text = CliRunner().invoke(app, command, catch_exceptions=False).stdout
    assert "95 % interval" in text
    assert "difference +0.0000" not in text


def test_other_protocols_are_refused(
    run: Run, tmp_path: Path, data_url: str, small_network_option: str, team: Team
) -> None:
    other = start_run(tmp_path / "other", data_url, images=(64,), overrides=("evaluation.quick.steps=3",))
    with pytest.raises(UserError, match=r"evaluation\.quick differs from the other run's in steps; "):
        compare(Contender(run), Contender(other), None, small_network_option, team)
