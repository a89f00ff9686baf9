"""Why and when a training process stops early: signals, the supervisor's word, the wall-clock budget."""

import math
import os
import select
import signal
import threading
import time
from enum import IntEnum
from pathlib import Path
from types import FrameType
from typing import Final

from data_pipeline.errors import ExitCode

CONTROL_VARIABLE: Final = "DDPM_CONTROL"
"""Environment variable naming the folder through which the supervisor of this node speaks."""
SUPERVISOR_VARIABLE: Final = "DDPM_SUPERVISOR_PID"
ORPHAN_SECONDS: Final = 60.0
"""How long a process without its launcher or supervisor may take to save and end."""


class StopReason(IntEnum):
    """Ordered by weight: the largest of all ranks' reasons counts."""

    NONE = 0
    BUDGET = 1
    """The wall-clock budget is used up: the run counts as finished."""
    REQUESTED = 2
    """A signal or the supervisor asked for it: the run is to be resumed."""
    FAULT = 3
    """A checkpoint could not be written for a reason that time does not mend."""


class StopRequest:
    """One process's view of whether training shall stop; asked once per step.

    Signal handlers only set a flag: the step boundary, agreed on by all ranks, is where training stops.
    The launcher above this process and the supervisor of the node are watched as well: when one of them
    dies, nobody is left to stop this process, so it stops itself.
    """

    def __init__(self) -> None:
        self._deadline = math.inf
        self._requested = threading.Event()
        control = os.environ.get(CONTROL_VARIABLE)
        self._stop_file = Path(control, "stop") if control else None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._on_signal)
        guardians = {os.getppid(), int(os.environ.get(SUPERVISOR_VARIABLE, os.getppid()))}
        for guardian in guardians:
            threading.Thread(target=self._watch, args=(guardian,), daemon=True).start()

    def start_budget(self, max_minutes: float | None) -> None:
        """Let the wall-clock budget begin now; None for none."""
        self._deadline = math.inf if max_minutes is None else time.monotonic() + 60.0 * max_minutes

    def reason(self) -> StopReason:
        """Return this process's reason to stop, if any."""
        if self._requested.is_set() or (self._stop_file is not None and self._stop_file.exists()):
            return StopReason.REQUESTED
        return StopReason.BUDGET if time.monotonic() >= self._deadline else StopReason.NONE

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._requested.set()

    def _watch(self, guardian: int) -> None:
        try:
            descriptor = os.pidfd_open(guardian)
        except ProcessLookupError:
            pass  # dead already
        else:
            select.select([descriptor], [], [])  # readable once that process has ended
            os.close(descriptor)
        self._requested.set()
        # A process still starting up, or waiting for ranks that are gone, sees no step boundary.
        threading.Event().wait(ORPHAN_SECONDS)
        os._exit(ExitCode.FAILED)
