"""Ranks that are threads of one process: the collectives of `Ranks` without a process group."""

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from trainer.distributed import Ranks

T = TypeVar("T")


class _Table:
    """Where threads lay down what they give."""

    def __init__(self, world: int) -> None:
        self.values: list[Any] = [None] * world
        self.barrier = threading.Barrier(world, timeout=60)


class ThreadRanks(Ranks):
    """One of several threads."""

    def __init__(self, table: _Table, rank: int, world: int) -> None:
        self.rank, self.world, self.device = rank, world, torch.device("cpu")
        self._table = table

    def gather(self, value: T) -> list[T]:
        self._table.values[self.rank] = value
        self._table.barrier.wait()
        found = list(self._table.values)
        self._table.barrier.wait()
        return found

    def concatenate(self, flat: Tensor) -> Tensor:
        return torch.cat(self.gather(flat))

    def gather_to_main(self, flat: Tensor) -> list[Tensor]:
        found = self.gather(flat)
        return found if self.is_main else []

    def for_a_thread(self, timeout: timedelta) -> Ranks:
        others = copy.copy(self)
        others._table = self.gather(_Table(self.world))[0]
        return others

    def leave(self) -> None:
        pass


def on_ranks(world: int, action: Callable[[Ranks], T]) -> list[T]:
    """Do something on so many ranks at the same time; return what each returns.

    Raises:
        BaseException: What it raises on the first rank that fails.
    """
    table = _Table(world)
    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(lambda rank: action(ThreadRanks(table, rank, world)), range(world)))


def alone() -> Ranks:
    """The only rank."""
    return ThreadRanks(_Table(1), 0, 1)
