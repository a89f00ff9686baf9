"""Everyone's turns, and the times of a step that come of them."""

import math
import statistics
from typing import Final

from benchmarks.harness import SAMPLES_HEADER, Samples
from benchmarks.trainer.job import BATCH, Turn
from benchmarks.trainer.site import Crew

WARM_UP_STEPS: Final = 5
STEP_HEADER: Final = ("contender", "img/s", *SAMPLES_HEADER, "turns")
"""Columns of `StepTimes.row`."""
_JUDGED_LOSSES: Final = 25  # as many at the start and at the end; fewer say nothing


class StepTimes(Samples):
    """One contender's samples: seconds of a step, each the mean over a turn.

    Attributes:
        name: Who.
        ranks: Its processes. Wall seconds are the slowest one's, processor seconds those of all together.
        steps: By turn, wall seconds of every single step of rank 0.
        ema: Seconds of each update of all averages, of all ranks; empty where there are none.
        losses: Of every step, those of the warm-up included, where the loop tells them.
    """

    name: str
    ranks: int
    steps: list[list[float]]
    ema: list[float]
    losses: list[float]

    @property
    def images_per_second(self) -> float:
        """By the median."""
        return BATCH / self.median

    @property
    def between(self) -> float:
        """Median wall seconds of a single step: one without checkpoint or row of metrics."""
        return statistics.median(second for turn in self.steps for second in turn)

    def row(self) -> tuple[str, ...]:
        """The cells of `STEP_HEADER`."""
        turns = f"{len(self.steps)} x {len(self.steps[0])}"
        return self.name, f"{self.images_per_second:.1f}", *self.cells(), turns

    def check(self) -> None:
        """See whether it trains.

        Raises:
            ValueError: A loss is not finite, or they do not fall: then its times say nothing.
        """
        if not all(map(math.isfinite, self.losses)):
            raise ValueError(f"{self.name}: a loss is not finite; no bar is claimed")
        first, last = self.losses[:_JUDGED_LOSSES], self.losses[-_JUDGED_LOSSES:]
        if len(self.losses) >= 2 * _JUDGED_LOSSES and not statistics.mean(last) < statistics.mean(first):
            raise ValueError(
                f"{self.name} does not train: its loss went from {statistics.mean(first):.3f} to "
                f"{statistics.mean(last):.3f}; no bar is claimed"
            )


class Turns:
    """One contender's turns.

    Args:
        crew: Its running processes.
        steps: Of a turn.
        warm_up_steps: Untimed ones before the first turn.
    """

    def __init__(self, crew: Crew, steps: int, warm_up_steps: int = WARM_UP_STEPS) -> None:
        self._crew, self._steps, self._warm_up_steps = crew, steps, warm_up_steps
        self._turns: list[list[Turn]] = []
        self._losses: list[float] = []

    @property
    def name(self) -> str:
        """Who."""
        return self._crew.job.name

    def warm_up(self) -> None:
        """Take the untimed first steps; the processes are up and training when this returns."""
        self._losses += self._crew.steps(self._warm_up_steps)[0].notes.get("loss", [])

    def take(self) -> tuple[float, float]:
        """Take one turn; return wall and processor seconds of a step."""
        turn = self._crew.steps(self._steps)
        self._turns.append(turn)
        self._losses += turn[0].notes.get("loss", [])
        return max(each.wall for each in turn) / self._steps, sum(each.cpu for each in turn) / self._steps

    def times(self, samples: Samples) -> StepTimes:
        """Return the samples with all that is known beside them.

        Raises:
            ValueError: As `StepTimes.check`, or an update was dropped.
        """
        ema = [second for turn in self._turns for each in turn for second in each.notes.get("ema", [])]
        ranks, taken = self._crew.job.ranks, self._steps * len(self._turns)
        if len(ema) not in (0, ranks * taken):
            raise ValueError(
                f"{self.name}: {len(ema)} averages in {taken} steps of {ranks}: updates were dropped"
            )
        found = StepTimes(
            wall=samples.wall,
            cpu=samples.cpu,
            name=self.name,
            ranks=ranks,
            steps=[turn[0].steps for turn in self._turns],
            ema=ema,
            losses=self._losses,
        )
        found.check()
        return found
