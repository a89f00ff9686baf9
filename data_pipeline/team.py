"""Processes that do tasks for one: started once, each with a worker object of its own.

    with Team(make_worker, 4) as team:
        pending = [team.start(task) for task in tasks]      # task(worker) runs in some process
        outcomes = [each.result() for each in pending]      # in the order wanted

Tasks, workers' makers and outcomes are pickled. A team of one runs every task in this process, when its
outcome is asked for. The processes die with this one, however it dies: they see its end of the pipe close.
"""

import multiprocessing
import os
import queue
import signal
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from data_pipeline.errors import StorageFault

W = TypeVar("W")
R = TypeVar("R")
Task = Callable[[W], R]


@dataclass
class _Raised:
    error: BaseException


@dataclass(eq=False)
class Pending(Generic[R]):
    """The outcome of a task that was started."""

    _pump: Callable[["Pending[R]"], None]
    _outcome: list[R | _Raised] = field(default_factory=list)

    @property
    def done(self) -> bool:
        """Whether the outcome is there."""
        return bool(self._outcome)

    def result(self) -> R:
        """Wait for the outcome.

        Raises:
            StorageFault: The process that did it died.
            BaseException: What the task raised.
        """
        while not self._outcome:
            self._pump(self)
        (outcome,) = self._outcome
        if isinstance(outcome, _Raised):
            raise outcome.error
        return outcome


@dataclass
class _Member:
    """One process, and the task it is at."""

    process: BaseProcess
    connection: Connection
    at: Pending[Any] | None = None


class Team(Generic[W]):
    """A fixed number of processes.

    Args:
        make: Makes the worker object of each; a picklable callable.
        size: How many; 1: this process itself.
    """

    def __init__(self, make: Callable[[], W], size: int) -> None:
        assert size >= 1
        self.size = size
        self._alone = make() if size == 1 else None
        self._waiting: deque[tuple[Task[W, Any], Pending[Any]]] = deque()
        context = multiprocessing.get_context("spawn")
        self._members: list[_Member] = []
        for _ in range(size if size > 1 else 0):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(make, theirs), daemon=True)
            process.start()
            theirs.close()  # so that its end shows as the end of the pipe
            self._members.append(_Member(process, ours))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for member in self._members:
            member.connection.close()
            member.process.kill()
        for member in self._members:
            member.process.join()

    def start(self, task: Task[W, R], *, next_in_line: bool = False) -> Pending[R]:
        """Have a task done as soon as a process is free.

        Args:
            task: Called with the worker object of its process.
            next_in_line: Before all that are waiting.
        """
        pending: Pending[R] = Pending(self._pump)
        if next_in_line:
            self._waiting.appendleft((task, pending))
        else:
            self._waiting.append((task, pending))
        self._assign()
        return pending

    def _assign(self) -> None:
        for member in self._members:
            if member.at is None and self._waiting:
                task, member.at = self._waiting.popleft()
                try:
                    member.connection.send(task)
                except (BrokenPipeError, ConnectionResetError):
                    raise _died(member) from None

    def _pump(self, wanted: Pending[Any]) -> None:
        """Get on until one more outcome is there."""
        if self._alone is not None:
            place = next(i for i, (_, pending) in enumerate(self._waiting) if pending is wanted)
            task, _ = self._waiting[place]
            del self._waiting[place]
            wanted._outcome.append(task(self._alone))
            return
        by_connection = {member.connection: member for member in self._members}
        for connection in wait(list(by_connection)):
            member = by_connection[connection]  # type: ignore[index]
            try:
                outcome = member.connection.recv()
            except (EOFError, ConnectionResetError):
                raise _died(member) from None
            assert member.at is not None
            member.at._outcome.append(outcome)
            member.at = None
        self._assign()


def _died(member: _Member) -> StorageFault:
    member.process.join()
    return StorageFault(
        f"a worker process died ({_how(member.process.exitcode)}); "
        "run the same command again to go on, with fewer --workers if memory ran out"
    )


def _how(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f"signal {signal.Signals(-exit_code).name}"
    return f"exit code {exit_code}"


def _serve(make: Callable[[], Any], connection: Connection) -> None:
    """Do the tasks that come through the pipe until its other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's goes to all; the first process decides
    tasks: queue.SimpleQueue[Task[Any, Any]] = queue.SimpleQueue()

    def listen() -> None:
        # A thread of its own: it sees at once, in the midst of a task, that nobody waits any more.
        try:
            while True:
                tasks.put(connection.recv())
        except (EOFError, OSError):
            os._exit(1)

    worker = make()
    threading.Thread(target=listen, daemon=True).start()
    while True:
        task = tasks.get()
        try:
            outcome = task(worker)
        except Exception as error:  # noqa: BLE001 - raised where the outcome is asked for
            outcome = _Raised(error)
        connection.send(outcome)
