"""Metrics of the training loop: JSON-lines segments in the run directory, and TensorBoard.

Object stores cannot append, so rows are kept and published as create-only segments, one per checkpoint:
what stands in the run's metrics up to a checkpoint is exactly what led to it.
"""

import json
import math
import tempfile
from pathlib import Path
from typing import Final

from torch.utils.tensorboard.writer import SummaryWriter

from trainer.run import Run

_ROW_SCHEMA: Final = "metrics/1"


class MetricsLog:
    """Rows of one attempt, on rank 0.

    Args:
        run: The run directory.
        attempt: This attempt's number.
        images: The images seen when the attempt began.
        tensorboard: Whether event files are written as well.
    """

    def __init__(self, run: Run, attempt: int, images: int, *, tensorboard: bool) -> None:
        self._run, self._attempt = run, attempt
        self._rows: list[str] = []
        self._tensorboard = tensorboard
        self._segment_start = images
        self._events: SummaryWriter | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def log(self, images: int, values: dict[str, float]) -> None:
        """Add one row of scalars at this point of the image clock."""
        row = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._rows.append(json.dumps({"schema": _ROW_SCHEMA, "images": images, **row}, allow_nan=False))
        if not self._tensorboard:
            return
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="ddpm-events-")
        if self._events is None:
            self._events = SummaryWriter(self._folder.name)
        for name, value in values.items():
            self._events.add_scalar(name, value, global_step=images)

    def publish(self, images: int) -> None:
        """Publish the rows so far as one segment, named by the images at its start."""
        if not self._rows:
            return
        segment = f"{self._attempt:06d}/{self._segment_start:010d}"
        self._run.storage.create(f"metrics/{segment}.jsonl", ("\n".join(self._rows) + "\n").encode())
        self._rows, self._segment_start = [], images
        if self._events is not None and self._folder is not None:
            self._events.close()
            self._events = None
            for file in sorted(Path(self._folder.name).iterdir()):
                self._run.storage.upload(f"tensorboard/{self._attempt:06d}/{file.name}", file)
                file.unlink()

    def close(self) -> None:
        """Drop temporary files; rows not published are lost with the steps they describe."""
        if self._events is not None:
            self._events.close()
        if self._folder is not None:
            self._folder.cleanup()
