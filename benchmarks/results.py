"""`python -m benchmarks.results RUN --out FOLDER`: a run in one picture and two tables.

Draws the loss and the distance over images, from the metrics that the run's lineage published and from its
evaluation, and prints the tables: attempts, and checkpoints with their hashes. Nothing is left out.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.report import table
from eval.results import ResultBook, books
from trainer.run import Run

ATTEMPT_HEADER = ("attempt", "from", "rows up to", "ended")
CHECKPOINT_HEADER = ("checkpoint", "manifest SHA-256", "loss since the last", "distance")
_SMOOTHED = 10  # rows of the loss averaged for the line that is easy to follow


def live_rows(run: Run) -> list[dict[str, Any]]:
    """Rows of metrics of the newest attempt's lineage, by images: what is part of the trained weights."""
    limits = run.lineage()
    rows = [
        row
        for attempt, limit in limits.items()
        for row in attempt_rows(run, attempt)
        if limit is None or row["images"] <= limit
    ]
    return sorted(rows, key=lambda row: row["images"])


def attempt_rows(run: Run, attempt: int) -> list[dict[str, Any]]:
    """All rows that one attempt published."""
    folder = f"metrics/{attempt:06d}"
    return [
        json.loads(line)
        for segment in run.storage.list(folder)
        for line in run.storage.read(f"{folder}/{segment}").decode().splitlines()
    ]


def attempts_table(run: Run) -> str:
    """Every start of the trainer, and how it ended."""
    rows = []
    for attempt in run.attempts():
        path = f"attempts/{attempt.attempt:06d}.end.json"
        ended = "killed"
        if run.storage.exists(path):
            ended = json.loads(run.storage.read(path))["outcome"]
        last = max((row["images"] for row in attempt_rows(run, attempt.attempt)), default=0)
        rows.append((str(attempt.attempt), attempt.parent or "random weights", f"{last:,}", ended))
    return table(ATTEMPT_HEADER, rows)


def checkpoints_table(run: Run, rows: Sequence[dict[str, Any]], distances: dict[str, float]) -> str:
    """Every live checkpoint with its hash, the mean loss that led to it, and its distance."""
    lines, before = [], 0
    for name in run.live_checkpoints():
        images = run.manifest(name).images
        losses = [row["loss"] for row in rows if before < row["images"] <= images]
        distance = f"{distances[name]:.2f}" if name in distances else "-"
        loss = f"{np.mean(losses):.4f}" if losses else "-"
        lines.append((name, run.manifest_sha256(name)[:12], loss, distance))
        before = images
    return table(CHECKPOINT_HEADER, lines)


def draw(rows: Sequence[dict[str, Any]], book: ResultBook | None, file: Path) -> None:
    """Draw the loss and, if the run was evaluated, the distance over images into one picture."""
    figure, axes = plt.subplots(1, 2 if book else 1, figsize=(10 if book else 5, 3.6), layout="constrained")
    left = np.atleast_1d(axes)[0]
    images, loss = (np.array([row[key] for row in rows], dtype=float) for key in ("images", "loss"))
    left.plot(images / 1000, loss, color="0.8", linewidth=0.8, label="one row of metrics")
    if len(loss) >= _SMOOTHED:
        smooth = np.convolve(loss, np.full(_SMOOTHED, 1 / _SMOOTHED), mode="valid")
        left.plot(images[_SMOOTHED - 1 :] / 1000, smooth, label=f"mean of {_SMOOTHED}")
    left.set(xlabel="thousand images", ylabel="L_simple", yscale="log")
    left.legend()
    if book is not None:
        _draw_distances(book, axes[1])
    figure.savefig(file, dpi=110)


def _draw_distances(book: ResultBook, right: Axes) -> None:
    name, held_out = book.protocol.features.distance_name, book.held_out()
    distances = [(result.images / 1000, result.metrics[name].value) for result in book.results()]
    right.plot(*zip(*distances, strict=True), marker="o")
    if held_out is not None:
        label = f"{held_out.samples} real held-out pictures"
        right.axhline(held_out.metrics[name].value, linestyle=":", color="0.5", label=label)
        right.legend()
    right.set(xlabel="thousand images", ylabel=name, yscale="log")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        arguments: Of the command line; default: the process's.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.results", description=__doc__)
    parser.add_argument("run", help="the run directory")
    parser.add_argument("--out", type=Path, required=True, help="folder for results-curves.png")
    options = parser.parse_args(arguments)
    run = Run(options.run)
    book = next((book for book in books(run) if book.results()), None)
    distances: dict[str, float] = {}
    if book is not None:
        name = book.protocol.features.distance_name
        distances = {result.checkpoint: result.metrics[name].value for result in book.results()}
    rows = live_rows(run)
    print(attempts_table(run), end="\n\n")
    print(checkpoints_table(run, rows, distances))
    options.out.mkdir(parents=True, exist_ok=True)
    draw(rows, book, options.out / "results-curves.png")


if __name__ == "__main__":
    main()
