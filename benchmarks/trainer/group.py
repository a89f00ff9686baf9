"""The process group of a contender that trains as we do."""

import contextlib
import os
from collections.abc import Iterator

import torch.distributed as dist

from trainer import extensions
from trainer.distributed import Environment, Ranks


@contextlib.contextmanager
def process_group() -> Iterator[Ranks]:
    """Join the process group that the environment describes."""
    extensions.prepare()
    os.environ.update(extensions.environment())
    from trainer.engine import init_process_group  # late: DeepSpeed needs the variables above

    init_process_group(Environment.from_launcher(), timeout_seconds=600.0)
    try:
        yield Ranks(Environment.from_launcher())
    finally:
        dist.destroy_process_group()
