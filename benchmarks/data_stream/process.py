"""The benchmark's side of a contender's process."""

import json
import os
import select
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from benchmarks.data_stream.job import Job
from trainer.tether import tethered

ANSWER_SECONDS = 900.0
"""Longer than anything takes that does not hang."""


class Hang(RuntimeError):
    """A process did not answer in time."""


class ContenderProcess:
    """A process that reads, as a context manager; it ends with its stdin.

    A process each, because peers keep threads, caches and shared memory, and so that processor time counts
    for one of them alone: that of its own children too, that of the S3 server not.

    Args:
        job: What it reads.
        env: Added to this process's environment: where the store is.
        log: What it prints goes there.
        libraries: A folder of libraries that only this process is to see.
    """

    def __init__(self, job: Job, env: Mapping[str, str], log: Path, libraries: Path | None = None) -> None:
        self.job, self._log = job, log
        self._env = {**os.environ, **env}
        if libraries is not None:
            self._env["PYTHONPATH"] = str(libraries)

    def __enter__(self) -> Self:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                tethered([sys.executable, "-m", "benchmarks.data_stream.worker"]),
                cwd=Path(__file__).parents[2],
                env=self._env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        self._send(self.job.model_dump_json())
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
        self._send(json.dumps({"do": do, **arguments}))
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], seconds)[0]:
            self._process.kill()
            raise Hang(f"{self.job.contender}: no answer to {do!r} in {seconds:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            end = "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])
            raise ChildProcessError(f"{self.job.contender} has ended at {do!r}; end of its log:\n{end}")
        return json.loads(line)

    def _send(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()
