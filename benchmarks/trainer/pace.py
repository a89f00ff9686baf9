"""How a training loop that runs by itself is made to take its turns."""

import itertools
import json
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import TextIO

from benchmarks.harness import tree_seconds
from benchmarks.trainer.job import Turn


class Ended(Exception):
    """Nobody wants further steps."""


class Pace:
    """Holds a loop back until it is asked for steps, and answers what they cost.

    Everything between the first step's beginning and that of the step after the last is on the clock: data,
    logging, checkpoints.

    Args:
        lines: `{"do": "steps", "steps": N}` each.
        answers: Where a `Turn` goes for each.
    """

    def __init__(self, lines: Iterator[str], answers: TextIO) -> None:
        self._lines, self._answers = lines, answers
        self._left, self._marks = 0, list[float]()
        self._cpu = 0.0
        self._notes = defaultdict[str, list[float]](list)

    def before_step(self) -> None:
        """Wait until this step is wanted; to be called at one place of the loop, once per step.

        Raises:
            Ended: It is not wanted, nor any other.
        """
        if self._left == 0:
            self._take_turn()
        self._marks.append(time.perf_counter())
        self._left -= 1

    def note(self, name: str, value: float) -> None:
        """Add a number to the answer of this turn."""
        self._notes[name].append(value)

    def _take_turn(self) -> None:
        if self._marks:
            marks = [*self._marks, time.perf_counter()]
            turn = Turn(
                wall=marks[-1] - marks[0],
                cpu=tree_seconds() - self._cpu,
                steps=[after - before for before, after in itertools.pairwise(marks)],
                notes=self._notes,
            )
            print(turn.model_dump_json(), file=self._answers, flush=True)
        line = next(self._lines, None)
        if line is None:
            raise Ended
        self._left = json.loads(line)["steps"]
        self._marks.clear()
        self._notes.clear()
        self._cpu = tree_seconds()
