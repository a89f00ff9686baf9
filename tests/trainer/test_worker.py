"""One rank started directly, as by a launcher: precision, and what it leaves for its supervisor."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data_pipeline.build import build
from data_pipeline.sources.digits import DigitsSource
from tests.support import TINY
from trainer.parts import read_part
from trainer.run import Run
from trainer.unet import UNet


def start(run: Run, shards: str, control: Path, *settings: str) -> "subprocess.Popen[str]":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        **{"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"},
        **{"MASTER_PORT": str(port), "DDPM_CONTROL": str(control), "DS_ACCELERATOR": "cpu"},
    }
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "trainer", "worker", "quickstart", *TINY, f"run={run.url}"),
            *(
                f"data.url={shards}",
                "batch.total=8",
                "batch.micro=3",
                "checkpoint.every_images=24",
                *settings,
            ),
        ],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_bf16_trains_float32_parameters_and_stops_on_a_signal(tmp_path: Path) -> None:
    shards = str(tmp_path / "shards")
    build(DigitsSource(), shards)
    run, control = Run(str(tmp_path / "run")), tmp_path / "control"
    control.mkdir()
    process = start(run, shards, control, "precision=bf16", "optimizer.warmup_images=8")
    assert process.stderr is not None
    log = ""
    for line in process.stderr:
        log += line
        if "published" in line:
            break
    process.send_signal(signal.SIGUSR1)
    _, rest = process.communicate(timeout=100)
    assert process.returncode == 75, log + rest
    assert (control / "outcome-0").read_text() == "75"
    end = run.ended()
    assert end is not None
    assert end.outcome == "requeue"
    manifest = run.manifest(run.live_checkpoints()[-1])
    assert manifest.images == end.images == 8 * manifest.updates >= 24
    assert manifest.topology.world == 1
    initial = UNet(run.recipe().unet_config(), torch.Generator().manual_seed(run.recipe().seed))
    for entry in manifest.files:
        for name, tensor in read_part(run, manifest, entry).items():
            assert tensor.dtype == torch.float32, name
            assert torch.isfinite(tensor).all(), name
            if entry.role == "weights":
                assert not torch.equal(tensor, initial.get_parameter(name)), name


@pytest.mark.slow
def test_divergence_is_counted_and_stops_training(tmp_path: Path) -> None:
    shards = str(tmp_path / "shards")
    build(DigitsSource(), shards)
    run, control = Run(str(tmp_path / "run")), tmp_path / "control"
    control.mkdir()
    settings = ("optimizer.learning_rate=1e30", "optimizer.warmup_images=0", "guard.rollbacks=1")
    process = start(run, shards, control, *settings)
    _, log = process.communicate(timeout=200)
    assert process.returncode == 1, log
    assert log.count("dropped: its gradient is not finite") == 22, log
    assert log.count("rollback 1 of at most 1") == 1
    assert "training diverged: 11 of the last 100 updates were dropped" in log
    assert "Traceback" not in log
    end = run.ended()
    assert end is not None
    assert end.outcome == "failed"


def test_without_a_launcher_the_remedy_is_named(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, "-m", "trainer", "worker", "quickstart"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 2
    assert "launch/train.sh" in done.stderr
    assert "Traceback" not in done.stderr
