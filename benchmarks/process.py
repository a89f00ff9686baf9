"""A contender in a process of its own, which answers one JSON line for every JSON line; or in several."""

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from trainer.tether import tethered

ANSWER_SECONDS = 900.0
"""Longer than anything takes that does not hang."""


class Hang(RuntimeError):
    """A process did not answer in time."""


class AnsweringProcess:
    """A process that is told its job and then asked, as a context manager; it ends with its stdin.

    A process each, because contenders keep threads, caches and shared memory, and so that processor time
    counts for one of them alone.

    Args:
        module: What runs in it; its stdout is for answers only.
        name: In messages.
        job: The first line it gets, JSON.
        env: Added to this process's environment.
        log: What it prints goes there.
    """

    def __init__(self, module: str, name: str, job: str, env: Mapping[str, str], log: Path) -> None:
        self._module, self._name, self._first, self._log = module, name, job, log
        self._env = {**os.environ, **env}

    def __enter__(self) -> Self:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                tethered([sys.executable, "-m", self._module]),
                cwd=Path(__file__).parents[1],
                env=self._env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        self._send(self._first)
        return self

    def __exit__(self, *_: object) -> None:
        with self._process:  # closes both pipes
            pass

    def ask(self, do: str, *, seconds: float = ANSWER_SECONDS, **arguments: object) -> Any:
        """Let it do something and return its answer.

        Raises:
            Hang: No answer in so many seconds; the process is killed.
            ChildProcessError: It has ended.
        """
        self.tell(do, **arguments)
        return self.answer(do, seconds=seconds)

    def tell(self, do: str, **arguments: object) -> None:
        """Let it do something; `answer` is to be called next."""
        self._send(json.dumps({"do": do, **arguments}))

    def answer(self, do: str, *, seconds: float = ANSWER_SECONDS) -> Any:
        """Return its answer to what it was told.

        Raises:
            Hang: No answer in so many seconds; the process is killed.
            ChildProcessError: It has ended.
        """
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], seconds)[0]:
            self._process.kill()
            raise Hang(f"{self._name}: no answer to {do!r} in {seconds:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            end = "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])
            raise ChildProcessError(f"{self._name} has ended at {do!r}; end of its log:\n{end}")
        return json.loads(line)

    def kill(self) -> None:
        """End it at once, whatever it is waiting for."""
        self._process.kill()

    def _send(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()


class AnsweringCrew:
    """Processes that work together, as a context manager.

    Args:
        processes: By rank.
    """

    def __init__(self, processes: Sequence[AnsweringProcess]) -> None:
        self.processes = list(processes)

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            for process in self.processes:
                stack.enter_context(process)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:  # one may be waiting for another that is gone
            self.kill()
        self._stack.close()

    def ask(self, do: str, *, seconds: float = ANSWER_SECONDS, **arguments: object) -> list[Any]:
        """Let all do something; return their answers, by rank.

        Raises:
            Hang: One does not answer in time.
            ChildProcessError: One has ended.
        """
        self.tell(do, **arguments)
        return [process.answer(do, seconds=seconds) for process in self.processes]

    def tell(self, do: str, **arguments: object) -> None:
        """Let all do something."""
        for process in self.processes:
            process.tell(do, **arguments)

    def kill(self) -> None:
        """End all at once, whatever they are doing."""
        for process in self.processes:
            process.kill()


def rank_variables(ranks: int) -> list[dict[str, str]]:
    """Return what a launcher on this machine tells every rank of a job on the processor, by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
    }
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
