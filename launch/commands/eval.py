"""`ddpm eval …`: evaluate the checkpoints of a run and show the results. Thin shells over `eval`."""

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from data_pipeline.errors import ExitCode, UserError

if TYPE_CHECKING:
    from rich.table import Table

    from data_pipeline.documents import Document
    from eval.results import Metric, Result, ResultBook
    from eval.service import WatchOptions
    from eval.team import Team

app = typer.Typer(no_args_is_help=True, help="Evaluate the checkpoints of a run and show the results.")

RunUrl = Annotated[str, typer.Argument(metavar="RUN", help="The run directory: a folder or URL.")]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
Specs = Annotated[
    list[str] | None,
    typer.Option(
        "--spec", help="Specification of the recipe's section `evaluation`; repeatable. Default: all."
    ),
]
FeaturesOption = Annotated[
    str | None,
    typer.Option(help="Use this network instead: effnetlite0, or inception=PATH_OR_URL[#sha256=HEX]."),
]
Threads = Annotated[
    int | None, typer.Option(min=1, help="CPU threads of this process. Default: as torch and OpenMP choose.")
]


@app.command()
def watch(
    run_url: RunUrl,
    spec: Specs = None,
    features: FeaturesOption = None,
    until_finished: Annotated[
        bool, typer.Option(help="End when training has finished and every checkpoint has its results.")
    ] = False,
    wait_for_run: Annotated[bool, typer.Option(help="Wait for a run that has not been started yet.")] = False,
    poll: Annotated[
        float, typer.Option(min=0.1, help="Seconds between looks when there is nothing to do.")
    ] = 5.0,
    threads: Threads = None,
    nice: Annotated[
        int, typer.Option(min=0, max=19, help="Give way to other work, training first: 0 not at all.")
    ] = 10,
    as_json: AsJson = False,
) -> None:
    """Evaluate every checkpoint of RUN as it appears, oldest first; start as many of these as you like.

    Exit codes: 0 ended as asked (by a signal, or --until-finished with all done); 75 stopped by a signal
    before --until-finished was reached; 1 a checkpoint stayed damaged; 2 user's mistake.
    """
    import logging

    from eval.service import WatchOptions
    from eval.service import watch as watch_run

    logging.getLogger("eval").setLevel(logging.INFO)
    os.nice(nice)
    with _team(threads) as team:
        options = _options(spec, features)
        options = WatchOptions(options.specs, options.features, poll, until_finished, wait_for_run)
        summary = watch_run(run_url, options, team, lambda result: _print_result(result, as_json))
    if team.is_main:
        facts = [f"{summary.evaluated} evaluated"]
        facts += [f"{summary.faults} storage faults survived"] * bool(summary.faults)
        facts += [f"{summary.vanished} vanished"] * bool(summary.vanished)
        facts += [f"{summary.damaged} damaged"] * bool(summary.damaged)
        print(f"evaluation {summary.outcome}: {', '.join(facts)}", file=sys.stderr)
    if until_finished and summary.outcome == "stopped":
        raise typer.Exit(ExitCode.REQUEUE)
    if summary.damaged:
        raise typer.Exit(ExitCode.FAILED)


@app.command()
def once(
    run_url: RunUrl,
    checkpoint: Annotated[str | None, typer.Argument(help="Default: the newest live one.")] = None,
    spec: Specs = None,
    features: FeaturesOption = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate one checkpoint; a result that is already there is shown, not computed again."""
    from eval.service import Service
    from eval.team import Stopped
    from trainer.run import CheckpointGoneError

    with _team(threads) as team:
        try:
            service = Service(run_url, _options(spec, features), team)
            service.once(checkpoint, lambda result: _print_result(result, as_json))
        except CheckpointGoneError as error:
            raise UserError(f"{error}; name another checkpoint") from error
        except Stopped:
            raise typer.Exit(ExitCode.REQUEUE) from None


@app.command()
def status(run_url: RunUrl, as_json: AsJson = False) -> None:
    """Show all results of RUN, one table per protocol, and what still waits."""
    from rich.console import Console

    books = _books(run_url)
    if as_json:
        print(json.dumps([_book_facts(book) for book in books], indent=2))
        return
    # Rich believes a pipe to be 80 columns wide and would cut names short.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    for book in books:
        console.print(_table(book))
        pending = book.pending()
        if pending:
            console.print(f"waiting: {', '.join(pending)}")
        for warning in _warnings(book):
            console.print(f"note: {warning}", markup=False)
    if not books:
        print(f"{run_url}: no results yet; start `ddpm eval watch {run_url}`")


@app.command()
def best(run_url: RunUrl, as_json: AsJson = False) -> None:
    """Show the live checkpoint of the lowest distance, per protocol (a minimum over many is biased low)."""
    found = {book.directory: book.best() for book in _books(run_url)}
    if as_json:
        print(json.dumps({name: _content(entry) for name, entry in found.items() if entry}, indent=2))
        return
    for name, entry in found.items():
        if entry:
            print(
                f"{name}: {entry.checkpoint}  {entry.metric} {entry.value:.4g}  (of {entry.results} results)"
            )
    if not any(found.values()):
        print(f"{run_url}: no results yet; start `ddpm eval watch {run_url}`")


@contextmanager
def _team(threads: int | None) -> "Iterator[Team]":
    """Join the processes of this evaluation; SIGTERM, SIGINT and SIGUSR1 ask it to stop.

    A second Ctrl-C ends the process at once; its claim then runs out by itself.
    """
    import torch

    from eval.team import Team

    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop.set()
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = {number: signal.signal(number, on_signal) for number in signals}
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        with Team(stop) as team:
            yield team
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _options(spec: list[str] | None, features: str | None) -> "WatchOptions":
    from eval.features import parse_choice
    from eval.service import WatchOptions

    return WatchOptions(tuple(spec or ()), parse_choice(features) if features else None)


def _books(run_url: str) -> "list[ResultBook]":
    from eval.results import books
    from trainer.run import Run

    run = Run(run_url)
    run.recipe()
    return books(run)


def _content(document: "Document") -> Any:
    return json.loads(document.to_json())


def _print_result(result: "Result", as_json: bool) -> None:
    if as_json:
        print(json.dumps(_content(result)), flush=True)
        return
    metrics = "  ".join(f"{name} {_shown(metric)}" for name, metric in result.metrics.items())
    real = " / ".join(_shown(metric) for metric in result.held_out.values())
    print(f"{result.checkpoint}  {metrics}  (held-out {real})  {result.seconds:.1f} s", flush=True)


def _shown(metric: "Metric") -> str:
    spread = f" ± {metric.sd:.2g}" if metric.sd and (metric.splits or 0) > 1 else ""
    return f"{metric.value:.4g}{spread}"


def _book_facts(book: "ResultBook") -> dict[str, Any]:
    held_out, leader = book.held_out(), book.best()
    return {
        "protocol": book.directory,
        "url": book.url,
        "results": [_content(result) for result in book.results()],
        "held_out": _content(held_out) if held_out else None,
        "best": _content(leader) if leader else None,
        "pending": book.pending(),
    }


def _table(book: "ResultBook") -> "Table":
    from rich.table import Table

    names = (book.protocol.features.distance_name, book.protocol.features.score_name)
    table = Table(title=book.url)
    for heading in ("checkpoint", "images", *names, "seconds"):
        table.add_column(heading, justify="left" if heading == "checkpoint" else "right", no_wrap=True)
    for result in book.results():
        cells = [_shown(result.metrics[name]) for name in names]
        table.add_row(result.checkpoint, str(result.images), *cells, f"{result.seconds:.1f}")
    held_out = book.held_out()
    if held_out:
        cells = [_shown(held_out.metrics[name]) for name in names]
        table.add_section()
        table.add_row(f"real held-out ({held_out.samples})", "", *cells, f"{held_out.seconds:.1f}")
    return table


def _warnings(book: "ResultBook") -> list[str]:
    """What the numbers' readers must know, each once."""
    texts = dict.fromkeys(warning for result in book.results() for warning in result.warnings)
    held_out = book.held_out()
    return [*texts, *(f"held-out: {warning}" for warning in (held_out.warnings if held_out else []))]
