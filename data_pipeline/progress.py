"""Progress for people: a Rich bar on a terminal, a plain line now and then elsewhere."""

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Progress:
    """Report the progress of one long job on standard error, with rate and ETA.

    Args:
        what: Short name of the job, e.g. "build".
        total: How many units there are in all; None if unknown.
        unit: What is counted, e.g. "img".
        start: Units already done before this process began; they do not count towards the rate.
        every_seconds: Seconds between plain lines when standard error is no terminal.
        silent: Show nothing; for the processes of a job that do not speak for it.
    """

    def __init__(
        self,
        what: str,
        total: int | None,
        unit: str,
        *,
        start: int = 0,
        every_seconds: float = 10.0,
        silent: bool = False,
    ) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._start, self._done = start, start
        self._every = every_seconds
        self._silent = silent
        self._began = time.monotonic()
        self._next_line = self._began
        self._facts: dict[str, str] = {}
        self._bar: RichProgress | None = None
        if not silent and sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"))
            self._bar = RichProgress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task(what, total=total, completed=start, text="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None and self._done > self._start:
            self._print_line(self._facts)

    def update(self, done: int, **facts: str) -> None:
        """State that `done` units are finished in all; `facts` are shown beside, e.g. loss="0.031"."""
        self._done, self._facts = done, facts
        if self._bar is not None:
            self._bar.update(self._task, completed=done, text=self._text(facts))
        elif time.monotonic() >= self._next_line:
            self._print_line(facts)

    def _text(self, facts: dict[str, str]) -> str:
        seconds = max(time.monotonic() - self._began, 1e-9)
        rate = (self._done - self._start) / seconds
        parts = [f"{self._done}/{self._total} {self._unit}" if self._total else f"{self._done} {self._unit}"]
        parts.append(f"{rate:,.0f} {self._unit}/s" if rate >= 100 else f"{rate:.3g} {self._unit}/s")
        if self._total and rate > 0:
            parts.append(f"ETA {_duration(max(self._total - self._done, 0) / rate)}")
        parts.extend(f"{name} {value}" for name, value in facts.items())
        return " | ".join(parts)

    def _print_line(self, facts: dict[str, str]) -> None:
        if not self._silent:
            print(f"{self._what}: {self._text(facts)}", file=sys.stderr, flush=True)
        self._next_line = time.monotonic() + self._every
