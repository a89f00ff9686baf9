"""Reads DeepSpeed's checkpoints in a process of its own: their files name DeepSpeed's classes.

Its first line on stdin says how many ranks wrote them, each further one names a folder.
"""

import json
import os
import sys
from pathlib import Path

from benchmarks.peers.deepspeed_checkpoint import damage


def main() -> None:
    """Answer what is wrong with each until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is printed from here on
    lines = iter(sys.stdin.readline, "")
    ranks = int(json.loads(next(lines)))
    for line in lines:
        print(json.dumps(damage(Path(json.loads(line)["folder"]), ranks)), file=answers, flush=True)


if __name__ == "__main__":
    main()
