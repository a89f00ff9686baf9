"""Timing of contenders that take turns in one process, with what else the machine was doing meanwhile."""

import contextlib
import gc
import os
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

import psutil
import torch
from pydantic import BaseModel, ConfigDict

OURS = "ours"
"""The contender that every other one is compared with."""
MIN_REPEATS = 5
"""Fewer samples than these decide no bar."""
BUSY_SHARE = 0.05
"""The machine counts as busy if others used more than this share of its processor time."""


class Precision(StrEnum):
    """Precision of the network's arithmetic."""

    FP32 = "fp32"
    BF16 = "bf16"

    @property
    def dtype(self) -> torch.dtype:
        """PyTorch's name for it."""
        return torch.float32 if self is Precision.FP32 else torch.bfloat16


class Mode(StrEnum):
    """How the network runs."""

    EAGER = "eager"
    COMPILED = "compiled"  # torch.compile of the whole network
    BLOCKS = "blocks"  # torch.compile of each block: `trainer.unet.compile_blocks`, so only ours


class Layout(StrEnum):
    """Order in memory of the weights and of the images given."""

    CONTIGUOUS = "contiguous"
    CHANNELS_LAST = "channels_last"

    @property
    def memory_format(self) -> torch.memory_format:
        """PyTorch's name for it."""
        return torch.contiguous_format if self is Layout.CONTIGUOUS else torch.channels_last


class Record(BaseModel):
    """Base of everything that is written to the JSON file."""

    model_config = ConfigDict(frozen=True)


class Label(Record):
    """Which contender, and how it runs.

    Attributes:
        contender: `OURS` or the peer's name.
        precision: Precision of the network's arithmetic.
        mode: How the network runs.
        layout: Order in memory of its weights and of the images it is given.
        batch: Images per call.
    """

    contender: str
    precision: Precision
    mode: Mode
    layout: Layout = Layout.CONTIGUOUS
    batch: int

    def __str__(self) -> str:
        layout = "" if self.layout is Layout.CONTIGUOUS else f" {self.layout}"
        return f"{self.contender} {self.precision} {self.mode}{layout} b{self.batch}"


class Samples(Record):
    """The raw samples of one contender.

    Attributes:
        wall: Wall seconds of each timed call.
        cpu: Processor seconds of each timed call, all threads.
    """

    wall: list[float]
    cpu: list[float]

    @property
    def median(self) -> float:
        """Median wall seconds."""
        return statistics.median(self.wall)

    @property
    def median_cpu(self) -> float:
        """Median processor seconds."""
        return statistics.median(self.cpu)

    def cells(self) -> tuple[str, str, str]:
        """The cells of `SAMPLES_HEADER`."""
        return f"{self.median:.3f}", f"{min(self.wall):.3f}–{max(self.wall):.3f}", f"{self.median_cpu:.3f}"


SAMPLES_HEADER = ("median s", "spread s", "CPU s")
"""Columns of `Samples.cells`."""


class Timing(Samples):
    """The samples of a contender that runs a network.

    Attributes:
        label: Which one.
        warm_up_seconds: Wall seconds of its untimed first calls, compilation included.
    """

    label: Label
    warm_up_seconds: float

    def row(self) -> tuple[str, ...]:
        """The cells of `TIMING_HEADER`."""
        return str(self.label), *self.cells(), f"{self.warm_up_seconds:.1f}"


TIMING_HEADER = ("contender", *SAMPLES_HEADER, "warm-up s")
"""Columns of `Timing.row`."""


@dataclass(frozen=True)
class Contender:
    """Something to be timed.

    Attributes:
        label: What it is called.
        run: One call; all of its work is done when it returns.
        accept: Looks at what the last untimed call returned and raises if it is not right.
    """

    label: Label
    run: Callable[[], object]
    accept: Callable[[object], None] = lambda answer: None

    def warm_up(self) -> float:
        """Make the untimed calls; return their wall seconds, compilation included."""
        start = time.perf_counter()
        answer = self.run()
        if self.label.mode is not Mode.EAGER:
            answer = self.run()  # the first one compiled
        seconds = time.perf_counter() - start
        self.accept(answer)
        return seconds


class Load(Record):
    """What else the machine did during the timed calls.

    Attributes:
        before: Load average over one minute at the start.
        after: The same at the end.
        others: Processors that other processes (and the hypervisor) used on average.
        processors: Processors there are.
    """

    before: float
    after: float
    others: float
    processors: int

    @property
    def busy(self) -> bool:
        """Whether the samples are to be read with suspicion."""
        return self.others > BUSY_SHARE * self.processors

    def note(self) -> str:
        """One line for the reader."""
        verdict = "the machine was BUSY" if self.busy else "the machine was idle but for this"
        return (
            f"{verdict}: others used {self.others:.2f} of {self.processors} processors; "
            f"load average {self.before:.2f} before, {self.after:.2f} after"
        )


Meter = Callable[[], float]
"""Tells processor seconds used so far: `time.process_time`, or `tree_seconds`."""


def tree_seconds() -> float:
    """Processor seconds of this process and of all that it started, ended or not."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = time.process_time() + ended.ru_utime + ended.ru_stime
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            seconds += sum(process.cpu_times()[:4])  # its own, and of those that it waited for
    return seconds


class LoadMeter:
    """Watches the machine between its construction and `read`.

    Args:
        own: What counts as this program's own work, not others'.
    """

    def __init__(self, own: Meter = time.process_time) -> None:
        self._before, self._meter = os.getloadavg()[0], own
        self._wall, self._own, self._all = time.perf_counter(), own(), _busy_seconds()

    def read(self) -> Load:
        """Return the load since the construction."""
        wall = time.perf_counter() - self._wall
        others = _busy_seconds() - self._all - (self._meter() - self._own)
        return Load(
            before=self._before,
            after=os.getloadavg()[0],
            others=max(0.0, others / wall),
            processors=os.cpu_count() or 1,
        )


def _busy_seconds() -> float:
    """Processor seconds that anyone used, the hypervisor's other guests included."""
    times = psutil.cpu_times()
    # Guests' time is contained in the user's.
    idle = {"idle", "iowait", "guest", "guest_nice"}
    return float(sum(value for name, value in times._asdict().items() if name not in idle))


class Measurement(Record):
    """The outcome of `interleave`.

    Attributes:
        timings: One per contender, in the order given.
        load: The machine during the timed calls.
    """

    timings: list[Timing]
    load: Load


def interleave(
    contenders: Sequence[Contender], repeats: int, say: Callable[[str], None] = print
) -> Measurement:
    """Warm the contenders up, then time them in turns.

    Args:
        contenders: Whom to time.
        repeats: Rounds, at least 1.
        say: Told of the progress.

    Raises:
        ValueError: If repeats is less than 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    warm_ups = []
    for contender in contenders:
        warm_ups.append(contender.warm_up())
        say(f"warmed up {contender.label} in {warm_ups[-1]:.1f} s")
    samples, load = take_turns([partial(timed, contender.run) for contender in contenders], repeats, say)
    timings = [
        Timing(label=contender.label, warm_up_seconds=warm, wall=each.wall, cpu=each.cpu)
        for contender, warm, each in zip(contenders, warm_ups, samples, strict=True)
    ]
    return Measurement(timings=timings, load=load)


Measure = Callable[[], tuple[float, float]]
"""Makes one call; returns its wall and processor seconds."""


def take_turns(
    measures: Sequence[Measure],
    repeats: int,
    say: Callable[[str], None] = print,
    own: Meter = time.process_time,
) -> tuple[list[Samples], Load]:
    """Measure in turns, so that a drift of the machine meets everyone.

    Each round calls everyone once and starts one place further on, so that none always follows the same
    other one.

    Args:
        measures: One per contender.
        repeats: Rounds.
        say: Told of the progress.
        own: What counts as this program's own work, not others'.

    Returns:
        The samples of each, in the order given, and the machine's load meanwhile.
    """
    assert repeats >= 1
    wall: list[list[float]] = [[] for _ in measures]
    cpu: list[list[float]] = [[] for _ in measures]
    meter = LoadMeter(own)
    for turn in range(repeats):
        for place in range(len(measures)):
            chosen = (place + turn) % len(measures)
            seconds, processor = measures[chosen]()
            wall[chosen].append(seconds)
            cpu[chosen].append(processor)
        say(f"round {turn + 1} of {repeats}")
    load = meter.read()
    return [Samples(wall=walls, cpu=cpus) for walls, cpus in zip(wall, cpu, strict=True)], load


def timed(run: Callable[[], object], meter: Meter = time.process_time) -> tuple[float, float]:
    """Wall and processor seconds of one call; the garbage collector rests meanwhile."""
    gc.collect()
    gc.disable()
    try:
        processor, wall = meter(), time.perf_counter()
        run()
        seconds = time.perf_counter() - wall
        return seconds, meter() - processor
    finally:
        gc.enable()
