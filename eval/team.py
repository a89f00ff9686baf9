"""The processes that share one evaluation: device, rank, gathering, and agreed ways to stop.

accelerate is the layer below. One process needs nothing; several are started by torchrun
(`accelerate launch --cpu --num_processes 2` silently starts one, so the size is checked, not trusted).
"""

import os
import threading
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import Any, Final, Self, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedType,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather,
    gather_object,
)
from torch import Tensor

from data_pipeline.errors import StorageFault, UserError
from eval.memory import keep_freed_memory
from eval.precision import forbid_tf32
from trainer.run import CheckpointGoneError

T = TypeVar("T")

_PATIENCE: Final = timedelta(hours=12)
"""How long processes wait for the main one, which computes metrics of features alone."""


class Stopped(Exception):
    """The user or the cluster asked this service to end (SIGTERM, SIGINT)."""


AGREED: Final = (Stopped, StorageFault, UserError, CheckpointGoneError)
"""What may end a shared piece of work in one process and must then end it in all."""


class Team:
    """All processes of one evaluation; a context manager that leaves the process group at the end.

    Args:
        stop: Set by a signal handler; work ends at the next safe point with `Stopped`.

    Raises:
        UserError: Started as part of several processes but not joined to them.
    """

    def __init__(self, stop: threading.Event | None = None) -> None:
        self.stop = stop or threading.Event()
        forbid_tf32()
        self._accelerator: Any = Accelerator(
            cpu=not torch.cuda.is_available(),
            mixed_precision="no",
            kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)],
        )
        if self.device.type == "cpu":
            keep_freed_memory()
        expected = int(os.environ.get("WORLD_SIZE", "1"))
        joined = self._accelerator.distributed_type != DistributedType.NO
        if self.size != expected or (expected > 1 and not joined):
            raise UserError(
                f"WORLD_SIZE is {expected} but accelerate joined {self.size} process(es) "
                f"({self._accelerator.distributed_type}); start with: torchrun --nproc_per_node N"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.size > 1:
            self._accelerator.end_training()  # destroys the process group: gloo aborts at exit otherwise

    @property
    def device(self) -> torch.device:
        """This process's device."""
        return cast(torch.device, self._accelerator.device)

    @property
    def rank(self) -> int:
        """Number of this process, from 0."""
        return int(self._accelerator.process_index)

    @property
    def size(self) -> int:
        """Number of processes."""
        return int(self._accelerator.num_processes)

    @property
    def is_main(self) -> bool:
        """True in the one process that claims, publishes and prints."""
        return self.rank == 0

    def check_stop(self) -> None:
        """Safe point: raise `Stopped` if this process was asked to end."""
        if self.stop.is_set():
            raise Stopped

    def together(self, work: Callable[[], T]) -> T:
        """Do a piece of work in every process; if it ends with one of `AGREED` in one, it does in all.

        Returns:
            What this process's `work` returned.

        Raises:
            Exception: The first failing process's error, the same in all.
        """
        if self.size == 1:
            return work()
        result: T | None = None
        error: Exception | None = None
        try:
            result = work()
        except AGREED as caught:
            error = caught
        for found in gather_object([error]):
            if found is not None:
                raise found
        return cast(T, result)

    def on_main(self, work: Callable[[], T]) -> T:
        """Do a piece of work in the main process only and give its (small, picklable) result to all.

        Raises:
            Exception: The main process's error if it is one of `AGREED`, the same in all.
        """
        result = self.together(lambda: work() if self.is_main else None)
        return cast(T, result if self.size == 1 else broadcast_object_list([result])[0])

    def gather(self, value: Tensor) -> Tensor:
        """Concatenate every process's tensor (equal shapes) along the first axis, in rank order."""
        if self.size == 1:
            return value
        return cast(Tensor, gather(value.to(self.device))).to(value.device)
