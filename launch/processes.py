"""Child programs of one command: tethered to it, their lines shown with a name, ended on every way out."""

import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from trainer.tether import tethered

_END_SECONDS: Final = 20.0


class Child:
    """A running program whose output is copied to a log file and, line by line with a name, to the terminal.

    Leaving the context ends the program at once if it still runs: first SIGTERM, then SIGINT (our
    programs take the second signal as "now"), at last SIGKILL. Start it from the main thread.

    Args:
        name: Shown before each line.
        command: Program and arguments.
        environment: All of its environment.
        log: File that receives the output as well.
    """

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.name = name
        self._log = log
        self._process = subprocess.Popen(
            tethered(command, signal.SIGTERM),
            env=dict(environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C comes to the parent alone, which ends its children in order
            text=True,
            errors="replace",
        )
        self._pump = threading.Thread(target=self._copy_lines, daemon=True)
        self._pump.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
            if self._process.poll() is not None:
                break
            self._process.send_signal(number)
            try:
                self._process.wait(1.0 if number is signal.SIGTERM else _END_SECONDS)
            except subprocess.TimeoutExpired:
                continue
        self._pump.join(_END_SECONDS)

    def poll(self) -> int | None:
        """Return the exit code, or None while the program runs."""
        return self._process.poll()

    def ended_within(self, seconds: float) -> bool:
        """Wait at most so long and tell whether the program has ended."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def wait(self) -> int:
        """Wait for the end and return the exit code."""
        code = self._process.wait()
        self._pump.join(_END_SECONDS)
        return code

    def _copy_lines(self) -> None:
        assert self._process.stdout is not None
        with self._log.open("a") as log:
            for line in self._process.stdout:
                log.write(line)
                log.flush()
                with suppress(OSError):  # a closed terminal must not block the program: keep draining
                    print(f"{self.name:>5} | {line.rstrip()}", file=sys.stderr, flush=True)
