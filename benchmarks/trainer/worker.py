"""One process of one contender: its first line on stdin is a `Job`, each further one asks for some steps.

What libraries print goes to stderr.
"""

import contextlib
import os
import sys

from benchmarks.trainer.contenders import CONTENDERS
from benchmarks.trainer.job import Job
from benchmarks.trainer.pace import Ended, Pace


def main() -> None:
    """Train until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is printed from here on
    lines = iter(sys.stdin.readline, "")
    job = Job.model_validate_json(next(lines))
    with contextlib.suppress(Ended):
        CONTENDERS[job.contender](job, Pace(lines, answers))


if __name__ == "__main__":
    main()
