"""The command line of training, shared by `launch/train.sh` and `ddpm train`."""

import logging
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from data_pipeline.errors import ExitCode, StorageFault, UserError
from trainer.extensions import BuildError

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Settings over the recipe's, e.g. run=s3://bucket/run data.url=s3://bucket/shards.",
    ),
]
RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A shipped recipe (`ddpm recipe list`) or a .yaml file.")
]


Allowed = Annotated[
    list[str] | None,
    typer.Option(
        "--allow",
        metavar="KEY",
        help="Go on with a run although this key of the recipe (or section) has changed; may be repeated.",
    ),
]
Profile = Annotated[
    str | None,
    typer.Option(
        metavar="steps=A:B",
        help="Profile the attempt's steps A to B-1: one Chrome trace a rank in RUN/profile.",
    ),
]


def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    ranks: Annotated[
        int | None, typer.Option("--ranks", min=1, help="Processes on this node; default: one per GPU, or 2.")
    ] = None,
    num_nodes: Annotated[int, typer.Option("--num_nodes", min=1, help="Nodes of the job.")] = 1,
    node_rank: Annotated[int, typer.Option("--node_rank", min=0, help="Number of this node.")] = 0,
    master_addr: Annotated[
        str, typer.Option("--master_addr", help="Address of node 0, where rank 0 listens.")
    ] = "127.0.0.1",
    master_port: Annotated[
        int | None, typer.Option("--master_port", min=1, max=65535, help="Its port; default: a free one.")
    ] = None,
    restarts: Annotated[
        int, typer.Option("--restarts", min=0, help="How often crashed ranks are started again.")
    ] = 2,
    allow: Allowed = None,
    profile: Profile = None,
    dry: Annotated[
        bool, typer.Option("--dry-run", help="Show batches, memory, storage traffic and time; start nothing.")
    ] = False,
    images_per_second: Annotated[
        float | None,
        typer.Option("--images-per-second", min=1e-9, help="Of the whole job, for --dry-run's times."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: print JSON.")] = False,
) -> None:
    """Train RECIPE on this node; the same command resumes an existing run.

    Needed: run=FOLDER_OR_URL (the run directory) and data.url=FOLDER_OR_URL (shards of `ddpm data build`).
    Exit codes: 0 finished, 1 failed, 2 user's mistake, 75 stopped early: start it again to go on.
    """
    if dry:
        _show_plan(recipe, overrides or [], ranks, num_nodes, images_per_second, allow or [], as_json=as_json)
        return
    from trainer.supervisor import Placement, supervise

    logging.basicConfig(level=logging.INFO, format="[supervisor] %(message)s", stream=sys.stderr)
    placement = Placement(ranks, num_nodes, node_rank, master_addr, master_port)
    raise typer.Exit(
        supervise(recipe, overrides or [], placement, restarts, allowed=allow or [], profile=profile)
    )


def worker(
    recipe: RecipeName, overrides: Overrides = None, allow: Allowed = None, profile: Profile = None
) -> None:
    """Train as one rank of a job that a launcher has started (it sets RANK, WORLD_SIZE, LOCAL_RANK)."""
    from trainer.worker import main

    raise typer.Exit(main(recipe, overrides or [], allow or [], profile))


def _show_plan(
    recipe_name: str,
    overrides: list[str],
    ranks: int | None,
    nodes: int,
    images_per_second: float | None,
    allowed: list[str],
    *,
    as_json: bool,
) -> None:
    import torch
    from rich.console import Console

    from trainer.dry_run import dry_run
    from trainer.dry_run_report import report
    from trainer.peak_flops import device_peak_flops
    from trainer.recipe import load_recipe
    from trainer.run import Run

    recipe = load_recipe(recipe_name, overrides)
    gpus = torch.cuda.device_count()
    plan = dry_run(
        recipe,
        Run(recipe.run) if recipe.run else None,
        ranks or gpus or 1,
        nodes,
        images_per_second=images_per_second,
        peak=device_peak_flops(torch.device("cuda", 0), recipe.precision) if gpus else None,
        gpu_gib=torch.cuda.get_device_properties(0).total_memory / 2**30 if gpus else None,
        allowed=allowed,
    )
    if as_json:
        print(plan.to_json().decode(), end="")
    else:
        Console().print(report(plan))


def report_errors(program: Callable[[], None]) -> None:
    """Run a command-line program; a user's mistake ends in one line and exit code 2, never a traceback."""
    try:
        program()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(ExitCode.USER_MISTAKE) from None
    except (StorageFault, BuildError) as error:
        print(f"failed: {error}", file=sys.stderr)
        raise SystemExit(ExitCode.FAILED) from None
