"""One run of a benchmark: compare, time, profile, report."""

import gc
from collections.abc import Callable

from benchmarks.harness import (
    OURS,
    TIMING_HEADER,
    Contender,
    Load,
    Measurement,
    Mode,
    Precision,
    Timing,
    interleave,
)
from benchmarks.options import Options
from benchmarks.profiling import profile_kinds
from benchmarks.report import SHARE_HEADER, Bar, Result, Share, environment, finish, table


def run(
    name: str,
    options: Options,
    contenders: Callable[[Precision], list[Contender]],
    bars: Callable[[list[Timing]], list[Bar]],
    **settings: int,
) -> Result:
    """Run a benchmark and print its results, the bars last.

    Args:
        name: Of the benchmark.
        options: What to measure.
        contenders: Builds everyone at one precision, ready to be called.
        bars: Judges all samples.
        settings: What else is to stand among the settings in the JSON file.

    Raises:
        ValueError: If a peer does not compute what we do; then nothing is timed.
    """
    checks = [peer.check(options.config) for peer in options.present()]
    for check in checks:
        print(check.line())
    for missing in options.missing():
        print(f"{missing} is not installed: its bars are short")
    timings: list[Timing] = []
    loads: list[Load] = []
    profiles: dict[str, list[Share]] = {}
    for precision in options.precisions:
        measurement = _measure(contenders(precision), options, profiles)
        timings += measurement.timings
        loads.append(measurement.load)
        gc.collect()  # the next precision's networks are built after these are gone
    print(table(TIMING_HEADER, [timing.row() for timing in timings]))
    for title, shares in profiles.items():
        print(f"where the time of {title} goes:")
        print(table(SHARE_HEADER, [share.row() for share in shares]))
    result = Result(
        benchmark=name,
        network=options.network,
        settings=options.as_settings() | settings,
        environment=environment(peer.distribution for peer in options.peers),
        checks=checks,
        missing=options.missing(),
        timings=timings,
        loads=loads,
        profiles=profiles,
        bars=bars(timings),
    )
    finish(result, options.json)
    return result


def _measure(contenders: list[Contender], options: Options, profiles: dict[str, list[Share]]) -> Measurement:
    """Time everyone; then profile our network, run eagerly, and add the outcome to `profiles`."""
    measurement = interleave(contenders, options.repeats)
    if options.profile:
        for contender in contenders:
            if contender.label.contender == OURS and contender.label.mode is Mode.EAGER:
                profiles[str(contender.label)] = profile_kinds(contender.run, calls=1)
    return measurement
