"""The processes that train, save and load together."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from benchmarks.checkpoint.training import Job
from benchmarks.process import AnsweringCrew, AnsweringProcess, rank_variables

_SHARED: Final = Path("/dev/shm")
_numbers: Iterator[int] = itertools.count()


class Crew(AnsweringCrew):
    """So many ranks of a job on this machine's processor, as a context manager.

    Args:
        job: What they train.
        ranks: How many.
        threads: Of torch, of all together.
        place: Folder for their logs.
    """

    def __init__(self, job: Job, ranks: int, threads: int, place: Path) -> None:
        number, self._variables = next(_numbers), rank_variables(ranks)
        env = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(max(1, threads // ranks))}
        processes = [
            AnsweringProcess(
                "benchmarks.checkpoint.worker",
                f"rank {rank} of {ranks}",
                job.model_dump_json(),
                {**env, **variables},
                place / f"crew-{number}-{rank}.log",
            )
            for rank, variables in enumerate(self._variables)
        ]
        super().__init__(processes)

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        super().__exit__(kind, *rest)
        # DeepSpeed's shared memory outlives a process that is killed.
        port = self._variables[0]["MASTER_PORT"]
        for left in _SHARED.glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
            left.unlink(missing_ok=True)
