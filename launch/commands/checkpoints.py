"""`ddpm checkpoints`: what a run has published."""

import json
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="List, show and verify the checkpoints of a run.")
RunUrl = Annotated[str, typer.Argument(metavar="RUN", help="The run directory: a folder or URL.")]
Name = Annotated[str | None, typer.Argument(help="A checkpoint's name; default: the newest live one.")]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]


@app.command("list")
def list_checkpoints(run_url: RunUrl, as_json: AsJson = False) -> None:
    """List the published checkpoints; those a later attempt branched off before are marked superseded."""
    from trainer.run import Run

    run = Run(run_url)
    run.recipe()
    live = set(run.live_checkpoints())
    rows = [
        {
            "name": name,
            "live": name in live,
            "megabytes": round(sum(entry.bytes for entry in run.manifest(name).files) / 1e6, 1),
            "sha256": run.manifest_sha256(name),
        }
        for name in run.checkpoints()
    ]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        state = "live" if row["live"] else "superseded"
        print(f"{row['name']}  {state:10}  {row['megabytes']:>10} MB  {row['sha256']}")


@app.command("show")
def show(run_url: RunUrl, name: Name = None) -> None:
    """Print a checkpoint's manifest."""
    from trainer.run import Run

    run = Run(run_url)
    run.recipe()
    print(run.manifest(run.select(name)).to_json().decode(), end="")


@app.command("verify")
def verify(run_url: RunUrl, name: Name = None) -> None:
    """Read every part of a checkpoint and check size and hash; exit 1 if one fails."""
    from trainer.checkpoint import verify as verify_checkpoint
    from trainer.run import Run

    run = Run(run_url)
    run.recipe()
    manifest = run.manifest(run.select(name))
    verify_checkpoint(run, manifest)
    print(f"{manifest.name}: {len(manifest.files)} parts verified")
