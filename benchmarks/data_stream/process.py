"""The benchmark's side of a contender's process."""

from collections.abc import Mapping
from pathlib import Path

from benchmarks.data_stream.job import Job
from benchmarks.process import AnsweringProcess


class ContenderProcess(AnsweringProcess):
    """A process that reads. Processor time of its own children counts too, that of the S3 server does not.

    Args:
        job: What it reads.
        env: Added to this process's environment: where the store is.
        log: What it prints goes there.
        libraries: A folder of libraries that only this process is to see.
    """

    def __init__(self, job: Job, env: Mapping[str, str], log: Path, libraries: Path | None = None) -> None:
        self.job = job
        seen = {} if libraries is None else {"PYTHONPATH": str(libraries)}
        super().__init__(
            "benchmarks.data_stream.worker", job.contender, job.model_dump_json(), {**env, **seen}, log
        )
