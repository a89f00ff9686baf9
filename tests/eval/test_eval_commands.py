import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from data_pipeline.errors import UserError
from eval.results import books
from launch.cli import app
from tests.eval.helpers import start_run
from trainer.run import Run

SECOND = "0000000128-000001"


def ddpm(*arguments: str) -> str:
    done = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory, prepared_run: Run, inception_option: str) -> Run:
    url = tmp_path_factory.mktemp("evaluated") / "run"
    shutil.copytree(prepared_run.url, url)
    result = json.loads(ddpm("eval", "once", str(url), "--features", inception_option, "--json"))
    assert (result["schema"], result["checkpoint"]) == ("result/1", SECOND)
    return Run(str(url))


def test_status(evaluated: Run) -> None:
    text = ddpm("eval", "status", evaluated.url)
    assert SECOND in text
    assert "real held-out (8)" in text
    assert "waiting: 0000000064-000001" in text
    (facts,) = json.loads(ddpm("eval", "status", evaluated.url, "--json"))
    assert [result["checkpoint"] for result in facts["results"]] == [SECOND]
    assert facts["held_out"]["samples"] == 8
    assert facts["pending"] == ["0000000064-000001"]


def test_best(evaluated: Run) -> None:
    assert f"{SECOND}  FD-inception-" in ddpm("eval", "best", evaluated.url)
    (best,) = json.loads(ddpm("eval", "best", evaluated.url, "--json")).values()
    assert best["checkpoint"] == SECOND


def test_once_shows_a_result_that_is_there(
    evaluated: Run, inception_option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eval.service.evaluate", None)  # computing again would call it
    text = ddpm("eval", "once", evaluated.url, "--features", inception_option)
    assert text.startswith(f"{SECOND}  FD-inception-")
    assert "held-out" in text


def test_without_results(run: Run, prepared_run: Run) -> None:
    for command in ("status", "best"):
        with pytest.raises(UserError, match="holds no run"):
            ddpm("eval", command, str(Path(run.url) / "nowhere"))
    assert "no results yet" in ddpm("eval", "best", run.url)


def test_embedded_network_from_end_to_end(tmp_path: Path, data_url: str) -> None:
    run = start_run(tmp_path / "run", data_url, images=(64,))
    text = ddpm("eval", "watch", run.url, "--until-finished", "--nice", "0")
    assert "FD-effnetlite0" in text
    (book,) = books(run)
    (result,) = book.results()
    assert set(result.metrics) == {"FD-effnetlite0", "CS-effnetlite0"}
    # Digits lie closer to digits than an untrained network's noise does.
    assert result.metrics["FD-effnetlite0"].value > 2 * result.held_out["FD-effnetlite0"].value


def test_signal_while_waiting_ends_at_once(tmp_path: Path) -> None:
    killer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    began = time.monotonic()
    killer.start()
    done = CliRunner().invoke(
        app, ["eval", "watch", str(tmp_path / "late"), "--wait-for-run", "--poll", "600", "--nice", "0"]
    )
    assert done.exit_code == 0
    assert time.monotonic() - began < 30
    assert "evaluation stopped: 0 evaluated" in done.stderr
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers


def test_sample(evaluated: Run, tmp_path: Path) -> None:
    out = tmp_path / "pictures"
    text = ddpm("sample", evaluated.url, "-n", "6", "--out", str(out), "--steps", "2", "--seed", "5")
    assert text.startswith(f"{out}/grid.png: 6 pictures of {SECOND}, main, 2 steps")
    names = sorted(path.name for path in out.iterdir())
    assert names == [*(f"{i:06d}.png" for i in range(6)), "grid.png", "samples.json"]
    facts = json.loads((out / "samples.json").read_bytes())
    assert facts["manifest_sha256"] == evaluated.manifest_sha256(SECOND)
    assert (facts["ema"], facts["sampler"], facts["steps"], facts["seed"]) == ("main", "ddim", 2, 5)
    first = np.asarray(Image.open(out / "000000.png"))
    assert first.shape == (8, 8)
    fewer = tmp_path / "fewer"
    ddpm("sample", evaluated.url, "-n", "1", "--out", str(fewer), "--steps", "2", "--seed", "5")
    assert np.array_equal(np.asarray(Image.open(fewer / "000000.png")), first)
    for arguments, message in (
        (("--out", str(out)), "holds samples already"),
        (("--out", str(tmp_path / "x"), "--checkpoint", "0000000001-000001"), "no checkpoint"),
        (("--out", str(tmp_path / "x"), "--ema", "slow"), "holds no weights 'slow'; known: raw, main"),
        (("--out", str(tmp_path / "x"), "--steps", "5000"), "--steps 5000: the model has 1000 timesteps"),
        (("--out", str(tmp_path / "x"), "--sampler", "dim"), "--sampler dim: unknown; known: ddim, ance"),
    ):
        with pytest.raises(UserError, match=message):
            ddpm("sample", evaluated.url, *arguments)
    assert not (tmp_path / "x").exists()
