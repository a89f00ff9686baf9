"""`ddpm doctor`: check this machine, its storage and its feature weights."""

import json
from dataclasses import asdict
from typing import Annotated, Final

import typer

from data_pipeline.errors import ExitCode

SCHEMA: Final = "doctor/1"

app = typer.Typer()


@app.command()
def doctor(
    store: Annotated[
        str | None, typer.Option(help="Try reading and writing at this URL (a run's folder, or a bucket).")
    ] = None,
    features: Annotated[str, typer.Option(help="effnetlite0, or inception=PATH_OR_URL.")] = "effnetlite0",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document instead of lines.")] = False,
) -> None:
    """Check devices, precision, DeepSpeed, storage and feature weights; exit 1 if one must be mended."""
    from rich.console import Console
    from rich.text import Text

    from launch.doctor import Status, examine

    styles = {Status.OK: "green", Status.WARN: "yellow", Status.FAIL: "bold red"}
    console = Console(highlight=False, soft_wrap=True)
    findings = []
    for finding in examine(store, features):
        findings.append(finding)
        if as_json:
            continue
        status = Text(f"{finding.status:<5}", style=styles[finding.status])
        console.print(status, Text(f"{finding.name}: {finding.detail}"))
        if finding.remedy:
            console.print(Text(f"      -> {finding.remedy}"))
    if as_json:
        document = {"schema": SCHEMA, "findings": [asdict(finding) for finding in findings]}
        print(json.dumps(document, indent=2))
    failed = any(finding.status is Status.FAIL for finding in findings)
    raise typer.Exit(ExitCode.FAILED if failed else ExitCode.FINISHED)
