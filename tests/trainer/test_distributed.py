"""A process among its ranks: the number of its device, and what a rank that is alone does by itself."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch

from trainer.distributed import Environment
from trainer.engine import init_process_group


@pytest.mark.parametrize(("visible", "device"), [(1, 0), (8, 3)])
def test_deepspeed_is_told_the_number_of_the_device(
    monkeypatch: pytest.MonkeyPatch, visible: int, device: int
) -> None:
    """Slurm may show each task of a node one GPU, numbered 0; DeepSpeed takes LOCAL_RANK for its number."""
    told: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", told.append)
    monkeypatch.setattr(
        deepspeed,
        "init_distributed",
        lambda dist_backend, **_: told.append((dist_backend, os.environ["LOCAL_RANK"])),
    )
    monkeypatch.setenv("LOCAL_RANK", "3")
    init_process_group(Environment(rank=11, world=16, local_rank=3), 60.0)
    assert told == [torch.device("cuda", device), ("nccl", str(device))]


def test_a_single_rank_starts_no_threads_to_gather_with() -> None:
    """OpenMP threads of gloo's own, beside those that compute, cost a tenth of every step from then on."""
    program = """
import os
import torch.distributed as dist
from trainer.distributed import Environment, Ranks

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
ranks = Ranks(Environment(0, 1, 0))
before = len(os.listdir("/proc/self/task"))
gathered = ranks.gather(bytes(1 << 20))
print(gathered == [bytes(1 << 20)], len(os.listdir("/proc/self/task")) - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "True 0\n", done.stderr
