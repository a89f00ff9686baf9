"""One epoch from S3 into batches: ours, the decoder alone, and the peers, in turns."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from benchmarks.data_build.running import Rate
from benchmarks.data_stream.bars import beside_decoding_bar, speed_bars
from benchmarks.data_stream.contenders import (
    CONTENDERS,
    DECODE_ONLY,
    FOLDER,
    LITDATA,
    MOSAIC,
    OURS,
    STOCK,
    WITH_OUR_DECODER,
)
from benchmarks.data_stream.job import Job
from benchmarks.data_stream.process import ContenderProcess
from benchmarks.data_stream.site import Site
from benchmarks.harness import SAMPLES_HEADER, Load, Record, take_turns, tree_seconds
from benchmarks.report import Bar, table
from data_pipeline.storage_backend import StorageBackend

TARGETS: Final = {DECODE_ONLY: 0.85, STOCK: 1.4, WITH_OUR_DECODER: 1.1, MOSAIC: 1.2}
"""Least ratio of their seconds to ours."""
BESIDE_DECODING_TARGET: Final = 3.0
RATE_HEADER: Final = ("contender", "img/s", *SAMPLES_HEADER, "CPU us/img")
_WORKERS: Final = {MOSAIC: 2, FOLDER: 2, LITDATA: 0}
"""LitData 0.2.76 delivers 200 pictures per second through two workers here, and 3900 without."""
_TRIED_WORKERS: Final = (0, 1, 2)
_TRIALS: Final = 2
_PROCESSES: Final = 3


class PeerRecord(Record):
    """Who was measured.

    Attributes:
        name: In tables and bars.
        version: Of the distribution.
        source: Where its configuration is documented.
        workers: Processes of its loader.
    """

    name: str
    version: str
    source: str
    workers: int


class Trial(Record):
    """A number of workers that was tried.

    Attributes:
        contender: Whose.
        workers: How many.
        wall: Wall seconds of an epoch, the best of two.
        cpu: Processor seconds of it.
    """

    contender: str
    workers: int
    wall: float
    cpu: float


@dataclass
class Speed:
    """What was measured."""

    checks: list[str] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)
    peers: list[PeerRecord] = field(default_factory=list)
    rates: dict[str, Rate] = field(default_factory=dict)
    loads: list[Load] = field(default_factory=list)

    def bars(self) -> list[Bar]:
        """Judge; nothing if nothing was measured."""
        if not self.rates:
            return []
        ours, decode = self.rates[OURS], self.rates[DECODE_ONLY]
        found = [
            bar
            for name, target in TARGETS.items()
            for bar in speed_bars(f"stream-{name}", target, ours, self._of(name))
        ]
        with_ours = min(self._of(WITH_OUR_DECODER), key=lambda rate: rate.median_cpu)
        beside = "stream-beside-decoding-cpu"
        return [*found, beside_decoding_bar(beside, BESIDE_DECODING_TARGET, decode, ours, with_ours)]

    def _of(self, name: str) -> list[Rate]:
        """One contender's samples, in each of its configurations."""
        return [rate for rate in self.rates.values() if rate.name.partition(",")[0] == name]


def measure_speed(site: Site, repeats: int) -> Speed:
    """Check that everyone delivers the same pictures, then time an epoch of each.

    Raises:
        ValueError: Somebody delivers other pictures; then nothing is timed.
    """
    found = Speed()
    with ExitStack() as stack:
        processes = {name: stack.enter_context(site.start(job)) for name, job in _jobs(site).items()}
        for name in (STOCK, WITH_OUR_DECODER):
            processes |= _best_workers(site, name, stack, found.trials)
        for process in processes.values():
            _note_peer(process, found.peers)
        found.checks.append(_check(site, processes))
        measures = [
            partial(_epoch, _asking(site, name, process), process.job) for name, process in processes.items()
        ]
        samples, load = take_turns(measures, repeats, own=tree_seconds)
    found.loads.append(load)
    found.rates = {
        name: Rate(name=name, pictures=site.data.pictures, wall=each.wall, cpu=each.cpu)
        for name, each in zip(processes, samples, strict=True)
    }
    print(table(RATE_HEADER, [rate.row() for rate in found.rates.values()]))
    return found


def _jobs(site: Site) -> dict[str, Job]:
    """Everyone but those whose number of workers is tried first, by name in the table."""
    local = str(site.data.local)
    jobs = {
        DECODE_ONLY: site.job(DECODE_ONLY, url=local),
        OURS: site.job(OURS),
        f"{OURS}, s3fs": site.job(OURS, backend=StorageBackend.S3FS),
        f"{OURS}, local folder": site.job(OURS, url=local),
    }
    for name in (MOSAIC, LITDATA, FOLDER):
        if name not in site.missing:
            jobs[name] = site.job(name, workers=_WORKERS[name])
    return jobs


def _best_workers(
    site: Site, name: str, stack: ExitStack, trials: list[Trial]
) -> dict[str, ContenderProcess]:
    """Try numbers of workers; return processes, by name, for the fastest and for the cheapest of them."""
    tried = []
    for workers in _TRIED_WORKERS:
        with site.start(site.job(name, workers=workers)) as process:
            wall, cpu = min(_epoch(process.ask, process.job) for _ in range(_TRIALS))
        print(f"{name} with {workers} workers: {wall:.3f} s, {cpu:.3f} CPU s")
        tried.append(Trial(contender=name, workers=workers, wall=wall, cpu=cpu))
    trials += tried
    fastest = min(tried, key=lambda trial: trial.wall)
    cheapest = min(tried, key=lambda trial: trial.cpu)
    return {
        f"{name}, {workers} workers": stack.enter_context(site.start(site.job(name, workers=workers)))
        for workers in sorted({fastest.workers, cheapest.workers})
    }


def _note_peer(process: ContenderProcess, peers: list[PeerRecord]) -> None:
    peer = CONTENDERS[process.job.contender].peer
    version = process.ask("version")
    if peer is not None:
        record = PeerRecord(
            name=process.job.contender, version=version, source=peer.source, workers=process.job.workers
        )
        peers.append(record)
        print(f"{record.name}: {peer.distribution} {version}, {record.workers} workers ({peer.source})")


def _check(site: Site, processes: Mapping[str, ContenderProcess]) -> str:
    """Compare what everyone delivers: the SHA-256 of all pictures' pixels, each in its own order.

    Raises:
        ValueError: Not the same pictures.
    """
    pictures = site.data.pictures
    expected = sorted(processes[DECODE_ONLY].ask("digests"))
    for name, process in processes.items():
        digests = _asking(site, name, process)("digests")
        if sorted(digests) != expected or len(expected) != pictures:
            raise ValueError(f"{name} delivers other pictures than the decoder alone: nothing was timed")
    in_order = processes[OURS].ask("digests") == processes[DECODE_ONLY].ask("digests")
    if not in_order:
        raise ValueError("decode-only has another order than ours: nothing was timed")
    line = f"check: {', '.join(processes)} deliver the same {pictures:,} pictures (SHA-256 of pixels)"
    print(line)
    return line


def _asking(site: Site, name: str, process: ContenderProcess) -> Callable[[str], Any]:
    """Return whom to ask: the contender's process, or for MosaicML a new one each time."""
    return partial(_ask_anew, site, process.job) if name == MOSAIC else process.ask


def _ask_anew(site: Site, job: Job, do: str) -> Any:
    """Ask a process of its own, and another one if that fails: for a peer that at times reads no picture.

    Raises:
        ChildProcessError: All of them failed.
    """
    for _ in range(_PROCESSES - 1):
        try:
            with site.start(job) as process:
                return process.ask(do)
        except ChildProcessError as error:
            print(f"{job.contender} failed and is tried again: {error}")
    with site.start(job) as process:
        return process.ask(do)


def _epoch(ask: Callable[[str], Any], job: Job) -> tuple[float, float]:
    """Time one epoch."""
    answer = ask("epoch")
    assert answer["pictures"] >= job.pictures, "an epoch has all pictures"
    return answer["wall"], answer["cpu"]
