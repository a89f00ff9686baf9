"""`ddpm weights` as users type it."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from data_pipeline.errors import UserError
from launch.commands.weights import app
from tests.support import TINY, make_run
from trainer.command import report_errors
from trainer.run import Run

SECOND = "0000000128-000001"


def weights(*arguments: str) -> str:
    done = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_run(str(tmp_path_factory.mktemp("runs") / "run"))


def test_out_and_in_again(run: Run, tmp_path: Path) -> None:
    out, back = str(tmp_path / "out"), str(tmp_path / "back")
    text = weights("export", run.url, "--to", "diffusers", out)
    assert text == f"{out}: {SECOND}, main; DDPMPipeline.from_pretrained opens it\n"
    text = weights("import", out, "--recipe", "quickstart", "--run", back, *TINY, "--images", "128")
    assert text.startswith(f"{back}: {SECOND}, 144 tensors of diffusers, no averages")
    assert f"ddpm train quickstart run={back} data.url=SHARDS model.base_channels=8" in text
    assert Run(back).live_checkpoints() == [SECOND]


def test_facts(run: Run, tmp_path: Path) -> None:
    out, back = str(tmp_path / "out"), str(tmp_path / "back")
    place = f"{run.url}/checkpoints/0000000064-000001"
    facts = json.loads(weights("export", place, out, "--ema", "raw", "--json"))
    assert facts["schema"] == "weights-export/1"
    assert (facts["checkpoint"], facts["ema"]) == ("0000000064-000001", "raw")
    assert facts["manifest_sha256"] == run.manifest_sha256("0000000064-000001")
    assert {"path", "bytes", "sha256"} == facts["files"][0].keys()
    facts = json.loads(weights("import", out, "--recipe", "quickstart", "--run", back, *TINY, "--json"))
    assert facts["schema"] == "weights-import/1"
    assert (facts["checkpoint"], facts["format"], facts["images"]) == ("0000000000-000001", "diffusers", 0)
    assert facts["manifest_sha256"] == Run(back).manifest_sha256(facts["checkpoint"])


def test_a_checkpoint_named_twice(run: Run, tmp_path: Path) -> None:
    place, out = f"{run.url}/checkpoints/{SECOND}", str(tmp_path / "out")
    with pytest.raises(UserError, match="names another one; give it once"):
        weights("export", place, out, "--checkpoint", "0000000064-000001")
    assert SECOND in weights("export", place, out, "--checkpoint", SECOND)


def test_imported_weights_sample(run: Run, tmp_path: Path) -> None:
    from launch.cli import app as ddpm

    out, back = str(tmp_path / "out"), str(tmp_path / "back")
    weights("export", run.url, out)
    weights("import", out, "--recipe", "quickstart", "--run", back, *TINY)
    done = CliRunner().invoke(ddpm, ["sample", back, "--out", str(tmp_path / "pictures"), "-n", "2"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "pictures" / "000001.png").exists()


def test_a_mistake_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"some.layer": torch.zeros(1)}, tmp_path / "model.pt")
    arguments = ["--recipe", "quickstart", "--run", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as raised:
        report_errors(lambda: app(["import", str(tmp_path / "model.pt"), *arguments]))
    assert raised.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith(f"error: {tmp_path / 'model.pt'}: these are weights of no known code base")
