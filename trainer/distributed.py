"""The processes of one training job: identity, small collectives on the CPU, tensors gathered to rank 0."""

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.errors import ExitCode, UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Environment:
    """What the launcher told this process.

    Attributes:
        rank: Number of this process among all.
        world: How many processes there are.
        local_rank: Number of this process on its node.
    """

    rank: int
    world: int
    local_rank: int

    @classmethod
    def from_launcher(cls) -> "Environment":
        """Read RANK, WORLD_SIZE and LOCAL_RANK as set by the deepspeed launcher, torchrun or train.sh.

        Raises:
            UserError: One is missing, so no launcher started this process.
        """
        try:
            return cls(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
        except KeyError as error:
            raise UserError(
                f"environment variable {error} is not set: start training through launch/train.sh"
            ) from error

    @property
    def device(self) -> torch.device:
        """The device of this process: its own GPU, or the CPU where there is none."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        # Slurm may show each task its own GPU only, numbered 0.
        return torch.device("cuda", self.local_rank % torch.cuda.device_count())


class FollowedError(RuntimeError):
    """Rank 0 failed and has reported it; this process only follows, with the same exit code."""

    def __init__(self, code: ExitCode) -> None:
        super().__init__(f"rank 0 ended with exit code {int(code)}; its message tells why")
        self.code = code


class Ranks:
    """Collectives over all processes; small ones run on the CPU, whatever the devices.

    Needs an initialised default process group. Every method must be called by all ranks together.

    Args:
        environment: Which of them this process is.
        timeout: How long they wait for one another where a group of their own is made; default: torch's.
    """

    def __init__(self, environment: Environment, timeout: timedelta | None = None) -> None:
        self.rank, self.world = environment.rank, environment.world
        self.device = environment.device
        self._control: dist.ProcessGroup | None = None  # the default group
        if dist.get_backend() != "gloo":
            group = dist.new_group(backend="gloo", timeout=timeout)
            assert isinstance(group, dist.ProcessGroup)
            self._control = group

    def for_a_thread(self, timeout: timedelta) -> "Ranks":
        """Return the same ranks for another thread of each: its collectives go over a group of their own.

        Args:
            timeout: How long ranks wait for one another.
        """
        others = copy.copy(self)
        group = dist.new_group(backend="gloo", timeout=timeout)
        assert isinstance(group, dist.ProcessGroup)
        others._control = group
        return others

    def leave(self) -> None:
        """Release what `for_a_thread` has made."""
        assert self._control is not None
        dist.destroy_process_group(self._control)

    @property
    def is_main(self) -> bool:
        """True on rank 0."""
        return self.rank == 0

    def maximum(self, value: int) -> int:
        """Return the largest of all ranks' values."""
        tensor = torch.tensor(value, dtype=torch.int64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._control)
        return int(tensor)

    def total(self, values: Tensor) -> Tensor:
        """Return the sum over ranks of a small float64 or int64 CPU tensor."""
        dist.all_reduce(values, group=self._control)
        return values

    def gather(self, value: T) -> list[T]:
        """Return every rank's picklable value, by rank, on every rank."""
        if self.world == 1:
            # Copying a large one, gloo's thread would start OpenMP threads of its own, for good. With more of
            # them than processors OpenMP lets them sleep between any two operators: 10 % of a step on a CPU.
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value, group=self._control)
        return found

    def on_main(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0 and give its result to all.

        Raises:
            FollowedError: On the other ranks, if it raised on rank 0 (which raises the error itself).
        """
        box: list[Any] = [None]
        if self.is_main:
            try:
                box[0] = (True, action())
            except BaseException as error:
                code = ExitCode.USER_MISTAKE if isinstance(error, UserError) else ExitCode.FAILED
                dist.broadcast_object_list([(False, code)], src=0, group=self._control)
                raise
        dist.broadcast_object_list(box, src=0, group=self._control)
        succeeded, result = box[0]
        if not succeeded:
            raise FollowedError(result)
        return result  # type: ignore[no-any-return]

    def concatenate(self, flat: Tensor) -> Tensor:
        """Return all ranks' 1-D CPU tensors, of any lengths, one after the other on every rank."""
        lengths = self.gather(len(flat))
        padded = torch.zeros(max(lengths), dtype=flat.dtype)
        padded[: len(flat)] = flat
        parts = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(parts, padded, group=self._control)
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

    def gather_to_main(self, flat: Tensor) -> list[Tensor]:
        """Return all ranks' 1-D tensors on the CPU of rank 0, by rank; empty elsewhere.

        They may differ in length, but not in precision.
        """
        if self.world == 1:
            return [flat.detach().cpu()]
        lengths = self.gather(len(flat))
        padded = torch.zeros(max(lengths), dtype=flat.dtype, device=flat.device)
        padded[: len(flat)] = flat.detach()
        parts = [torch.empty_like(padded) for _ in lengths] if self.is_main else None
        # What was offloaded lies on the CPU, where NCCL cannot reach it.
        dist.gather(padded, parts, dst=0, group=self._control if flat.device.type == "cpu" else None)
        return [part[:length].cpu() for part, length in zip(parts or [], lengths, strict=False)]
