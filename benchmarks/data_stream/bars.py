"""How this benchmark's bars are computed from its numbers."""

from collections.abc import Sequence

from benchmarks.data_build.running import Rate
from benchmarks.harness import MIN_REPEATS, Samples
from benchmarks.report import Bar, missing_bar, ratio_bar

_LEAST_MICROSECONDS = 0.5
"""Less than this per picture is not told from nothing."""


def speed_bars(name: str, target: float, ours: Rate, theirs: Sequence[Rate]) -> list[Bar]:
    """Judge how many times as fast as another we are: by wall and by processor seconds.

    Args:
        name: Start of the bars' names.
        target: Least ratio of their median seconds to ours.
        ours: Our samples.
        theirs: The other's, in each of its configurations: the fastest and the cheapest need not be the same.
            None at all make the bars short.
    """
    if not theirs:
        return [missing_bar(f"{name}-{kind}", target, "the peer") for kind in ("wall", "cpu")]
    fastest = min(theirs, key=lambda rate: rate.median)
    cheapest = min(theirs, key=lambda rate: rate.median_cpu)
    wall = f"{fastest.name} {fastest.median:.3f} s over {ours.name} {ours.median:.3f} s"
    cpu = f"{cheapest.name} {cheapest.median_cpu:.3f} CPU s over {ours.name} {ours.median_cpu:.3f} CPU s"
    return [
        ratio_bar(f"{name}-wall", target, ours, fastest, wall),
        ratio_bar(f"{name}-cpu", target, by_cpu(ours), by_cpu(cheapest), cpu),
    ]


def by_cpu(samples: Samples) -> Samples:
    """The samples with processor seconds in place of wall seconds."""
    return Samples(wall=samples.cpu, cpu=samples.cpu)


def beside_decoding_bar(name: str, target: float, decode: Rate, ours: Rate, theirs: Rate) -> Bar:
    """Judge by processor time that is not decoding: theirs for a picture over ours.

    Args:
        name: The bar's name.
        target: Least ratio.
        decode: The decoder's alone.
        ours: Our samples.
        theirs: The other's.
    """
    floor, us, them = (1e6 * rate.median_cpu / rate.pictures for rate in (decode, ours, theirs))
    value = (them - floor) / max(us - floor, _LEAST_MICROSECONDS)
    measured = (
        f"beside {floor:.1f} us of decoding: {theirs.name} {them - floor:.1f} us, "
        f"{ours.name} {us - floor:.1f} us per picture"
    )
    enough = min(len(rate.cpu) for rate in (decode, ours, theirs)) >= MIN_REPEATS
    if not enough:
        measured += f"; {MIN_REPEATS} repeats are needed"
    return Bar(name=name, value=value, target=target, ok=enough and value >= target, measured=measured)


def at_least(name: str, target: float, value: float, measured: str) -> Bar:
    """A bar that a number must reach."""
    return Bar(name=name, value=value, target=target, ok=value >= target, measured=measured)


def at_most(name: str, target: float, value: float, measured: str) -> Bar:
    """A bar that a number must not pass; its name says so."""
    return Bar(name=f"{name}-at-most", value=value, target=target, ok=value <= target, measured=measured)


def small(bars: Sequence[Bar]) -> list[Bar]:
    """Tell a small run's bars from those that count."""
    return [bar.model_copy(update={"name": f"small-{bar.name}"}) for bar in bars]
