"""Checkpoints are written beside training, one at a time, and exist whole or not at all."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from s3fs import S3FileSystem

from data_pipeline.errors import StorageFault, UserError
from data_pipeline.storage import Storage
from launch.s3server import S3Server
from tests.fault_plan import Fault, Request
from tests.fault_proxy import FaultProxy
from tests.support import metric_rows, tiny_recipe
from tests.trainer.checkpoint_support import State, draft, load_into, newest_loadable
from tests.trainer.thread_ranks import alone, on_ranks
from trainer.checkpoint import SupersededError, verify
from trainer.distributed import FollowedError, Ranks
from trainer.partition import Partition, Piece
from trainer.run import Run
from trainer.saving import CheckpointWriter, Job, whole_tensors
from trainer.telemetry import MetricsLog

SIZE = 40_000


def new_run(url: str, give_up_after: float = 60.0) -> Run:
    run = Run(url)
    run.storage = Storage(url, give_up_after=give_up_after)
    run.adopt_recipe(tiny_recipe())
    run.claim_attempt(None, "test", tiny_recipe(), "")
    return run


def job(images: int, attempt: int = 1) -> Job:
    return Job(draft(images, attempt), {}, checkpoint=True, snapshot=False)


def open_writer(run: Run, state: State, ranks: Ranks | None = None, **section: float) -> CheckpointWriter:
    return state.writer(run, ranks or alone(), MetricsLog(run, 1, 0), **section)


def assert_holds(run: Run, images: int, attempt: int = 1) -> None:
    """The checkpoint of this moment is there, verified, and every number is that of its moment."""
    manifest = run.manifest(draft(images, attempt).name)
    verify(run, manifest)
    state = State(SIZE)
    load_into(state, run, manifest, alone())
    assert state.equals(images)


class Gate:
    """Holds back what is written to a storage until it is opened."""

    def __init__(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.reached = threading.Event(), threading.Event()
        stream = run.storage.stream

        def held(path: str, fill: Any) -> None:
            self.reached.set()
            assert self.open.wait(60)
            stream(path, fill)

        monkeypatch.setattr(run.storage, "stream", held)


def test_training_goes_on_while_a_checkpoint_of_its_moment_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, state = new_run(str(tmp_path / "run")), State(SIZE)
    gate, writer = Gate(run, monkeypatch), open_writer(run, state)
    state.train_to(64)
    writer.start(job(64))
    assert gate.reached.wait(60)
    state.train_to(128)
    assert run.checkpoints() == []
    gate.open.set()
    writer.wait()
    assert writer.published == run.manifest(draft(64).name)
    assert_holds(run, 64)
    writer.close()


def test_a_single_rank_s_whole_tensors_are_views_of_its_state() -> None:
    spans = [torch.arange(6.0), torch.arange(4.0)]
    partition = Partition(spans, {}, [Piece("a", 0, 6, 0, 0), Piece("b", 0, 3, 1, 0)])
    whole = whole_tensors(alone(), partition, spans, {"a": torch.Size([2, 3]), "b": torch.Size([3])})
    assert whole["a"].tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    assert whole["b"].tolist() == [0.0, 1.0, 2.0]  # what follows is padding
    assert [tensor.data_ptr() for tensor in whole.values()] == [span.data_ptr() for span in spans]


def test_one_is_on_its_way_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, state = new_run(str(tmp_path / "run")), State(SIZE)
    gate, writer = Gate(run, monkeypatch), open_writer(run, state)
    state.train_to(64)
    writer.start(job(64))
    second = threading.Thread(target=writer.start, args=(job(128),))
    state.train_to(128)
    second.start()
    second.join(0.2)
    assert second.is_alive(), "it must wait for the first one"
    assert run.checkpoints() == []
    gate.open.set()
    second.join(60)
    writer.wait()
    assert writer.stalled_seconds >= 0.1
    for images in (64, 128):
        assert_holds(run, images)
    writer.close()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_several_ranks_write_their_parts_of_one_checkpoint(tmp_path: Path, world: int) -> None:
    run = new_run(str(tmp_path / "run"))

    def save(ranks: Ranks) -> None:
        state = State(SIZE, ranks.rank, ranks.world)
        writer = open_writer(run, state, ranks)
        for images in (64, 128):
            state.train_to(images)
            writer.start(job(images))
        writer.wait()
        writer.close()

    on_ranks(world, save)
    for images in (64, 128):
        assert_holds(run, images)
        paths = [entry.path for entry in run.manifest(draft(images).name).files if entry.role == "state"]
        assert paths == [f"state/rank-{rank:04d}.safetensors" for rank in range(world)]


class Outage:
    """Makes a storage fail as long as it is told to, and counts."""

    def __init__(self, run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
        self.failures, self.left = 0, 10**9
        stream = run.storage.stream

        def failing(path: str, fill: Any) -> None:
            if self.failures < self.left:
                self.failures += 1
                raise error
            stream(path, fill)

        monkeypatch.setattr(run.storage, "stream", failing)


def test_a_save_is_tried_again_until_the_store_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, state = new_run(str(tmp_path / "run")), State(SIZE)
    outage, writer = Outage(run, monkeypatch, StorageFault("away")), open_writer(run, state)
    outage.left = 5
    state.train_to(64)
    writer.start(job(64))
    writer.wait()
    assert outage.failures == 5
    assert writer.given_up == 0
    assert_holds(run, 64)
    writer.close()


def test_past_its_deadline_a_save_is_given_up_and_its_metrics_go_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, state = new_run(str(tmp_path / "run")), State(SIZE)
    outage = Outage(run, monkeypatch, StorageFault("away"))
    metrics = MetricsLog(run, 1, 0)
    writer = state.writer(run, alone(), metrics, deadline_minutes=0.001)
    for images in (64, 128):
        metrics.log(images, {"loss": float(images)})
        state.train_to(images)
        writer.start(job(images))
        assert writer._thread is not None
        writer._thread.join(60)
        assert not writer.has_failed, "training goes on"
        writer.wait()
        assert (writer.given_up, run.checkpoints()) == (1, []) if images == 64 else True
        outage.left = 0
    assert outage.failures > 0
    assert run.checkpoints() == [draft(128).name]
    assert_holds(run, 128)
    assert [row["loss"] for row in metric_rows(run, [1])] == [64.0, 128.0]
    writer.close()


def test_a_store_that_is_too_slow_is_given_up_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, state = new_run(str(tmp_path / "run")), State(SIZE)
    gate, writer = Gate(run, monkeypatch), open_writer(run, state, deadline_minutes=0.001)
    state.train_to(64)
    writer.start(job(64))
    assert gate.reached.wait(60)
    assert writer._thread is not None
    writer._thread.join(0.2)
    gate.open.set()  # it answers at last, past the deadline
    writer.wait()
    assert writer.given_up == 1
    assert run.checkpoints() == []
    writer.close()


@pytest.mark.parametrize("error", [StorageFault("away"), UserError("disk full"), KeyError("a bug")])
def test_what_one_rank_cannot_write_nobody_publishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    new_run(str(tmp_path / "run"))

    def save(ranks: Ranks) -> tuple[str, int]:
        run, state = Run(str(tmp_path / "run")), State(SIZE, ranks.rank, ranks.world)
        if ranks.rank == 1:
            Outage(run, monkeypatch, error)
        writer = open_writer(run, state, ranks, deadline_minutes=0.001)
        state.train_to(64)
        writer.start(job(64))
        raised = ""
        try:
            writer.wait()
        except (UserError, FollowedError, KeyError) as problem:
            raised = type(problem).__name__
        writer.close()
        return raised, writer.given_up

    found = on_ranks(2, save)
    is_forgiven = isinstance(error, StorageFault)
    theirs = [("FollowedError", 0), (type(error).__name__, 0)]
    assert found == ([("", 1), ("", 1)] if is_forgiven else theirs)
    assert Run(str(tmp_path / "run")).checkpoints() == []


def test_a_zombie_publishes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attempt that another has taken over from is still writing when the other publishes."""
    run, state = new_run(str(tmp_path / "run")), State(SIZE)
    gate, zombie = Gate(run, monkeypatch), open_writer(run, state)
    state.train_to(64)
    zombie.start(job(64))
    assert gate.reached.wait(60)
    other, theirs = Run(run.url), State(SIZE)
    assert other.claim_attempt(None, "elsewhere", tiny_recipe(), "").attempt == 2
    successor = open_writer(other, theirs)
    theirs.train_to(64)
    successor.start(job(64, attempt=2))
    successor.wait()
    gate.open.set()
    with pytest.raises(SupersededError, match="attempt 2 has taken the run over from attempt 1"):
        zombie.wait()
    assert run.checkpoints() == [draft(64, 2).name]
    assert_holds(run, 64, attempt=2)
    for writer in (zombie, successor):
        writer.close()


@pytest.fixture
def proxy(s3_server: S3Server) -> Iterator[FaultProxy]:
    with FaultProxy(os.environ["AWS_ENDPOINT_URL"]) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        S3FileSystem.clear_instance_cache()
        yield proxy
    S3FileSystem.clear_instance_cache()


def test_an_outage_of_the_object_store_during_a_save(proxy: FaultProxy, s3_prefix: str) -> None:
    """It begins while a part is on its way: the save goes on when it is over, or is given up."""
    run, state = new_run(f"{s3_prefix}/run", give_up_after=0.5), State(5_000_000)
    writer = open_writer(run, state, deadline_minutes=5)
    seen: list[Request] = []

    def from_the_second_piece_on(request: Request) -> Fault | None:
        is_piece = "checkpoints" in request.path and request.method == "PUT"
        seen.extend([request] if seen or is_piece else [])
        return Fault.UNAVAILABLE if 2 <= len(seen) < 10 else None

    proxy.plan = from_the_second_piece_on
    state.train_to(64)
    writer.start(job(64))
    writer.wait()
    assert proxy.counters().faults[Fault.UNAVAILABLE] == 8
    assert run.checkpoints() == [draft(64).name]
    verify(run, run.manifest(draft(64).name))

    proxy.plan = lambda request: Fault.UNAVAILABLE if request.method in ("PUT", "POST") else None
    state.train_to(128)
    writer.close()
    writer = open_writer(run, state, deadline_minutes=0.01)
    writer.start(job(128))
    writer.wait()
    assert writer.given_up == 1
    proxy.plan = None
    assert run.checkpoints() == [draft(64).name], "never half-published"
    writer.close()
    writer = open_writer(run, state)
    writer.start(job(192))
    writer.wait()
    assert run.checkpoints() == [draft(64).name, draft(192).name]
    writer.close()


def kill_writers(url: str, *arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.trainer.killed_writer", url, *arguments],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    print(json.dumps(found["during"], indent=2))
    wrong = [trial for trial in found["trials"] if not trial["is_right"]]
    assert wrong == [], "the newest published checkpoint must be restored, whole"
    return found


@pytest.mark.parametrize("place", ["disk", pytest.param("s3", marks=pytest.mark.slow)])
def test_killed_before_and_after_every_storage_operation(
    tmp_path: Path, request: pytest.FixtureRequest, place: str
) -> None:
    url = str(tmp_path) if place == "disk" else request.getfixturevalue("s3_prefix")
    found = kill_writers(f"{url}/run", "operations")
    assert len(found["trials"]) > 20
    assert {"rank-0000.safetensors", "weights.safetensors", "manifest.json"} < set(found["during"])
    assert any(trial["is_published"] for trial in found["trials"])
    assert newest_loadable(Run(f"{url}/run")) == Run(f"{url}/run").live_checkpoints()[-1]


@pytest.mark.parametrize(
    ("place", "count"),
    [
        ("disk", 20),
        *(
            pytest.param(place, 300, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])
            for place in ("disk", "s3")
        ),
    ],
)
def test_killed_at_random_moments(
    tmp_path: Path, request: pytest.FixtureRequest, place: str, count: int
) -> None:
    url = str(tmp_path) if place == "disk" else request.getfixturevalue("s3_prefix")
    found = kill_writers(f"{url}/run", "random", str(count), "20261124")
    assert len(found["trials"]) == count
    between = sum(trial["is_between"] for trial in found["trials"])
    assert between >= (0.9 if count == 300 else 0.5) * count
