"""What the samples say: the bars, and lines beside them."""

import statistics
from typing import Final

from benchmarks.checkpoint.reading import Transition
from benchmarks.checkpoint.stall import Stall
from benchmarks.checkpoint.torn import Trial, hits, torn
from benchmarks.harness import OURS, Samples
from benchmarks.report import Bar, few, missing_bar, most_bar

STALL: Final = ("checkpoint-stall", 0.20)
COST: Final = ("checkpoint-cost", 0.50)
READ_SHARE: Final = ("checkpoint-read-share", 1.10)
TORN: Final = ("checkpoint-torn", 0.0)
"""Names, and the largest value that is good enough."""
_LEAST_HIT: Final = 0.5
"""Of the kills, so that they count: the others could not have torn anything."""
STALL_HEADER: Final = ("contender", "median s", "spread s", "CPU s", "MB")
"""Columns of `stall_rows`."""


def missing_bars(missing: str) -> list[Bar]:
    """All bars, if nothing could be measured."""
    return [missing_bar(*claim, missing) for claim in (STALL, COST, READ_SHARE, TORN)]


def stall_rows(stall: Stall) -> list[tuple[str, ...]]:
    """The cells of `STALL_HEADER`."""
    undisturbed = [statistics.mean(turn) for turn in stall.undisturbed]
    ours = f"{stall.our_bytes / 1e6:.1f}"
    rows = [
        ("a step, undisturbed", Samples(wall=undisturbed, cpu=stall.undisturbed_cpu), ""),
        ("ours, training stands still", Samples(wall=stall.stalls, cpu=stall.cpus), ours),
        ("ours, with the slowdown", Samples(wall=stall.costs, cpu=stall.cpus), ours),
        ("deepspeed", stall.deepspeed, f"{stall.deepspeed_bytes / 1e6:.1f}"),
    ]
    return [(name, *samples.cells(), size) for name, samples, size in rows]


def stall_remarks(stall: Stall) -> list[str]:
    """Say what no bar is about, a line for each."""
    slow, published = statistics.median(stall.slowdowns), statistics.median(e.published for e in stall.ours)
    steps = statistics.median(len(episode.steps) for episode in stall.ours)
    return [
        f"{stall.parameters:,} parameters; both checkpoints hold the same {stall.compared:,} numbers",
        f"ours: CPU s are those of the whole checkpoint, the {steps:g} steps beside it taken off; "
        f"slowdown {slow:.3f} s in {steps:g} steps of {stall.step:.3f} s; seen to be published after "
        f"{published:.2f} s",
    ]


def stall_bars(stall: Stall) -> list[Bar]:
    """Judge what a checkpoint takes of training's time."""
    theirs = stall.deepspeed.median
    still, cost = statistics.median(stall.stalls), statistics.median(stall.costs)
    reservation = few(min(len(stall.ours), len(stall.deepspeed.wall)))
    save = f"over DeepSpeed's save of {theirs:.3f} s"
    return [
        most_bar(*STALL, still / theirs, f"ours stops training for {still:.3f} s {save}", reservation),
        most_bar(*COST, cost / theirs, f"ours stops and slows it by {cost:.3f} s {save}", reservation),
    ]


def read_bar(transitions: list[Transition]) -> Bar:
    """Judge how much more than its share any rank reads."""
    worst = max(transitions, key=lambda each: each.share)
    measured = (
        f"written by {worst.writer}, read by {worst.reader}: {max(worst.read):,} bytes of "
        f"{worst.part_bytes / worst.reader.ranks:,.0f}"
    )
    return most_bar(*READ_SHARE, worst.share, measured)


def torn_bar(trials: list[Trial]) -> Bar:
    """Judge how many of our checkpoints are torn."""
    ours = [trial for trial in trials if trial.side == OURS]
    reservation = few(len(ours))
    if reservation is None and hits(ours) < _LEAST_HIT * len(ours):
        reservation = f"only {hits(ours)} of {len(ours)} kills fell into a save"
    measured = f"ours, of {len(ours)} kills, {hits(ours)} of which fell into a save"
    return most_bar(*TORN, torn(ours), measured, reservation)
