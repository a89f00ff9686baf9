"""The delivered sequence: one and the same for any ranks, threads, resizes, kills and faults."""

import hashlib
import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from s3fs import S3FileSystem

from data_pipeline import ImageStream
from data_pipeline.storage import Storage
from launch.s3server import S3Server
from tests.fault_plan import Fault, random_faults
from tests.fault_proxy import FaultProxy

BATCH = 90  # divided by 1, 2, 3, 5 and 6 ranks, not by 4, 7 and 8
BATCHES = 24  # 2160 positions: the second epoch is entered


@dataclass(frozen=True)
class Phase:
    """So many global batches, delivered by `world` ranks of `threads` decoding threads each."""

    world: int
    threads: int
    batches: int


def open_stream(url: str, phase: Phase, rank: int, **options: Any) -> ImageStream:
    # By default less than a window is held, so that windows come in parts.
    options = {"prefetch_bytes": 20_000, "requests": 2, **options}
    return ImageStream(
        url,
        seed=11,
        global_batch=BATCH,
        rank=rank,
        world=phase.world,
        window_shards=3,
        threads=phase.threads,
        **options,
    )


def lines(stream: ImageStream, batches: int) -> Iterator[list[str]]:
    """For each batch one line per picture: its position and the hash of its pixels."""
    for _ in range(batches):
        batch = next(stream)
        yield [
            f"{position} {hashlib.sha256(image).hexdigest()}"
            for position, image in zip(batch.positions.tolist(), batch.images, strict=True)
        ]


def deliver(url: str, phases: Sequence[Phase]) -> list[str]:
    """The lines of all ranks of all phases, each phase continued from the state of any rank of the last."""
    delivered: list[str] = []
    state = None
    for phase in phases:
        with ExitStack() as stack:
            ranks = [stack.enter_context(open_stream(url, phase, rank)) for rank in range(phase.world)]
            if state is not None:
                for stream in ranks:
                    stream.load_state_dict(state)
            for parts in zip(*(lines(stream, phase.batches) for stream in ranks), strict=True):
                delivered += [line for part in parts for line in part]
            state = json.loads(json.dumps(ranks[-1].state_dict()))
    return delivered


def sha256(delivered: list[str]) -> str:
    return hashlib.sha256("\n".join(delivered).encode()).hexdigest()


@cache
def expected(url: str) -> list[str]:
    return deliver(url, [Phase(1, 2, BATCHES)])


def schedules(count: int) -> list[list[Phase]]:
    """Schedules of three resizes; the first is 7 -> 3, the next begin with every world and thread count."""
    draw = random.Random(5)
    chosen = [[Phase(7, 1, 6), Phase(3, 2, 6), Phase(8, 0, 6), Phase(1, 4, 6)]]
    for number in range(count - 1):
        cuts = sorted(draw.sample(range(1, BATCHES), 3))
        sizes = np.diff([0, *cuts, BATCHES]).tolist()
        first = Phase(number % 8 + 1, number // 8 % 5, sizes[0])
        rest = [Phase(draw.randint(1, 8), draw.randint(0, 4), size) for size in sizes[1:]]
        chosen.append([first, *rest])
    return chosen


def check_schedules(url: str, count: int) -> None:
    wanted = sha256(expected(url))
    for phases in schedules(count):
        assert sha256(deliver(url, phases)) == wanted, phases


def test_one_sequence_for_any_ranks_threads_and_resizes(digits_url: str) -> None:
    check_schedules(digits_url, 24)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_one_sequence_in_220_cases(digits_url: str) -> None:
    check_schedules(digits_url, 220)


RANK = """
import json, sys
from data_pipeline import ImageStream
from tests.data_pipeline.test_exact_sequence import Phase, lines, open_stream
url, rank, phases = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
done = 0
for numbers in phases:
    phase = Phase(*numbers)
    if rank < phase.world:
        with open_stream(url, phase, rank, position=90 * done) as stream:
            for number, part in enumerate(lines(stream, phase.batches)):
                print(json.dumps([done + number, rank, part]))
    done += phase.batches
"""


def deliver_by_processes(url: str, phases: Sequence[Phase]) -> list[str]:
    """As `deliver`, every rank in a process of its own."""
    numbers = json.dumps([[phase.world, phase.threads, phase.batches] for phase in phases])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, url, str(rank), numbers],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        for rank in range(max(phase.world for phase in phases))
    ]
    parts = [json.loads(line) for rank in ranks for line in rank.communicate()[0].splitlines()]
    assert [rank.returncode for rank in ranks] == [0] * len(ranks)
    return [line for _, _, part in sorted(parts, key=lambda part: part[:2]) for line in part]


def check_processes(url: str, count: int) -> None:
    wanted = sha256(expected(url))
    draw = random.Random(8)
    for number in range(count):
        worlds = [7, 3] if number == 1 else [draw.randint(1, 4) for _ in range(4)]
        phases = [Phase(world, draw.randint(0, 4), BATCHES // len(worlds)) for world in worlds]
        assert sha256(deliver_by_processes(url, phases)) == wanted, phases


def test_ranks_in_processes_of_their_own_deliver_it_too(digits_url: str) -> None:
    check_processes(digits_url, 1)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ranks_in_processes_in_30_cases(digits_url: str) -> None:
    check_processes(digits_url, 30)


def chaos(proxy: FaultProxy, url: str, wanted: list[str], seed: int) -> Counter[Fault]:
    """One random schedule of kills, resizes and faults over an epoch and a half; nothing twice or lost.

    What a run has done since its last checkpoint is lost with a kill, and done again from there.
    """
    draw = random.Random(seed)
    proxy.reset_counters()
    proxy.plan = random_faults(seed, 0.1, FAST)
    kept: list[str] = []
    position = 0
    while len(kept) < len(wanted):
        left = (len(wanted) - len(kept)) // BATCH
        phase = Phase(draw.randint(1, 4), draw.randint(0, 3), draw.randint(1, left))
        saved = draw.choice([phase.batches, draw.randint(0, phase.batches)])  # a clean stop, or a kill
        with ExitStack() as stack:
            ranks = [
                stack.enter_context(open_stream(url, phase, rank, position=position, **WHOLE_WINDOWS))
                for rank in range(phase.world)
            ]
            for number, parts in enumerate(
                zip(*(lines(stream, phase.batches) for stream in ranks), strict=True)
            ):
                if number < saved:
                    kept += [line for part in parts for line in part]
                    position = ranks[0].position
    assert kept == wanted
    epoch = [line.split()[1] for line in kept[:EPOCH]]
    assert len(kept) >= EPOCH
    assert Counter(epoch) == Counter(line.split()[1] for line in wanted[:EPOCH])
    return proxy.counters().faults


WHOLE_WINDOWS = {"prefetch_bytes": 400_000, "requests": 8}
FAST = tuple(kind for kind in Fault if kind is not Fault.STALL)
EPOCH = 1441


@pytest.fixture(scope="module")
def proxied(
    s3_server: S3Server, digits_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[FaultProxy, str]]:
    """A proxy before the S3 server, and the digits' URL there; the environment points at the proxy."""
    url = f"{s3_server.url}/exact-{os.getpid()}"
    storage = Storage(url)
    for file in Path(digits_url).iterdir():
        storage.upload(file.name, file)
    with FaultProxy(os.environ["AWS_ENDPOINT_URL"]) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        S3FileSystem.clear_instance_cache()  # of clients that know the server itself
        yield proxy, url
    S3FileSystem.clear_instance_cache()


def check_chaos(proxied: tuple[FaultProxy, str], digits_url: str, count: int, first: int = 0) -> None:
    wanted = expected(digits_url)
    faults: Counter[Fault] = Counter()
    for seed in range(first, first + count):
        faults += chaos(*proxied, wanted, seed)
    assert set(faults) == set(FAST), "every kind of fault happened"
    assert faults.total() > count


def test_exactly_once_through_kills_resizes_and_faults(
    proxied: tuple[FaultProxy, str], digits_url: str
) -> None:
    check_chaos(proxied, digits_url, 2)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("first", range(0, 500, 125))
def test_exactly_once_in_500_schedules(proxied: tuple[FaultProxy, str], digits_url: str, first: int) -> None:
    check_chaos(proxied, digits_url, 125, first)
