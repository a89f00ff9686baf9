import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from data_pipeline.documents import Document
from data_pipeline.errors import ExitCode, UserError
from data_pipeline.lease import LeaseBoard
from eval.results import BEST_FILE, Best, Result, books
from eval.service import Service, WatchOptions, watch
from eval.team import Team
from tests.eval.helpers import start_run
from trainer.run import CheckpointGoneError, Run

FIRST, SECOND = "0000000064-000001", "0000000128-000001"


@pytest.fixture
def options(inception_option: str) -> WatchOptions:
    return WatchOptions(features=inception_option, poll_seconds=0.05, until_finished=True, lease_seconds=5.0)


def test_every_checkpoint_once_and_oldest_first(run: Run, options: WatchOptions, team: Team) -> None:
    seen: list[Result] = []
    summary = watch(run.url, options, team, seen.append)
    assert [result.checkpoint for result in seen] == [FIRST, SECOND]
    assert (summary.evaluated, summary.faults, summary.outcome) == (2, 0, "finished")
    (book,) = books(run)
    assert book.results() == seen
    for result in seen:
        assert book.storage.read(result.grid).startswith(b"\x89PNG")
    assert run.pins() == {}
    best = Best.from_json(book.storage.read(BEST_FILE), BEST_FILE)
    assert best == book.best()
    assert best.value == min(result.metrics[best.metric].value for result in seen)
    again = watch(run.url, options, team, seen.append)
    assert (again.evaluated, len(seen)) == (0, 2)
    # What is published stands.
    altered = seen[0].model_copy(update={"seconds": 1e9})
    assert book.publish(altered, {altered.grid: b"another picture"}) == seen[0]
    assert book.results()[0] == seen[0]
    assert book.storage.read(seen[0].grid).startswith(b"\x89PNG")
    documents: list[Document | None] = [book.protocol, book.held_out(), best, seen[0]]
    schemas = ["protocol/1", "held-out/1", "best/1", "result/1"]
    assert [document.SCHEMA for document in documents if document] == schemas


def test_what_another_worker_holds_is_left_to_it(run: Run, options: WatchOptions, team: Team) -> None:
    service = Service(run.url, options, team)
    tasks = service.set_up()
    assert tasks is not None
    folder = tasks[0].book.storage.child("lease", FIRST)
    held = LeaseBoard(folder, "another", ttl_seconds=60.0).try_acquire()
    assert held is not None
    order: list[str] = []

    def report(result: Result) -> None:
        order.append(result.checkpoint)
        held.release()  # only now may the first one be taken over

    service.watch(report)
    assert order == [SECOND, FIRST]
    (Path(tasks[0].book.url) / f"{FIRST}.json").unlink()
    assert LeaseBoard(folder, "another", ttl_seconds=60.0).try_acquire() is not None
    with pytest.raises(UserError, match=f"another worker is evaluating {FIRST}"):
        service.once(FIRST, report)


def test_superseded_checkpoints_are_not_evaluated(run: Run, options: WatchOptions, team: Team) -> None:
    recipe = run.recipe()
    run.claim_attempt(FIRST, "host", recipe, "0" * 64)  # a rollback: the second is no longer live
    service = Service(run.url, options, team)
    tasks = service.set_up()
    assert tasks is not None
    assert tasks[0].book.pending() == [FIRST]


def test_damaged_checkpoint_does_not_block_the_others(
    run: Run, options: WatchOptions, team: Team, caplog: pytest.LogCaptureFixture
) -> None:
    path = next(Path(run.url, "checkpoints", FIRST).glob("ema-*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    seen: list[str] = []
    summary = watch(run.url, options, team, lambda result: seen.append(result.checkpoint))
    assert seen == [SECOND]
    assert (summary.faults, summary.damaged, summary.outcome) == (3, 1, "finished")
    assert f"{FIRST} left out after 3 tries" in caplog.text


def test_damaged_manifest_does_not_block_the_others(run: Run, options: WatchOptions, team: Team) -> None:
    manifest = Path(run.url, "checkpoints", FIRST, "manifest.json")
    manifest.write_bytes(manifest.read_bytes()[:-10])
    seen: list[str] = []
    summary = watch(run.url, options, team, lambda result: seen.append(result.checkpoint))
    assert seen == [SECOND]
    assert (summary.damaged, summary.outcome) == (1, "finished")
    assert run.pins() == {}


def test_storage_fault_is_survived(
    run: Run, options: WatchOptions, team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are out of reach for one try, as when a store is down, and back in the next."""
    path = next(Path(run.url, "checkpoints", FIRST).glob("ema-*.safetensors"))
    away = path.with_name("away")
    path.rename(away)
    seen: list[str] = []

    def report(result: Result) -> None:
        seen.append(result.checkpoint)
        if away.exists():
            away.rename(path)

    summary = watch(run.url, options, team, report)
    assert summary.faults >= 1
    assert sorted(seen) == [FIRST, SECOND]
    assert summary.damaged == 0


def test_vanished_checkpoint(run: Run, options: WatchOptions, team: Team) -> None:
    """Retention removes the manifest between listing and claiming."""
    service = Service(run.url, options, team)
    tasks = service.set_up()
    assert tasks is not None
    Path(run.url, "checkpoints", FIRST, "manifest.json").unlink()
    with pytest.raises(CheckpointGoneError):
        service._try_claim(tasks[0], FIRST)
    assert run.pins() == {}
    lease = LeaseBoard(tasks[0].book.storage.child("lease", FIRST), "other", ttl_seconds=60.0)
    assert lease.try_acquire() is not None, "the claim was given back"
    summary = service.watch(lambda result: None)
    assert summary.evaluated == 1


def test_checkpoint_withdrawn_before_its_turn_is_counted(
    run: Run, options: WatchOptions, team: Team, caplog: pytest.LogCaptureFixture
) -> None:
    """While the first is scored, retention removes the second."""

    def report(result: Result) -> None:
        Path(run.url, "checkpoints", SECOND, "manifest.json").unlink()

    summary = watch(run.url, options, team, report)
    assert (summary.evaluated, summary.vanished, summary.outcome) == (1, 1, "finished")
    assert f"{SECOND} was withdrawn" in caplog.text


def test_waits_for_a_run_not_yet_started(
    tmp_path: Path, data_url: str, options: WatchOptions, team: Team, caplog: pytest.LogCaptureFixture
) -> None:
    said_waiting = threading.Event()

    class OnWaiting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "waiting for the run to start" in record.getMessage():
                said_waiting.set()

    handler = OnWaiting()
    caplog.set_level(logging.INFO, logger="eval")
    logging.getLogger("eval.service").addHandler(handler)
    folder = tmp_path / "late"
    with pytest.raises(UserError, match="holds no run"):
        watch(str(folder), options, team, lambda result: None)

    def start() -> None:
        assert said_waiting.wait(30)
        start_run(tmp_path / "made", data_url, images=(64,))
        (tmp_path / "made").rename(folder)

    starter = threading.Thread(target=start)
    starter.start()
    try:
        patient = WatchOptions(
            features=options.features, poll_seconds=0.05, until_finished=True, wait_for_run=True
        )
        summary = watch(str(folder), patient, team, lambda result: None)
    finally:
        starter.join()
        logging.getLogger("eval.service").removeHandler(handler)
    assert said_waiting.is_set()
    assert summary.evaluated == 1


def test_unknown_specification(run: Run, team: Team) -> None:
    with pytest.raises(UserError, match="known: quick"):
        watch(run.url, WatchOptions(specs=("full",)), team, lambda result: None)


def test_sigterm_in_the_middle_of_an_evaluation(tmp_path: Path, data_url: str, inception_option: str) -> None:
    """Sampling 10^6 pictures would take hours; the signal comes when their number has been announced."""
    overrides = ("evaluation.quick.samples=1000000",)
    run = start_run(tmp_path / "run", data_url, images=(64,), overrides=overrides)
    command = [sys.executable, "-m", "launch.cli", "eval", "watch", run.url, "--features", inception_option]
    process = subprocess.Popen(
        [*command, "--until-finished", "--threads", "1", "--nice", "3"], stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith(f"evaluate {FIRST}: "):
                break
        assert os.getpriority(os.PRIO_PROCESS, process.pid) == 3
        (pin,) = run.pins()[FIRST]
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
        assert process.wait(timeout=30) == ExitCode.REQUEUE, rest
    finally:
        process.kill()
        process.wait()
    assert time.monotonic() - began < 10
    assert "evaluation stopped: 0 evaluated" in rest
    assert run.pins() == {}, f"{pin} left behind"
    (book,) = books(run)
    assert book.checkpoints() == []
    assert not any(name.endswith(".png") for name in book.storage.list())
    lease = LeaseBoard(book.storage.child("lease", FIRST), "next", ttl_seconds=60.0)
    assert lease.try_acquire() is not None, "the lease was given back"
