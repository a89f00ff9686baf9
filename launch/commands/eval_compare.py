"""`ddpm eval compare`: two checkpoints under common noise. A thin shell over `eval.compare`."""

from typing import Annotated

import typer

from data_pipeline.errors import ExitCode, UserError
from launch.commands.eval_team import AsJson, FeaturesOption, Threads, joined_team


def compare(
    run_url: Annotated[str, typer.Argument(metavar="RUN", help="The run directory: a folder or URL.")],
    checkpoint: Annotated[str | None, typer.Argument(help="Default: the newest live one.")] = None,
    other_checkpoint: Annotated[
        str | None, typer.Argument(metavar="OTHER", help="What it is compared with. Default: the newest one.")
    ] = None,
    other_run: Annotated[
        str | None, typer.Option(metavar="RUN", help="OTHER is a checkpoint of this run. Default: the same.")
    ] = None,
    ema: Annotated[
        str | None, typer.Option(help="Its weights: an EMA profile or raw. Default: as the specification.")
    ] = None,
    other_ema: Annotated[str | None, typer.Option(help="Likewise of OTHER.")] = None,
    spec: Annotated[
        str | None,
        typer.Option(help="Specification of the recipe's section `evaluation`. Default: the first."),
    ] = None,
    features: FeaturesOption = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Compare two checkpoints, or two kinds of weights, with samples from the same noise, and an interval.

    For example: `ddpm eval compare RUN 0000064000-000001 0000128000-000001`, or the average against the
    weights themselves: `ddpm eval compare RUN --other-ema raw`.
    """
    from eval.compare import Contender
    from eval.compare import compare as compare_contenders
    from eval.team import Stopped
    from trainer.run import CheckpointGoneError, Run

    with joined_team(threads) as team:
        a = Contender(Run(run_url), checkpoint, ema)
        b = Contender(Run(other_run or run_url), other_checkpoint, other_ema)
        try:
            found = compare_contenders(a, b, spec, features, team)
        except CheckpointGoneError as error:
            raise UserError(f"{error}; name another checkpoint") from error
        except Stopped:
            raise typer.Exit(ExitCode.REQUEUE) from None
    if not team.is_main:
        return
    if as_json:
        print(found.to_json().decode(), end="")
        return
    print(f"{found.metric} of {found.samples} samples from the same noise, protocol {found.protocol}")
    for side in (found.a, found.b):
        print(f"  {side.distance:10.4f}  {side.checkpoint} ({side.ema}) of {side.run}")
    print(f"difference {found.difference:+.4f}, 95 % interval [{found.low:+.4f}, {found.high:+.4f}]")
    print(f"the first is better with probability {found.probability_a_better:.3f}")
