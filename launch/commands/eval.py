"""`ddpm eval …`: evaluate the checkpoints of a run and show the results. Thin shells over `eval`."""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from data_pipeline.errors import ExitCode, UserError
from launch.commands.eval_compare import compare
from launch.commands.eval_reference import reference
from launch.commands.eval_selftest import selftest
from launch.commands.eval_team import AsJson, FeaturesOption, Threads, joined_team

if TYPE_CHECKING:
    from rich.table import Table

    from data_pipeline.documents import Document
    from eval.results import Metric, Result, ResultBook

app = typer.Typer(no_args_is_help=True, help="Evaluate the checkpoints of a run and show the results.")

_ON_ONE_LINE = 2  # metrics of a result; more get a line each
RunUrl = Annotated[str, typer.Argument(metavar="RUN", help="The run directory: a folder or URL.")]
Specs = Annotated[
    list[str] | None,
    typer.Option(
        "--spec",
        help="Specification of the recipe's section `evaluation`; repeatable. Default: all automatic ones.",
    ),
]
SaveImages = Annotated[
    Path | None,
    typer.Option(help="Keep the samples as PNG files in this folder; otherwise none is ever written."),
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
    save_images: SaveImages = None,
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

    from eval.features import parse_choice
    from eval.service import WatchOptions
    from eval.service import watch as watch_run

    logging.getLogger("eval").setLevel(logging.INFO)
    os.nice(nice)
    if features is not None:
        parse_choice(features)  # before waiting for the run
    with joined_team(threads) as team:
        options = WatchOptions(
            specs=tuple(spec or ()),
            features=features,
            poll_seconds=poll,
            until_finished=until_finished,
            wait_for_run=wait_for_run,
            save_images=save_images,
        )
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
    save_images: SaveImages = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate one checkpoint; a result that is already there is shown, not computed again."""
    from eval.service import Service, WatchOptions
    from eval.team import Stopped
    from trainer.run import CheckpointGoneError

    with joined_team(threads) as team:
        try:
            options = WatchOptions(specs=tuple(spec or ()), features=features, save_images=save_images)
            service = Service(run_url, options, team)
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
        every = _all_metrics(book)
        if every:
            console.print(every)
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
    cells = []
    for name, metric in result.metrics.items():
        real = result.held_out.get(name)
        cells.append(f"{name} {_shown(metric)}" + (f" (held-out {_shown(real)})" if real else ""))
    between = "  " if len(cells) <= _ON_ONE_LINE else "\n  "
    print(between.join((result.checkpoint, *cells, f"{result.seconds:.1f} s")), flush=True)


def _shown(metric: "Metric") -> str:
    """The number with what is known of its spread: an interval, else a standard error or deviation."""
    if metric.low is not None and metric.high is not None:
        return f"{metric.value:.4g} [{metric.low:.4g}, {metric.high:.4g}]"
    spread = metric.standard_error or (metric.sd if (metric.splits or 0) > 1 else None)
    return f"{metric.value:.4g}" + (f" ± {spread:.2g}" if spread else "")


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

    features = book.protocol.features
    results, held_out = book.results(), book.held_out()
    names = [
        name
        for name in (features.distance_name, features.score_name)
        if any(name in result.metrics for result in results)
    ]
    table = Table(title=book.url)
    for heading in ("checkpoint", "images", *names, "seconds"):
        table.add_column(heading, justify="left" if heading == "checkpoint" else "right", no_wrap=True)
    for result in results:
        cells = [_shown(result.metrics[name]) for name in names]
        table.add_row(result.checkpoint, str(result.images), *cells, f"{result.seconds:.1f}")
    if held_out:
        table.add_section()
        cells = [_shown(held_out.metrics[name]) for name in names]
        table.add_row(f"real held-out ({held_out.samples})", "", *cells, f"{held_out.seconds:.1f}")
    return table


def _all_metrics(book: "ResultBook") -> "Table | None":
    """Every metric of the newest result, where there are more than the two of the other table."""
    from rich.table import Table

    results = book.results()
    if not results or len(results[-1].metrics) <= 2:
        return None
    newest = results[-1]
    table = Table(title=f"all metrics of {newest.checkpoint}")
    for heading in ("metric", "samples", f"real held-out ({newest.held_out_samples})"):
        table.add_column(heading, justify="left" if heading == "metric" else "right", no_wrap=True)
    for name, metric in newest.metrics.items():
        real = newest.held_out.get(name)
        table.add_row(name, _shown(metric), _shown(real) if real else "")
    return table


def _warnings(book: "ResultBook") -> list[str]:
    """What the numbers' readers must know, each once."""
    texts = dict.fromkeys(warning for result in book.results() for warning in result.warnings)
    held_out = book.held_out()
    return [*texts, *(f"held-out: {warning}" for warning in (held_out.warnings if held_out else []))]


# Behind those of a run, in the order of `ddpm eval --help`.
app.command()(compare)
app.command()(reference)
app.command()(selftest)
