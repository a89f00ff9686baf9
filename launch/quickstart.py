"""The quick start: one command from pictures to a trained and scored model, with the system's real parts.

Nothing here is special: it starts the commands a user would start (`ddpm data build`, `launch/train.sh`,
`launch/eval.sh`) against one store, and prints what they left in the run directory.
"""

import logging
import os
import signal
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.table import Table

from data_pipeline.errors import ExitCode, UserError
from data_pipeline.storage import Storage
from launch.processes import Child
from launch.s3server import S3Server, ServerError
from trainer.command import report_errors
from trainer.recipe import load_recipe

log = logging.getLogger(__name__)

LAUNCH: Final = Path(__file__).parent
DEFAULT_MINUTES: Final = 6.0
MAX_FD_RATIO: Final = 3.0
"""The last FD must be at most this multiple of real held-out digits' (calibrated once, then fixed)."""
JUDGED_SAMPLES: Final = 512
INTERRUPTED: Final = 128 + signal.SIGINT
"""The exit code shells give a program ended by Ctrl-C."""


@dataclass(frozen=True)
class Plan:
    """What one quick start does.

    Attributes:
        folder: Local folder of everything it leaves behind.
        store: URL under which shards and run live.
        build: Arguments of `ddpm data build` before `--out`.
        overrides: Recipe settings besides run, data and length.
        minutes: Length of training.
        is_digits: Whether the embedded digits are trained on (they alone can be judged).
    """

    folder: Path
    store: str
    build: tuple[str, ...]
    overrides: tuple[str, ...]
    minutes: float
    is_digits: bool

    @property
    def shards(self) -> str:
        """URL of the shards."""
        return f"{self.store}/shards"

    @property
    def run(self) -> str:
        """URL of the run directory."""
        return f"{self.store}/run"


def quickstart(
    minutes: Annotated[
        float, typer.Option(min=0.1, help="Minutes of training; the rest takes about two more.")
    ] = DEFAULT_MINUTES,
    data: Annotated[
        str, typer.Option(help="digits (embedded), or folder:PATH for your own pictures (in colour).")
    ] = "digits",
    size: Annotated[int, typer.Option(min=8, help="Side length in pixels for folder:PATH.")] = 32,
    store: Annotated[
        str | None, typer.Option(help="A folder or URL to use instead of a local S3 server.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Where everything is left. Default: runs/quickstart-<time>.")
    ] = None,
) -> None:
    """Build shards, train with two ranks (or all GPUs), score every checkpoint, show the result.

    Exit codes: 0 done; 1 a part failed, or a full-length run on the digits has not learned; 2 user's mistake;
    130 stopped by Ctrl-C.
    """
    build, overrides = _data_arguments(data, size)
    folder = (folder or Path("runs") / f"quickstart-{datetime.now():%Y%m%d-%H%M%S}").absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UserError(f"--folder {folder}: is not empty; name a new folder")
    except OSError as error:
        raise UserError(f"--folder {folder}: {error.strerror}; name another folder") from error
    began = time.monotonic()
    with ExitStack() as stack:
        environment = dict(os.environ)
        if store is None:
            server = stack.enter_context(S3Server(folder / "s3"))
            environment |= server.env()
            os.environ.update(server.env())  # this process reads the results from there
            store = server.url
        else:
            store = f"{Storage(store).url}/{folder.name}"
        plan = Plan(folder, store, build, overrides, minutes, data == "digits")
        try:
            _run_parts(plan, environment)
            code = _report(plan)
        except KeyboardInterrupt:
            print(f"stopped; what was done so far is in {folder}", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None
    print(f"finished in {(time.monotonic() - began) / 60:.1f} minutes; everything is in {folder}")
    raise typer.Exit(code)


def _data_arguments(data: str, size: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    kind, _, source = data.partition(":")
    if data == "digits":
        return ("digits",), ()
    if kind == "folder" and source:
        # Three levels of the network need a side divisible by four; attention sits at the coarsest.
        if size % 4:
            raise UserError(f"--size {size}: must be a multiple of 4")
        overrides = (
            f"image.size={size}",
            "image.channels=3",
            "image.flip=true",
            "model.channel_multipliers=[1,2,2]",
            f"model.attention_resolutions=[{size // 4}]",
            "evaluation.quick.samples=128",
        )
        return ("folder", source, "--size", str(size), "--channels", "3"), overrides
    raise UserError(f"--data {data}: give digits or folder:PATH")


def _run_parts(plan: Plan, environment: dict[str, str]) -> None:
    """Build, then train and evaluate at the same time; return when both have ended."""
    build = [sys.executable, "-m", "launch.cli", "data", "build", *plan.build, "--out", plan.shards]
    with Child("data", build, environment, plan.folder / "data.log") as child:
        _check(child.name, child.wait())
    evaluation = [str(LAUNCH / "eval.sh"), plan.run, "--wait-for-run", "--until-finished"]
    # Scoring shares the cores evenly with training, so that the last score comes soon after the end.
    evaluation += ["--threads", "1", "--nice", "0", "--poll", "2"]
    train = [str(LAUNCH / "train.sh"), "quickstart", f"run={plan.run}", f"data.url={plan.shards}"]
    with (
        Child("eval", evaluation, environment, plan.folder / "eval.log") as scorer,
        Child("train", [*train, *_length(plan)], environment, plan.folder / "train.log") as trainer,
    ):
        while not trainer.ended_within(0.2):
            if scorer.poll():
                _check(scorer.name, scorer.wait())
        _check(trainer.name, trainer.wait())
        _check(scorer.name, scorer.wait())


def _length(plan: Plan) -> list[str]:
    """Recipe settings that scale the shipped recipe to the minutes asked for."""
    recipe = load_recipe("quickstart", plan.overrides)
    scale = plan.minutes / DEFAULT_MINUTES
    batches = max(1, round(recipe.checkpoint.every_images * scale / recipe.batch.total))
    return [
        *plan.overrides,
        f"train.images={max(1, round(recipe.train.images * scale))}",
        f"train.max_minutes={plan.minutes}",
        f"checkpoint.every_images={batches * recipe.batch.total}",
    ]


def _check(name: str, code: int) -> None:
    if code == ExitCode.USER_MISTAKE:
        raise UserError(f"{name} could not start; its message stands above")
    if code != 0:
        log.error("%s ended with exit code %d", name, code)
        raise typer.Exit(ExitCode.FAILED)


def _report(plan: Plan) -> ExitCode:
    """Copy the result to the local folder, print the table and, for digits, the verdict."""
    # Imported late: torch and scikit-learn take seconds that a wrong option need not wait for.
    from eval.results import books
    from launch.learned import copy_newest, judge_run
    from trainer.run import Run

    run = Run(plan.run)
    (book,) = books(run)
    results = book.results()
    held_out = book.held_out()
    if not results or held_out is None:
        log.error("%s holds no results", run.url)
        return ExitCode.FAILED
    distance, score = book.protocol.features.distance_name, book.protocol.features.score_name
    table = Table(title=f"{distance} and {score} of {results[-1].samples} pictures (lower FD is better)")
    for heading in ("checkpoint", "images", "FD", "score", "seconds"):
        table.add_column(heading, justify="left" if heading == "checkpoint" else "right")
    for row in results:
        metrics = (f"{row.metrics[distance].value:.2f}", f"{row.metrics[score].value:.2f}")
        table.add_row(row.checkpoint, str(row.images), *metrics, f"{row.seconds:.1f}")
    real = held_out.metrics
    metrics = (f"{real[distance].value:.2f}", f"{real[score].value:.2f}")
    table.add_row(f"real held-out ({held_out.samples})", "", *metrics, f"{held_out.seconds:.1f}")
    Console().print(table)
    local_run, grid = copy_newest(run, book, results[-1], plan.folder)
    print(f"last grid: {grid}")
    print(f"more pictures: ddpm sample {local_run} -n 64 --out samples")
    if not plan.is_digits:
        return ExitCode.FINISHED
    ratio = results[-1].metrics[distance].value / real[distance].value
    verdict = judge_run(run, results[-1].checkpoint, plan.shards, JUDGED_SAMPLES)
    checks = {
        f"last FD is {ratio:.2f}x that of real held-out digits (at most {MAX_FD_RATIO:g}x)": (
            ratio <= MAX_FD_RATIO
        ),
        f"a classifier ({verdict.accuracy:.1%} right on real held-out digits) is sure of "
        f"{verdict.sure_samples:.1%} of {JUDGED_SAMPLES} samples and {verdict.sure_real:.1%} of real ones "
        "(at least 0.7x)": verdict.is_sure_enough,
        f"the rarest class is {min(verdict.classes):.1%} of the samples (at least 3%)": (
            verdict.has_every_class
        ),
    }
    for text, passed in checks.items():
        print(f"{'ok   ' if passed else 'SHORT'} {text}")
    if not all(checks.values()):
        print(
            f"this machine trained on {results[-1].images} images; more help: --minutes {2 * plan.minutes:g}"
        )
    full_length = plan.minutes >= DEFAULT_MINUTES
    return ExitCode.FAILED if full_length and not all(checks.values()) else ExitCode.FINISHED


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(quickstart)


def main() -> None:
    """Entry point of `launch/quickstart.sh`."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: end the parts in order
        signal.signal(number, signal.default_int_handler)
    try:
        report_errors(app)
    except ServerError as error:
        print(f"failed: {error}", file=sys.stderr)
        raise SystemExit(ExitCode.FAILED) from None


if __name__ == "__main__":
    main()
