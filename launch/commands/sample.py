"""`ddpm sample`: pictures from a checkpoint. A thin shell over `eval.sampling`."""

from pathlib import Path
from typing import Annotated

import typer


def sample(
    run_url: Annotated[str, typer.Argument(metavar="RUN", help="The run directory: a folder or URL.")],
    out: Annotated[Path, typer.Option(help="Folder for 000000.png …, grid.png and samples.json.")],
    number: Annotated[int, typer.Option("-n", "--number", min=1, help="How many pictures.")] = 64,
    checkpoint: Annotated[str | None, typer.Option(help="Its name. Default: the newest live one.")] = None,
    ema: Annotated[
        str | None, typer.Option(help="EMA profile, or raw. Default: that of the first evaluation spec.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Sampling steps. Default: those of the first evaluation spec.")
    ] = None,
    sampler: Annotated[
        str | None,
        typer.Option(help="ddim, ancestral, dpm-solver++, unipc. Default: the first evaluation spec's."),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(min=0, max=2**63 - 1, help="Seed: picture i depends on (checkpoint, seed, i) alone."),
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print samples.json instead of a line.")] = False,
) -> None:
    """Draw pictures from the EMA weights of a checkpoint of RUN."""
    import torch

    from data_pipeline.errors import UserError
    from eval.draw import DrawOptions, draw
    from trainer.run import CheckpointGoneError, Run

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        facts = draw(Run(run_url), out, DrawOptions(number, checkpoint, ema, steps, seed, sampler), device)
    except CheckpointGoneError as error:
        raise UserError(f"{error}; name another checkpoint") from error
    if as_json:
        print(facts.to_json().decode(), end="")
    else:
        print(f"{out}/grid.png: {number} pictures of {facts.checkpoint}, {facts.ema}, {facts.steps} steps")
