"""What a benchmark hands out: tables, a JSON file, and one last line per bar."""

import os
import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import ClassVar, Protocol

import torch

from benchmarks.harness import MIN_REPEATS, OURS, Load, Mode, Precision, Record, Samples, Timing
from data_pipeline.documents import Document


class Bar(Record):
    """A claim and whether the measurement carries it.

    Attributes:
        name: No spaces; says what was compared, with precision and batch.
        value: Peer's seconds over ours, or what `measured` says; None if it could not be measured.
        target: What the value must reach; in a bar of `most_bar` what it must not pass.
        ok: Whether it does, by enough samples.
        measured: What the value was made from.
    """

    name: str
    value: float | None
    target: float
    ok: bool
    measured: str

    def line(self) -> str:
        """`bar <name> <value> <target> ok|short`."""
        value = "nan" if self.value is None else f"{self.value:.3f}"
        return f"bar {self.name} {value} {self.target:g} {'ok' if self.ok else 'short'}"


def speed_bar(
    name: str, target: float, ours: Timing | None, theirs: Timing | None, reservation: str | None = None
) -> Bar:
    """Judge how many times as fast as a peer we are.

    Args:
        name: The bar's name.
        target: Least ratio of their median wall seconds to ours.
        ours: Our samples; None if they could not be taken, which makes the bar short.
        theirs: The peer's, likewise.
        reservation: Why the samples cannot decide, if so; makes the bar short.
    """
    if ours is None or theirs is None:
        return missing_bar(name, target, "ours" if ours is None else "the peer")
    assert ours.label.batch == theirs.label.batch, "only equal batches are compared"
    measured = f"{theirs.label} {theirs.median:.3f} s over {ours.label} {ours.median:.3f} s"
    return ratio_bar(name, target, ours, theirs, measured, reservation)


def missing_bar(name: str, target: float, missing: str) -> Bar:
    """The bar about a contender that could not be measured: short."""
    return Bar(name=name, value=None, target=target, ok=False, measured=f"{missing} was not measured")


def ratio_bar(
    name: str, target: float, ours: Samples, theirs: Samples, measured: str, reservation: str | None = None
) -> Bar:
    """Judge how many times as fast as another contender we are at the same work.

    Args:
        name: The bar's name.
        target: Least ratio of their median wall seconds to ours.
        ours: Our samples.
        theirs: The other's.
        measured: What the ratio is made of.
        reservation: Why the samples cannot decide, if so; makes the bar short.
    """
    value = theirs.median / ours.median
    reservation = few(min(len(ours.wall), len(theirs.wall))) or reservation
    if reservation is not None:
        measured += f"; {reservation}"
    ok = value >= target and reservation is None
    return Bar(name=name, value=value, target=target, ok=ok, measured=measured)


def most_bar(name: str, target: float, value: float, measured: str, reservation: str | None = None) -> Bar:
    """Judge a number that must not be larger than its target.

    Args:
        name: The bar's name.
        target: The largest value that is good enough.
        value: The number.
        measured: What it is made of.
        reservation: Why the samples cannot decide, if so; makes the bar short.
    """
    if reservation is not None:
        measured += f"; {reservation}"
    ok = value <= target and reservation is None
    return Bar(name=name, value=value, target=target, ok=ok, measured=measured)


def few(repeats: int) -> str | None:
    """Why so many samples decide nothing; None if they are enough."""
    return None if repeats >= MIN_REPEATS else f"{repeats} repeats decide nothing, {MIN_REPEATS} are needed"


def fastest(
    timings: Iterable[Timing],
    contender: str,
    precision: Precision | None = None,
    modes: Sequence[Mode] = tuple(Mode),
    batch: int | None = None,
) -> Timing | None:
    """The contender's best configuration among those measured.

    Args:
        timings: All samples.
        contender: Whose.
        precision: Only this one; default: any.
        modes: Only these.
        batch: Only this one; default: any.

    Returns:
        The timing of least median, or None if there is none.
    """
    found = [
        timing
        for timing in timings
        if timing.label.contender == contender
        and precision in (None, timing.label.precision)
        and timing.label.mode in modes
        and batch in (None, timing.label.batch)
    ]
    return min(found, key=lambda timing: timing.median, default=None)


def best_bar(name: str, target: float, timings: Sequence[Timing], peer: str, precision: Precision) -> Bar:
    """Judge our best configuration against a peer's best, at equal precision.

    The peer's best may be its compiled network: without that among the samples the bar is short.
    """
    ours, theirs = fastest(timings, OURS, precision), fastest(timings, peer, precision)
    complete = fastest(timings, peer, precision, (Mode.COMPILED,)) is not None
    return speed_bar(name, target, ours, theirs, None if complete else f"{peer} was not measured compiled")


def least_favourable(timings: Sequence[Timing], peer: str) -> tuple[Timing | None, Timing | None]:
    """Of all fair comparisons with a peer, the one in which we do worst.

    Fair are, at each precision: eager against eager, compiled against compiled (either way of ours), best
    against best.

    Returns:
        (ours, theirs); None for whoever was not measured.
    """
    pairs = []
    for precision in Precision:
        for modes in ((Mode.EAGER,), (Mode.COMPILED, Mode.BLOCKS), tuple(Mode)):
            ours = fastest(timings, OURS, precision, modes)
            theirs = fastest(timings, peer, precision, modes)
            if ours is not None and theirs is not None:
                pairs.append((ours, theirs))
    if not pairs:
        return fastest(timings, OURS), fastest(timings, peer)
    return min(pairs, key=lambda pair: pair[1].median / pair[0].median)


class Check(Record):
    """A peer's answer beside ours, before anything was timed.

    Attributes:
        peer: Its name.
        version: Of its distribution.
        source: Where its documentation or code stands.
        parameters: How many its network has.
        same_parameters: Whether that is our network's number and architecture.
        difference: Largest absolute difference from our output in float32; None: another architecture.
        scale: Largest absolute value of our output.
        atol: The tolerance it had to keep.
    """

    peer: str
    version: str
    source: str
    parameters: int
    same_parameters: bool
    difference: float | None
    scale: float | None
    atol: float | None

    def line(self) -> str:
        """One line for the reader."""
        head = f"{self.peer} {self.version}, {self.parameters:,} parameters: "
        if self.difference is None:
            return head + "another architecture, outputs are not comparable"
        return head + f"differs from ours by {self.difference:.1e} of {self.scale:.2f} (atol {self.atol:g})"


class Share(Record):
    """A kind of operator in a profile.

    Attributes:
        kind: Its name.
        seconds: Processor time per call spent in it.
        share: Of the whole.
    """

    kind: str
    seconds: float
    share: float

    def row(self) -> tuple[str, ...]:
        """The cells of `SHARE_HEADER`."""
        return self.kind, f"{self.seconds:.3f}", f"{100 * self.share:.1f}"


SHARE_HEADER = ("kind of operator", "s", "%")
"""Columns of `Share.row`."""


class Environment(Record):
    """Where it was measured."""

    python: str
    torch: str
    threads: int
    processors: int
    processor: str
    capability: str
    bf16_in_hardware: bool
    packages: dict[str, str]


class Result(Document):
    """The JSON file of a benchmark.

    Attributes:
        benchmark: Which one.
        network: `cifar10`, or `small`, which no bar is about.
        settings: The options it ran with.
        environment: Where it ran.
        checks: The peers' outputs compared with ours.
        missing: Peers that are not installed.
        timings: All raw samples.
        loads: The machine during each group of timed calls.
        profiles: By contender, where its time goes.
        bars: The claims.
    """

    SCHEMA: ClassVar[str] = "benchmark/1"

    benchmark: str
    network: str
    settings: dict[str, str | int | list[str]]
    environment: Environment
    checks: list[Check]
    missing: list[str]
    timings: list[Timing]
    loads: list[Load]
    profiles: dict[str, list[Share]]
    bars: list[Bar]


def environment(packages: Iterable[str]) -> Environment:
    """Describe the machine and the versions of the named distributions."""
    versions = {name: found for name in packages if (found := installed(name)) is not None}
    return Environment(
        python=platform.python_version(),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        processors=os.cpu_count() or 1,
        processor=_processor(),
        capability=torch.backends.cpu.get_cpu_capability(),
        bf16_in_hardware=bf16_in_hardware(),
        packages=versions,
    )


def bf16_in_hardware() -> bool:
    """Whether convolutions in bfloat16 run on instructions made for it; else they are emulated, slowly."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def installed(distribution: str) -> str | None:
    """Version of an installed distribution, None if it is not there."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    """The processor's name where Linux tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lay out rows under a header: the first column to the left, the others to the right."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


class Finished(Protocol):
    """What every benchmark's JSON file holds."""

    @property
    def loads(self) -> Sequence[Load]:
        """The machine during each group of timed calls."""

    @property
    def bars(self) -> Sequence[Bar]:
        """The claims."""

    def to_json(self) -> bytes:
        """The file's bytes."""


def finish(result: Finished, file: Path | None) -> None:
    """Write the JSON file if one is wanted, and print what each bar was made from, then the bars."""
    if file is not None:
        file.write_bytes(result.to_json())
    for load in result.loads:
        print(load.note())
    for bar in result.bars:
        print(f"{bar.name}: {bar.measured}")
    for bar in result.bars:
        print(bar.line())
