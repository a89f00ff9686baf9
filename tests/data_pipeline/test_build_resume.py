"""A build that is killed anywhere goes on where it was, and ends with the same bytes."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.build import BuildOptions, Grain, build, find_built
from data_pipeline.build.journal import Journal, Unfinished
from data_pipeline.encoding import Encoding
from data_pipeline.errors import StorageFault, UserError
from data_pipeline.sources import Item, Place
from data_pipeline.sources.arrays import ArraySource
from data_pipeline.storage import Storage
from data_pipeline.team import Team

COUNT = 640
GRAIN = Grain(run=64, segment=1)
OPTIONS = BuildOptions(val_fraction=0.1, shard_bytes=51_200, max_rejected=0.5)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("arrays") / "pictures.npy"
    arrays = np.random.default_rng(3).integers(0, 256, (COUNT, 8, 8), dtype=np.uint8)
    arrays[400] = arrays[20]  # duplicates far apart: a build that goes on must remember the first
    np.save(path, arrays)
    return path


@pytest.fixture(scope="module")
def clean(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The outcome of a build that nobody disturbed."""
    out = tmp_path_factory.mktemp("clean")
    index = build(ArraySource(pictures), str(out), OPTIONS, grain=GRAIN)
    assert index.duplicates == 1
    assert len(index.splits["train"]) > 6
    assert len(index.splits["val"]) > 1
    return contents(out)


def build_in_child(pictures: Path, out: Path, die_after: float) -> int:
    """Build in a forked process that the kernel kills at some moment; return how it ended."""
    child = os.fork()
    if child == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, die_after)  # nothing in Python sees it come
            build(ArraySource(pictures), str(out), OPTIONS, grain=GRAIN)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return status


def test_killed_at_100_random_moments(
    pictures: Path, clean: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    began = time.perf_counter()
    build(ArraySource(pictures), str(tmp_path / "timed"), OPTIONS, grain=GRAIN)
    whole = time.perf_counter() - began
    moments, kills, finished, went_on = random.Random(7), 0, 0, 0
    while kills < 100:
        out = tmp_path / f"out-{finished}"
        status = build_in_child(pictures, out, moments.uniform(0.0, 0.7 * whole) + 1e-4)
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGALRM
            kills += 1
            went_on += any(out.glob("unfinished-shard-*"))
        else:
            assert contents(out) == clean
            finished += 1
    build(ArraySource(pictures), str(out), OPTIONS, grain=GRAIN)
    assert contents(out) == clean
    assert went_on > 20, "many kills left finished shards to go on from"


class Failing(ArraySource):
    """Its later pictures cannot be reached."""

    def read(self, first: int, places: Sequence[Place]) -> Iterator[Item]:
        if first >= 448:
            raise StorageFault("the source went away")
        return super().read(first, places)


def break_off(pictures: Path, out: str) -> None:
    with pytest.raises(StorageFault, match="went away"):
        build(Failing(pictures), out, OPTIONS, grain=GRAIN)


def test_what_was_finished_is_not_written_again(
    pictures: Path, clean: dict[str, bytes], tmp_path: Path
) -> None:
    break_off(pictures, str(tmp_path))
    recorded = {file.name for file in tmp_path.glob("unfinished-shard-*.json")}
    assert len(recorded) >= 3
    kept = {
        file: file.stat().st_mtime_ns
        for file in tmp_path.glob("shard-*")
        if f"unfinished-{file.stem}.json" in recorded
    }
    build(ArraySource(pictures), str(tmp_path), OPTIONS, grain=GRAIN)
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    assert contents(tmp_path) == clean


@pytest.mark.parametrize("kind", ["items", "shard"])
@pytest.mark.parametrize("damage", [b"", b"{", b'{"schema": "build-items/9"}', None])
def test_damaged_records_cost_work_but_no_truth(
    pictures: Path, clean: dict[str, bytes], tmp_path: Path, kind: str, damage: bytes | None
) -> None:
    break_off(pictures, str(tmp_path))
    record = sorted(tmp_path.glob(f"unfinished-{kind}-*"))[1]
    if damage is None:
        record.unlink()
    else:
        record.write_bytes(damage)
    build(ArraySource(pictures), str(tmp_path), OPTIONS, grain=GRAIN)
    assert contents(tmp_path) == clean


def test_ctrl_c_records_what_is_done(pictures: Path, clean: dict[str, bytes], tmp_path: Path) -> None:
    """Pictures of a segment that is not full, and the shards that lie there, are not done again."""

    class Interrupted(ArraySource):
        def read(self, first: int, places: Sequence[Place]) -> Iterator[Item]:
            if first >= 448:
                raise KeyboardInterrupt
            return super().read(first, places)

    wide = Grain(run=64, segment=100)
    with pytest.raises(KeyboardInterrupt):
        build(Interrupted(pictures), str(tmp_path), OPTIONS, grain=wide)
    recorded = [
        f"{file.stem.removeprefix('unfinished-')}.tar" for file in tmp_path.glob("unfinished-shard-*")
    ]
    assert sorted(recorded) == sorted(file.name for file in tmp_path.glob("shard-*.tar"))
    assert len(recorded) >= 3
    build(ArraySource(pictures), str(tmp_path), OPTIONS, grain=wide)
    assert contents(tmp_path) == clean


def test_shards_protect_the_place_before_they_are_recorded(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageFault):
        build(Failing(pictures), str(tmp_path), OPTIONS, grain=Grain(run=64, segment=100))
    assert list(tmp_path.glob("shard-*"))
    assert not list(tmp_path.glob("unfinished-*"))
    with pytest.raises(UserError, match=r"differs in encoding.*; .*--start-over"):
        build(ArraySource(pictures), str(tmp_path), replace(OPTIONS, encoding=Encoding.SOURCE), grain=GRAIN)


@pytest.mark.parametrize("suffix", ["tar", "idx"])
def test_a_shard_that_is_gone_is_written_again(
    pictures: Path, clean: dict[str, bytes], tmp_path: Path, suffix: str
) -> None:
    break_off(pictures, str(tmp_path))
    record = sorted(tmp_path.glob("unfinished-shard-*"))[1]
    (tmp_path / f"{record.stem.removeprefix('unfinished-')}.{suffix}").unlink()
    build(ArraySource(pictures), str(tmp_path), OPTIONS, grain=GRAIN)
    assert contents(tmp_path) == clean


def test_killed_between_the_index_and_the_end(
    pictures: Path, clean: dict[str, bytes], tmp_path: Path
) -> None:
    break_off(pictures, str(tmp_path))
    left = {file.name: file.read_bytes() for file in tmp_path.glob("unfinished*")}
    build(ArraySource(pictures), str(tmp_path), OPTIONS, grain=GRAIN)
    for name, data in left.items():
        (tmp_path / name).write_bytes(data)
    assert find_built(ArraySource(pictures), str(tmp_path), OPTIONS) is not None
    assert contents(tmp_path) == clean


def test_records_of_another_build_are_not_believed(
    pictures: Path, clean: dict[str, bytes], tmp_path: Path
) -> None:
    """As one leaves that lost its place and did not notice at once."""
    other, out = tmp_path / "other.npy", tmp_path / "out"
    np.save(other, np.load(pictures)[::-1])
    break_off(other, str(tmp_path / "theirs"))
    break_off(pictures, str(out))
    for name in ("items", "shard"):
        mine, theirs = (sorted(f.glob(f"unfinished-{name}-*")) for f in (out, tmp_path / "theirs"))
        assert {file.name for file in mine} & {file.name for file in theirs}
        for file in theirs:
            (out / file.name).write_bytes(file.read_bytes())
    build(ArraySource(pictures), str(out), OPTIONS, grain=GRAIN)
    assert contents(out) == clean


def test_what_a_killed_write_leaves_is_swept(pictures: Path, clean: dict[str, bytes], tmp_path: Path) -> None:
    break_off(pictures, str(tmp_path))
    (tmp_path / ".tmp-0123").write_bytes(b"half")
    build(ArraySource(pictures), str(tmp_path), OPTIONS, grain=GRAIN)
    assert contents(tmp_path) == clean


def test_a_source_that_changes_meanwhile_is_noticed(pictures: Path, tmp_path: Path) -> None:
    source = tmp_path / "pictures.npy"
    source.write_bytes(pictures.read_bytes())

    class Touched(ArraySource):
        def read(self, first: int, places: Sequence[Place]) -> Iterator[Item]:
            os.utime(source, ns=(1, 1))
            return super().read(first, places)

    with pytest.raises(UserError, match=r"changed while it was read; .*--start-over"):
        build(Touched(source), str(tmp_path / "out"), OPTIONS, grain=GRAIN)
    assert not (tmp_path / "out" / "index.json").exists()


def test_one_that_finished_meanwhile_is_not_overwritten(
    pictures: Path, clean: dict[str, bytes], tmp_path: Path
) -> None:
    build(ArraySource(pictures), str(tmp_path), OPTIONS, grain=GRAIN)
    journal = Journal(Storage(str(tmp_path)))
    late = Unfinished(name="late", kind="npz", plan={}, stamp="")
    with pytest.raises(UserError, match="another build finished here first"):
        journal.claim(late, start_over=False)
    assert contents(tmp_path) == clean


COMMAND = """
import sys
from data_pipeline.build import BuildOptions, Grain, build
from data_pipeline.sources.arrays import ArraySource

if __name__ == "__main__":
    options = BuildOptions(val_fraction=0.1, shard_bytes=51_200, max_rejected=0.5)
    build(ArraySource(sys.argv[1]), sys.argv[2], options, workers=2, grain=Grain(run=64, segment=1))
"""


def test_killed_with_its_processes(pictures: Path, clean: dict[str, bytes], tmp_path: Path) -> None:
    """SIGKILL of the first process ends the others too; the next run goes on."""
    script, out = tmp_path / "script.py", tmp_path / "out"
    script.write_text(COMMAND)
    command = [sys.executable, str(script), str(pictures), str(out)]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    for shards in (1, 4):
        process = subprocess.Popen(
            command, env=environment, stderr=subprocess.DEVNULL, start_new_session=True
        )
        while len(list(out.glob("unfinished-shard-*"))) < shards:
            assert process.poll() is None, "it is killed before it can finish"
        process.kill()
        assert process.wait() == -signal.SIGKILL
        deadline = time.monotonic() + 20
        while _alive(process.pid):
            assert time.monotonic() < deadline, "its processes outlive it"
    subprocess.run(command, env=environment, check=True, stderr=subprocess.DEVNULL)
    assert contents(out) == clean


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_process_that_dies_is_named() -> None:
    died = r"a worker process died \(signal SIGKILL\).*fewer --workers"
    with Team(dict, 2) as team, pytest.raises(StorageFault, match=died):  # type: ignore[var-annotated]
        team.start(_kill_oneself).result()
    with Team(dict, 2) as team:
        idle = team.start(_process).result()
        os.kill(idle, signal.SIGKILL)
        with pytest.raises(StorageFault, match=died):
            [team.start(_process) for _ in range(4)][-1].result()


def _process(worker: object) -> int:
    return os.getpid()


def _kill_oneself(worker: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_same_on_s3(pictures: Path, clean: dict[str, bytes], s3_prefix: str) -> None:
    break_off(pictures, s3_prefix)
    storage = Storage(s3_prefix)
    assert any(name.startswith("unfinished-shard-") for name in storage.list())
    build(ArraySource(pictures), s3_prefix, OPTIONS, grain=GRAIN)
    assert {name: storage.read(name) for name in storage.list()} == clean
