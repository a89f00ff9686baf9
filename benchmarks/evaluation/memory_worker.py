"""A process in which our evaluation runs once; it answers how much memory that took.

Its first line on stdin is a `MemoryJob`, each further one `{"do": "evaluate", "pictures": N, "kept": …}`.
What libraries print goes to stderr.
"""

import json
import os
import sys
from pathlib import Path
from typing import Final

import numpy as np
import psutil
import torch

from benchmarks.evaluation.memory import Memory, MemoryJob
from benchmarks.evaluation.projection import ProjectionFeatures
from eval.statistics import Job, Pictures, accumulate
from eval.team import Team

_CHUNK: Final = 64
_SIZE: Final = 32


def noise(index: int) -> Pictures:
    """A chunk of random pictures."""
    generator = np.random.default_rng(index)
    images = generator.integers(0, 256, (_CHUNK, _SIZE, _SIZE, 3), dtype=np.uint8)
    return Pictures(images, np.ones(_CHUNK, dtype=np.bool_))


def evaluate(job: MemoryJob, pictures: int, *, kept: bool) -> Memory:
    """Accumulate statistics of so many pictures in this process, which must not have done so before."""
    torch.set_num_threads(job.threads)
    network = ProjectionFeatures(job.dim)
    with Team() as team:
        before = psutil.Process().memory_info().rss
        work = Job(total=pictures, chunk=_CHUNK, shape=(_SIZE, _SIZE, 3), store=kept)
        statistics = accumulate(team, network, noise, work)
        assert statistics.moments.count == pictures, "all of them count"
    return Memory(pictures=pictures, kept=kept, before=before, peak=peak_bytes())


def peak_bytes() -> int:
    """The most bytes that have been resident since this program began: `ru_maxrss` has its parent's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status tells no VmHWM: this part needs Linux")


def main() -> None:
    """Answer until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is printed from here on
    lines = iter(sys.stdin.readline, "")
    job = MemoryJob.model_validate_json(next(lines))
    for line in lines:
        asked = json.loads(line)
        found = evaluate(job, asked["pictures"], kept=asked["kept"])
        print(found.model_dump_json(), file=answers, flush=True)


if __name__ == "__main__":
    main()
