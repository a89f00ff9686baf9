"""What the times of a step say: the bars, and lines beside them."""

import statistics
from collections.abc import Mapping
from typing import Final

from benchmarks.harness import OURS, Precision
from benchmarks.report import Bar, missing_bar, ratio_bar
from benchmarks.trainer.contenders import BARE, EXAMPLE
from benchmarks.trainer.job import RUN_IN_S3, job_name
from benchmarks.trainer.turns import StepTimes

RANKS: Final = 2
"""Of the contender that shows how it scales."""
GOODPUT_TARGET: Final = 0.93
DEFAULT_TARGET: Final = 1.5
BF16_TARGET: Final = 1.05

Times = Mapping[str, StepTimes]
"""By `Job.name`."""


_BARE: Final = job_name(BARE, Precision.BF16)
_OURS: Final = job_name(OURS, Precision.BF16)
"""In the recipe's precision."""
_OURS_IN_S3: Final = job_name(OURS, Precision.BF16, remark=RUN_IN_S3)
_PEERS: Final = (
    ("goodput-1-rank", GOODPUT_TARGET, _BARE),
    ("end-to-end-fp32-default", DEFAULT_TARGET, job_name(EXAMPLE, Precision.FP32)),
    ("end-to-end-bf16", BF16_TARGET, job_name(EXAMPLE, Precision.BF16)),
)
"""Claims, targets, and with whom ours is compared."""


def bars(times: Times) -> list[Bar]:
    """Judge; whoever was not measured makes its bar short."""
    return [_bar(claim, target, times, other) for claim, target, other in _PEERS]


def remarks(times: Times, threads: int) -> list[str]:
    """Say what no bar is about, a line for each.

    Args:
        times: Everyone's.
        threads: Of torch, of all ranks together.
    """
    ours = times[_OURS]
    found = [_parts(ours, times[_BARE])]
    in_s3 = times.get(_OURS_IN_S3)
    if in_s3 is not None:
        found.append(_parts(in_s3, times[_BARE]))
        found += [f"{claim}, {RUN_IN_S3}: {_ratio(times, other, in_s3)}" for claim, _, other in _PEERS]
    fp32 = times.get(job_name(OURS, Precision.FP32))
    if fp32 is not None:
        others = (job_name(BARE, Precision.FP32), job_name(EXAMPLE, Precision.FP32))
        found += [f"at fp32: {_ratio(times, other, fp32)}" for other in others if other in times]
    both = times.get(job_name(OURS, Precision.BF16, RANKS))
    found += [_ema(each) for each in (ours, both) if each is not None]
    if both is not None:
        found.append(_scaling(ours, both, threads))
    return found


def _bar(claim: str, target: float, times: Times, other: str) -> Bar:
    if other not in times:
        return missing_bar(claim, target, other)
    ours, theirs = times[_OURS], times[other]
    by_cpu = f"by processor time {theirs.median_cpu:.3f} s over {ours.median_cpu:.3f} s = "
    measured = f"{_over(theirs, ours)}; {by_cpu}{theirs.median_cpu / ours.median_cpu:.3f}"
    return ratio_bar(claim, target, ours, theirs, measured)


def _ratio(times: Times, other: str, ours: StepTimes) -> str:
    theirs = times.get(other)
    if theirs is None:
        return f"{other} was not measured"
    return f"{_over(theirs, ours)}: {theirs.median / ours.median:.3f}"


def _over(theirs: StepTimes, ours: StepTimes) -> str:
    return f"{theirs.name} {theirs.median:.3f} s per step over {ours.name} {ours.median:.3f} s"


def _parts(ours: StepTimes, bare: StepTimes) -> str:
    """Where the whole loop's time goes beside the bare step."""
    every, ema = ours.between - bare.median, statistics.median(ours.ema)
    return (
        f"{ours.name}: {_ms(ours.median)} per step are {_ms(bare.median)} of the bare step, {_ms(every)} of "
        f"what every step has beside it (EMA {_ms(ema)}), and {_ms(ours.median - ours.between)} of rows and "
        "checkpoint, spread over all steps"
    )


def _ema(times: StepTimes) -> str:
    """What the averages cost."""
    update = statistics.median(times.ema)
    return (
        f"EMA at {times.ranks} rank{'s' if times.ranks > 1 else ''}: {_ms(update)} per update "
        f"({_ms(min(times.ema))} to {_ms(max(times.ema))}, {len(times.ema)} updates), "
        f"{100 * update / times.between:.2f} % of a step"
    )


def _scaling(one: StepTimes, several: StepTimes, threads: int) -> str:
    """What more ranks make of the same processors."""
    each = max(1, threads // several.ranks)
    return (
        f"scaling from 1 to {several.ranks} ranks: {one.between / several.between:.3f} times the pictures "
        f"per second (a step without checkpoint: {_ms(one.between)} and {_ms(several.between)}). One rank "
        f"has {threads} threads, each of {several.ranks} has {each}: one rank uses all the processors "
        "already, so that no more than 1 is to be expected"
    )


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms"
