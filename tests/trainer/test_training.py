"""Training for real: two ranks under the deepspeed launcher, killed, resumed, stopped, in other layouts."""

import re
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor

from data_pipeline.errors import UserError
from tests.support import TINY, make_run, metric_rows, start_training
from trainer.parts import read_part
from trainer.recipe import load_recipe
from trainer.run import Run
from trainer.supervisor import Placement, supervise
from trainer.weights import load_for_inference
from trainer.weights.export import export_diffusers
from trainer.weights.imports import ImportOptions, import_weights

BATCH = 32
SETTINGS = (
    *TINY,
    f"batch.total={BATCH}",
    "optimizer.warmup_images=128",
    "model.dropout=0.1",
    # The distribution of timesteps is part of what a resumed run must find again.
    "loss.timesteps=loss-aware",
    f"loss.refresh_every_images={3 * BATCH}",
    f"train.images={10 * BATCH}",
    f"checkpoint.every_images={4 * BATCH}",
    f"logging.every_images={BATCH}",
    "logging.tensorboard=false",
)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, shards: str) -> Run:
    run = Run(str(tmp_path_factory.mktemp("uninterrupted") / "run"))
    code, log = train(run, shards)
    assert code == 0, log
    return run


def start(
    run: Run, shards: str, *, options: Sequence[str] = (), settings: Sequence[str] = ()
) -> subprocess.Popen[str]:
    return start_training(run, shards, [*SETTINGS, *settings, *options])


def train(
    run: Run, shards: str, *, options: Sequence[str] = (), settings: Sequence[str] = ()
) -> tuple[int, str]:
    process = start(run, shards, options=options, settings=settings)
    output, _ = process.communicate(timeout=200)
    return process.returncode, output


def lines_until(process: subprocess.Popen[str], text: str) -> Iterator[str]:
    """Read the output up to the line that holds `text`."""
    assert process.stdout is not None
    for line in process.stdout:
        yield line
        if text in line:
            return
    raise AssertionError(f"the program ended without saying {text!r}")


def ranks_of(run: Run) -> list[psutil.Process]:
    """The ranks of a run, and no launcher."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if f"run={run.url}" in command and "worker" in command and "deepspeed" not in " ".join(command):
            found.append(process)
    return found


def processes_of(run: Run) -> list[psutil.Process]:
    """Everything that trains a run."""
    return [p for p in psutil.process_iter(["cmdline"]) if f"run={run.url}" in (p.info["cmdline"] or [])]


def tensors(run: Run, name: str) -> dict[str, Tensor]:
    """All tensors of a checkpoint, its state slices included, by part and key."""
    manifest = run.manifest(name)
    return {
        f"{entry.path}/{key}": value
        for entry in manifest.files
        for key, value in read_part(run, manifest, entry).items()
    }


def losses(run: Run, attempts: Sequence[int]) -> dict[int, str]:
    """Loss by images, in hex, of the rows that the given attempts published."""
    return {row["images"]: float(row["loss"]).hex() for row in metric_rows(run, attempts)}


def assert_bit_equal(run: Run, whole: Run, attempts: Sequence[int]) -> None:
    """All tensors, state included, and the losses of all steps agree bit for bit."""
    mine, theirs = (tensors(r, r.live_checkpoints()[-1]) for r in (run, whole))
    assert mine.keys() == theirs.keys()
    assert any(key.startswith("state/rank-0001") and "exp_avg_sq" in key for key in theirs)
    assert any(key.startswith("state/rank-0001") and "ema.main" in key for key in theirs)
    assert any(key.startswith("state/timesteps") for key in theirs)
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    assert losses(run, attempts) == losses(whole, [1])
    assert len(losses(whole, [1])) == 10


def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(
    tmp_path: Path, shards: str, uninterrupted: Run
) -> None:
    run = Run(str(tmp_path / "run"))
    process = start(run, shards, options=["--restarts", "1"])
    list(lines_until(process, f"checkpoint {4 * BATCH:010d}-000001 published"))
    victims = ranks_of(run)
    assert len(victims) == 2
    victims[1].kill()
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    parents = [attempt.parent for attempt in run.attempts()]
    assert len(parents) == 2, "the kill must have cost an attempt"
    assert parents[0] is None
    assert parents[1] is not None, "the second attempt must have resumed"
    assert run.live_checkpoints()[-1] == f"{10 * BATCH:010d}-000002"
    assert processes_of(run) == []
    assert_bit_equal(run, uninterrupted, [1, 2])


@pytest.mark.slow
def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(
    tmp_path: Path, shards: str, uninterrupted: Run
) -> None:
    run = Run(str(tmp_path / "run"))
    process = start(run, shards)
    list(lines_until(process, "attempt 1 of run"))
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 75, output
    assert processes_of(run) == []
    end = run.ended()
    assert end is not None
    assert end.outcome == "requeue"
    assert end.images < 10 * BATCH, "the stop must have come before the end"
    code, log = train(run, shards)
    assert code == 0, log
    assert run.attempts()[1].parent == end.checkpoint
    assert_bit_equal(run, uninterrupted, [1, 2])


@pytest.mark.slow
def test_one_rank_with_accumulation_takes_over_from_two(
    tmp_path: Path, shards: str, uninterrupted: Run
) -> None:
    """Another layout loads the state and stays on the same trajectory, up to the order of sums."""
    settings = ["model.dropout=0", f"train.images={6 * BATCH}"]
    runs = [Run(str(tmp_path / name)) for name in ("whole", "changed")]
    for run, last in ((runs[0], 6), (runs[1], 3)):
        code, log = train(run, shards, settings=[*settings, f"train.images={last * BATCH}"])
        assert code == 0, log
    code, log = train(runs[1], shards, settings=[*settings, "batch.micro=10"], options=["--ranks", "1"])
    assert code == 0, log
    manifests = [run.manifest(run.live_checkpoints()[-1]) for run in runs]
    assert [manifest.topology.world for manifest in manifests] == [2, 1]
    assert [manifest.images for manifest in manifests] == [6 * BATCH, 6 * BATCH]
    loaded = [
        load_for_inference(run, manifest.name, ema=ema, device="cpu").model.state_dict()
        for run, manifest in zip(runs, manifests, strict=True)
        for ema in ("raw", "main")
    ]
    for whole, changed in zip(loaded[:2], loaded[2:], strict=True):
        for name, value in whole.items():
            torch.testing.assert_close(changed[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.url=/nowhere"], "/nowhere"),
        (["data.url="], "data.url"),
        (["batch.total=1"], "batch.total=1"),
        (["seed=5"], "seed: 0 -> 5"),
        (["image.size=16", "model.attention_resolutions=[8]"], "8x8"),
        (["data.split=test"], "test"),
    ],
)
def test_mistakes_are_named_before_anything_starts(
    shards: str, tmp_path: Path, settings: list[str], message: str
) -> None:
    run = make_run(str(tmp_path / "run"), images_list=())
    overrides = [*TINY, f"run={run.url}", f"data.url={shards}", *settings]
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        supervise("quickstart", overrides, Placement(ranks=2))
    assert "\n" not in str(caught.value)
    assert run.newest_attempt() == 1


def test_training_goes_on_from_imported_weights(tmp_path: Path, shards: str) -> None:
    source = make_run(str(tmp_path / "source"), images_list=[64])
    export_diffusers(source, tmp_path / "exported", checkpoint=None, ema="raw")
    run = Run(str(tmp_path / "run"))
    recipe = load_recipe("quickstart", SETTINGS)
    imported = import_weights(str(tmp_path / "exported"), recipe, run, ImportOptions())
    loaded = load_for_inference(run, imported.checkpoint, ema="main", device="cpu")
    original = load_for_inference(source, source.checkpoints()[0], ema="raw", device="cpu")
    theirs = original.model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in loaded.model.state_dict().items())

    code, log = train(run, shards, settings=[f"train.images={2 * BATCH}"])
    assert code == 0, log
    assert [attempt.parent for attempt in run.attempts()] == [None, imported.checkpoint]
    trained = load_for_inference(run, run.live_checkpoints()[-1], ema="raw", device="cpu").model.state_dict()
    assert any(not torch.equal(value, theirs[name]) for name, value in trained.items())
    change = max(float((value - theirs[name]).abs().max()) for name, value in trained.items())
    assert change < 0.01, "two small updates of the imported weights, and no others"


def test_a_mistake_ends_in_one_line_and_exit_2(shards: str, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, log = train(Run(str(tmp_path / "run")), shards, options=["--master_port", str(port)])
    assert code == 2, log
    errors = [line for line in log.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, log
    assert f"--master_port {port}" in errors[0]
    assert "Traceback" not in log
