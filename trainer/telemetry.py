"""Metrics of the training loop: JSON-lines segments in the run directory, and the loggers beside them.

Object stores cannot append, so rows are kept and published as create-only segments, one per checkpoint:
what stands in the run's metrics up to a checkpoint is exactly what led to it.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Final

from trainer.loggers import Logger
from trainer.run import Run

_ROW_SCHEMA: Final = "metrics/1"


class MetricsLog:
    """Rows of one attempt, on rank 0.

    Args:
        run: The run directory.
        attempt: This attempt's number.
        images: The images seen when the attempt began.
        loggers: Where the rows go besides; closed with this log.
    """

    def __init__(self, run: Run, attempt: int, images: int, loggers: Sequence[Logger] = ()) -> None:
        self._run, self._attempt, self._loggers = run, attempt, loggers
        self._rows: list[str] = []
        self._segment_start = images

    def log(self, images: int, values: Mapping[str, float]) -> None:
        """Add one row of scalars at this point of the image clock."""
        values = {**values, "logger_errors": float(sum(logger.errors for logger in self._loggers))}
        row = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._rows.append(json.dumps({"schema": _ROW_SCHEMA, "images": images, **row}, allow_nan=False))
        for logger in self._loggers:
            logger.log(images, values)

    def publish(self, images: int) -> None:
        """Publish the rows so far as one segment, named by the images at its start."""
        if not self._rows:
            return
        segment = f"{self._attempt:06d}/{self._segment_start:010d}"
        self._run.storage.create(f"metrics/{segment}.jsonl", ("\n".join(self._rows) + "\n").encode())
        self._rows, self._segment_start = [], images
        for logger in self._loggers:
            logger.publish(images)

    def close(self) -> None:
        """Close the loggers; rows not published are lost with the steps they describe."""
        for logger in self._loggers:
            logger.close()
