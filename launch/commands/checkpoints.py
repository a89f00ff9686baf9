"""`ddpm checkpoints`: what a run has published."""

import json
import os
import socket
import uuid
from typing import Annotated, Any

import typer

app = typer.Typer(
    no_args_is_help=True, help="List, show, verify and compare the checkpoints of a run; clean up after it."
)
RunUrl = Annotated[str, typer.Argument(metavar="RUN", help="The run directory: a folder or URL.")]
Name = Annotated[str | None, typer.Argument(help="A checkpoint's name; default: the newest live one.")]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
MOST_TENSORS = 10
"""How many of the most changed tensors `diff` shows."""


def _worker() -> str:
    """What this process calls itself where it pins a checkpoint."""
    return f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"


@app.command("list")
def list_checkpoints(run_url: RunUrl, as_json: AsJson = False) -> None:
    """List the published checkpoints.

    Those that a later attempt branched off before are superseded: readable, but no part of the run any more.
    Marked are those that an evaluation found best and those that somebody is reading (pinned).
    """
    from trainer.manifest import DamagedCheckpointError, parse_checkpoint_name
    from trainer.retention import best_checkpoints
    from trainer.run import CheckpointGoneError, Run

    run = Run(run_url)
    run.recipe()
    live, pins, best = set(run.live_checkpoints()), run.pins(), best_checkpoints(run)
    rows: list[dict[str, Any]] = []
    for name in run.checkpoints():
        images, attempt = parse_checkpoint_name(name)
        row: dict[str, Any] = {
            "name": name,
            "images": images,
            "attempt": attempt,
            "live": name in live,
            "damaged": False,
        }
        row |= {"best": name in best, "pinned": len(pins.get(name, []))}
        try:
            row["bytes"] = sum(entry.bytes for entry in run.manifest(name).files)
            row["sha256"] = run.manifest_sha256(name)
        except CheckpointGoneError:
            continue  # retention was faster
        except DamagedCheckpointError:
            row |= {"damaged": True, "bytes": 0, "sha256": None}
        rows.append(row)
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        state = "live" if row["live"] else "superseded"
        marks = ", ".join(mark for mark in ("damaged", "best", "pinned") if row[mark])
        size = f"{row['bytes'] / 1e6:,.1f} MB"
        print(f"{row['name']}  {state:10}  {size:>12}  {row['sha256'] or '-':64}  {marks}".rstrip())


@app.command("show")
def show(run_url: RunUrl, name: Name = None) -> None:
    """Print a checkpoint's manifest."""
    from trainer.run import Run

    run = Run(run_url)
    run.recipe()
    print(run.manifest(run.select(name)).to_json().decode(), end="")


@app.command("verify")
def verify(
    run_url: RunUrl,
    name: Name = None,
    everything: Annotated[bool, typer.Option("--all", help="All published ones.")] = False,
) -> None:
    """Read every file of a checkpoint and check size and SHA-256; exit 1 if one fails."""
    from data_pipeline.errors import UserError
    from trainer.checkpoint import verify as verify_checkpoint
    from trainer.manifest import DamagedCheckpointError
    from trainer.run import CheckpointGoneError, Run

    if everything and name is not None:
        raise UserError(f"--all: verifies every checkpoint; leave out {name}")
    run = Run(run_url)
    run.recipe()
    failed = 0
    for each in run.checkpoints() if everything else [run.select(name)]:
        try:
            with run.pin(each, _worker()) as pin:
                verify_checkpoint(run, pin.manifest, pin.beat)
        except CheckpointGoneError:
            continue  # retention was faster
        except DamagedCheckpointError as error:
            failed += 1
            print(f"{each}: damaged: {error}")
        else:
            size = sum(entry.bytes for entry in pin.manifest.files)
            print(f"{each}: {len(pin.manifest.files)} parts verified, {size / 1e6:,.1f} MB")
    if failed:
        raise typer.Exit(1)


@app.command("diff")
def diff(
    run_url: RunUrl,
    first: Annotated[str, typer.Argument(help="A checkpoint's name.")],
    second: Name = None,
    as_json: AsJson = False,
) -> None:
    """Compare two checkpoints: position, recipe, and how far weights and averages have moved.

    Distances are relative: the norm of the difference over the norm of the first one's weights.
    """
    from rich.console import Console
    from rich.table import Table

    from trainer.compare import compare
    from trainer.run import Run

    run = Run(run_url)
    run.recipe()
    one, other = run.select(first), run.select(second)
    with run.pin(one, _worker()), run.pin(other, _worker()):
        found = compare(run, one, other)
    if as_json:
        print(found.to_json().decode(), end="")
        return
    console = Console(highlight=False, soft_wrap=True)
    about = Table("manifest", found.first, found.second, box=None)
    for key, values in found.manifest.items():
        about.add_row(key, *values)
    console.print(about)
    for line in found.recipe.values():
        console.print(f"recipe: {line}", markup=False)
    for part in found.weights:
        distance = "identical" if part.identical else f"relative L2 distance {part.relative_l2:.3e}"
        console.print(f"\n{part.name}: {distance}")
        if not part.identical:
            table = Table("relative L2", "largest", "most changed", box=None)
            for tensor in part.tensors[:MOST_TENSORS]:
                table.add_row(f"{tensor.relative_l2:.3e}", f"{tensor.largest:.3e}", tensor.parameter)
            console.print(table)
    for average in found.only_in_one:
        console.print(f"{average}: only in one of them")


@app.command("gc")
def gc(
    run_url: RunUrl,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would be removed.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove what dead attempts left: folders of parts without a manifest.

    Published checkpoints are never touched, nor is what the newest attempt may still be writing, nor what
    somebody who pinned it may still be reading.
    """
    from trainer.retention import orphans
    from trainer.run import Run

    run = Run(run_url)
    run.recipe()
    rows: list[dict[str, Any]] = []
    for orphan in orphans(run):
        removed = not dry_run and not orphan.pins
        if removed:
            run.storage.delete_folder(orphan.path)
        rows.append({"path": orphan.path, "bytes": orphan.bytes, "pins": orphan.pins, "removed": removed})
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        kept = f"kept: pinned by {', '.join(row['pins'])}" if row["pins"] else "would be removed"
        print(f"{row['path']}  {row['bytes'] / 1e6:>10,.1f} MB  {'removed' if row['removed'] else kept}")
    print(f"{len(rows)} orphaned folders, {sum(row['bytes'] for row in rows) / 1e6:,.1f} MB")
