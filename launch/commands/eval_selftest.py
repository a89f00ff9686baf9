"""`ddpm eval selftest`: known numbers beside those measured here. A thin shell over `eval.selftest`."""

from typing import TYPE_CHECKING, Annotated

import typer

from data_pipeline.errors import ExitCode, UserError
from launch.commands.eval_team import AsJson, Threads, joined_team

if TYPE_CHECKING:
    from eval.selftest import Check


def selftest(
    features: Annotated[
        str | None, typer.Option(help="The original Inception: inception=PATH_OR_URL. Default: without.")
    ] = None,
    cifar10: Annotated[
        str | None,
        typer.Option(metavar="SHARDS", help="CIFAR-10's own training pictures, for the published score."),
    ] = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Print known numbers beside those that this installation computes; exit code 1 if one is another.

    CIFAR-10's pictures must be the original ones: `ddpm data build cifar10 ARCHIVE --out SHARDS`.
    """
    from eval.features import ResizeMode, parse_choice
    from eval.selftest import selftest as run_selftest
    from eval.team import Stopped

    if cifar10 is not None and features is None:
        raise UserError("--cifar10: its score is of the original Inception; add --features inception=FILE")
    choice = parse_choice(features, ResizeMode.LEGACY_TENSORFLOW) if features else None
    with joined_team(threads) as team:
        quiet = as_json or not team.is_main
        try:
            found = run_selftest(team, choice, cifar10, (lambda check: None) if quiet else _print)
        except Stopped:
            raise typer.Exit(ExitCode.REQUEUE) from None
        if as_json and team.is_main:
            print(found.to_json().decode(), end="")
    if not found.ok:
        raise typer.Exit(ExitCode.FAILED)


def _print(check: "Check") -> None:
    verdict = "ok" if check.ok else "OTHER"
    print(
        f"{verdict:5}  {check.name}: {check.measured:.6g}, known {check.expected:.6g} ({check.source})",
        flush=True,
    )
