"""Checkpoints beside DeepSpeed's `save_checkpoint`, read after a change of layout, and torn by kills.

The training is that of the recipe `cifar10` with one average, on one batch in memory, batches of 8, bf16, at
ZeRO 1 so that DeepSpeed owns the state that it saves. Everything is written to a folder; on a tmpfs, such as
/dev/shm, the disk is out of the measurement: ours waits until everything lies on it, DeepSpeed does not.
"""

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

from benchmarks.checkpoint.bars import (
    STALL_HEADER,
    missing_bars,
    read_bar,
    stall_bars,
    stall_remarks,
    stall_rows,
    torn_bar,
)
from benchmarks.checkpoint.crew import Crew
from benchmarks.checkpoint.reading import READ_HEADER, Transition, measure_reading
from benchmarks.checkpoint.stall import Stall
from benchmarks.checkpoint.torn import Trial, measure_torn, summary
from benchmarks.checkpoint.training import Job
from benchmarks.data_stream.bars import small
from benchmarks.harness import Load
from benchmarks.peers.deepspeed_checkpoint import DEEPSPEED
from benchmarks.report import Bar, Environment, environment, finish, table
from benchmarks.trainer.job import BATCH
from benchmarks.training_options import add_training_options, read_training_options
from data_pipeline.documents import Document

KILLS: Final = 15
_MINUTES: Final = 60.0  # seconds for each repeat, at most


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        repeats: Timed samples of each.
        kills: Of each side.
        threads: Of torch, of all processes that train together.
        small: Take a small network, about which no bar is.
        folder: Where everything is written.
        json: Where to write all samples; None: nowhere.
    """

    repeats: int
    kills: int
    threads: int
    small: bool
    folder: Path
    json: Path | None


class CheckpointResult(Document):
    """The JSON file.

    Attributes:
        network: `cifar10`, or `small`, which no bar is about; kills always meet the small one.
        settings: The options it ran with.
        environment: Where it ran.
        missing: The peer, if it is not installed; nothing is measured then.
        stall: How long training stands still, and what it costs.
        transitions: What was read after a change of layout.
        trials: All kills.
        loads: The machine during the timed calls.
        bars: The claims.
    """

    SCHEMA: ClassVar[str] = "checkpoint-benchmark/1"

    network: str
    settings: dict[str, int]
    environment: Environment
    missing: list[str]
    stall: Stall | None
    transitions: list[Transition]
    trials: list[Trial]
    loads: list[Load]
    bars: list[Bar]


def run(options: Options) -> CheckpointResult:
    """Measure and print the outcome, the bars last.

    Raises:
        ValueError: The checkpoints do not hold the same, or what is loaded is not what was saved.
    """
    stall, transitions, trials, judged = None, list[Transition](), list[Trial](), list[Bar]()
    missing = [] if DEEPSPEED.version is not None else [DEEPSPEED.distribution]
    if missing:
        print(
            f"{DEEPSPEED.distribution} is not installed, and we do not train without it: all bars are short"
        )
        judged = missing_bars(DEEPSPEED.name)
    else:
        print(f"{DEEPSPEED.name} {DEEPSPEED.version}: {DEEPSPEED.source}")
        with tempfile.TemporaryDirectory(prefix="checkpoint-", dir=options.folder) as made:
            place = Path(made)
            stall = _stall(options, place / "stall")
            transitions = _reading(options, place / "reading")
            trials = _torn(options, place / "torn")
        judged = [*stall_bars(stall), read_bar(transitions), torn_bar(trials)]
    result = CheckpointResult(
        network="small" if options.small else "cifar10",
        settings={
            "batch": BATCH,
            "repeats": options.repeats,
            "kills": options.kills,
            "threads": options.threads,
        },
        environment=environment((DEEPSPEED.distribution,)),
        missing=missing,
        stall=stall,
        transitions=transitions,
        trials=trials,
        loads=[] if stall is None else [stall.load],
        bars=small(judged) if options.small else judged,
    )
    finish(result, options.json)
    return result


def _stall(options: Options, place: Path) -> Stall:
    place.mkdir()
    with Crew(Job(small=options.small), 1, options.threads, place) as crew:
        seconds = _MINUTES * (options.repeats + 5)
        (answer,) = crew.ask("stall", folder=str(place), repeats=options.repeats, seconds=seconds)
    stall = Stall.model_validate(answer)
    print(table(STALL_HEADER, stall_rows(stall)))
    for line in stall_remarks(stall):
        print(line)
    return stall


def _reading(options: Options, place: Path) -> list[Transition]:
    place.mkdir()
    found = measure_reading(Job(small=options.small), options.threads, place)
    print(table(READ_HEADER, [each.row() for each in found]))
    return found


def _torn(options: Options, place: Path) -> list[Trial]:
    place.mkdir()
    found = measure_torn(options.kills, options.threads, place)
    for trial in found:
        if trial.torn is not None:
            print(f"{trial.side}, killed after {trial.share:.2f} of a save's time: {trial.torn}")
    print(summary(found))
    return found


def read(arguments: Sequence[str] | None = None) -> Options:
    """Read the command line; default: the process's."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.checkpoint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--repeats", type=int, default=5, metavar="N", help="checkpoints of each (default 5)")
    add(
        "--kills",
        type=int,
        default=KILLS,
        metavar="N",
        help=f"of each side (default {KILLS}); each takes the start of two processes",
    )
    add_training_options(
        parser,
        about_folder="where everything is written and removed again, about 2 GB at a time (default TMPDIR)",
    )
    return Options(**read_training_options(parser, arguments, ("repeats", "kills")))


def main(arguments: Sequence[str] | None = None) -> CheckpointResult:
    """Run the benchmark.

    Args:
        arguments: Of the command line; default: the process's.

    Returns:
        What was measured.
    """
    return run(read(arguments))
