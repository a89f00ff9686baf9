"""A trace of some training steps for Perfetto or chrome://tracing."""

import logging
import re
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from torch.profiler import ProfilerAction, profile, record_function

from data_pipeline.errors import StorageFault, UserError
from trainer.run import Run

log = logging.getLogger(__name__)

_STEPS: Final = re.compile(r"steps=(\d+):(\d+)")
_LONGEST: Final = 1000
"""Steps of a trace: some 10 MB each of a large network, more than a viewer opens."""


def parse_profile(text: str) -> range:
    """Read `--profile`.

    Args:
        text: "steps=FIRST:STOP": the half-open range of steps, counted from 0 where the attempt starts.

    Returns:
        The steps to trace.

    Raises:
        UserError: It is written differently, is empty, or longer than 1000 steps.
    """
    match = _STEPS.fullmatch(text)
    if match is None:
        raise UserError(f"--profile {text}: write steps=FIRST:STOP, e.g. --profile steps=20:25")
    steps = range(int(match[1]), int(match[2]))
    if not steps:
        raise UserError(f"--profile {text}: no step lies there; STOP must exceed FIRST, e.g. steps=20:25")
    if len(steps) > _LONGEST:
        raise UserError(f"--profile {text}: a trace holds at most {_LONGEST} steps; choose fewer, e.g. 5")
    return steps


class StepProfiler:
    """Traces some steps of the training loop on one rank; use as a context manager around the loop.

    The trace is written to `RUN/profile/<attempt>/rank-NNNN.json.gz` as soon as its last step has ended,
    or where the loop ends before. A loop that fails writes none.

    Args:
        run: The run directory.
        attempt: This attempt's number.
        rank: This process.
        steps: Which steps to trace, counted from 0 where the context is entered; None for none, at no cost.
    """

    def __init__(self, run: Run, attempt: int, rank: int, steps: range | None) -> None:
        self._run, self._steps = run, steps
        self._path = f"profile/{attempt:06d}/rank-{rank:04d}.json.gz"
        self._profile: profile | None = None
        self._written = False

    def __enter__(self) -> Self:
        if self._steps is not None:
            self._profile = profile(
                schedule=_schedule(self._steps), on_trace_ready=self._write, record_shapes=True
            )
            self._profile.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._profile is None:
            return
        assert self._steps is not None
        # What failed shall be heard of, not the storage's complaint; a step that never ran makes no trace.
        if kind is not None or self._profile.step_num <= self._steps.start:
            self._profile.on_trace_ready = None
        self._stop()
        if kind is None and not self._written:
            log.warning("--profile: training ended before step %d, so there is no trace", self._steps.start)

    def step(self) -> None:
        """Tell that a step has ended."""
        if self._profile is None:
            return
        self._profile.step()
        if self._written:
            self._stop()

    def span(self, name: str) -> AbstractContextManager[object]:
        """Name what is done inside in the trace, if one is being made."""
        return nullcontext() if self._profile is None else record_function(name)

    def _stop(self) -> None:
        assert self._profile is not None
        self._profile.stop()
        self._profile = None

    def _write(self, traced: profile) -> None:
        self._written = True
        try:
            with tempfile.TemporaryDirectory(prefix="ddpm-profile-") as folder:
                file = Path(folder) / "trace.json.gz"
                traced.export_chrome_trace(str(file))
                self._run.storage.upload(self._path, file)
        except (StorageFault, UserError, OSError) as error:
            log.warning("--profile: the trace is lost, training goes on: %s", error)
            return
        log.info("trace of steps written to %s/%s; open it on ui.perfetto.dev", self._run.url, self._path)


def _schedule(steps: range) -> Callable[[int], ProfilerAction]:
    """Warm up one step before the first, so that its own start-up is not in the trace."""

    def action(step: int) -> ProfilerAction:
        if step == steps[-1]:
            return ProfilerAction.RECORD_AND_SAVE
        if step in steps:
            return ProfilerAction.RECORD
        return ProfilerAction.WARMUP if step == steps.start - 1 else ProfilerAction.NONE

    return action
