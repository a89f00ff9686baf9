"""Metrics of the training loop: JSON-lines segments in the run directory, and the loggers beside them.

Object stores cannot append, so rows are kept and published as create-only segments, one per checkpoint:
what stands in the run's metrics up to a checkpoint is exactly what led to it.
"""

import functools
import json
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
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
        self._unpublished: deque[Callable[[], object]] = deque()

    def log(self, images: int, values: Mapping[str, float]) -> None:
        """Add one row of scalars at this point of the image clock."""
        values = {**values, "logger_errors": float(sum(logger.errors for logger in self._loggers))}
        row = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._rows.append(json.dumps({"schema": _ROW_SCHEMA, "images": images, **row}, allow_nan=False))
        for logger in self._loggers:
            logger.log(images, values)

    def cut(self, images: int) -> None:
        """Close the segment with the rows so far, named by its first images; `flush` publishes it."""
        if not self._rows:
            return
        path = f"metrics/{self._attempt:06d}/{self._segment_start:010d}.jsonl"
        content = ("\n".join(self._rows) + "\n").encode()
        self._rows, self._segment_start = [], images
        self._unpublished.append(functools.partial(self._run.storage.create, path, content))
        self._unpublished.extend(logger.cut() for logger in self._loggers)

    def flush(self) -> None:
        """Publish what was cut; what fails stays for the next time. Another thread may log and cut."""
        while self._unpublished:
            self._unpublished[0]()
            self._unpublished.popleft()

    def close(self) -> None:
        """Close the loggers; rows not published are lost with the steps they describe."""
        for logger in self._loggers:
            logger.close()
