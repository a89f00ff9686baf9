"""Guards of a run: updates that would do harm are dropped, within a budget; beyond it the run goes back.

An update is harmful if its loss or gradient is not finite, or far above its running average. What was dropped
is a range of stream positions, recorded in every manifest. Every rank judges the same numbers and decides
alike.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from trainer.manifest import GuardState
from trainer.recipe_sections import GuardSection

log = logging.getLogger(__name__)

AVERAGED_UPDATES: Final = 100
"""Over about so many updates loss and gradient norm are averaged, and dropped ones counted."""


class DivergedError(RuntimeError):
    """Training cannot go on: the budget of dropped updates and of rollbacks is used up."""


class RollBackError(RuntimeError):
    """Too many updates were dropped: the run must go back to its last checkpoint.

    Attributes:
        position: Where the stream goes on: past everything that was tried.
    """

    def __init__(self, position: int, reason: str) -> None:
        super().__init__(reason)
        self.position = position


@dataclass
class Guard:
    """Judges updates and counts what was dropped.

    Attributes:
        section: The recipe's.
        batch: Images of an update.
        skips: Half-open ranges of stream positions that were dropped, merged where they touch.
        state: What spikes are measured against, and which drops count.
    """

    section: GuardSection
    batch: int
    skips: list[tuple[int, int]] = field(default_factory=list)
    state: GuardState = field(default_factory=GuardState)

    def objection(self, loss: float, norm: float) -> str | None:
        """Return what is wrong with an update, or None if it may be applied.

        Args:
            loss: Mean loss of the global batch.
            norm: Global norm of its gradient before clipping.
        """
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return f"loss {loss:.4g} or gradient norm {norm:.4g} is not finite"
        factor, usual = self.section.spike_factor, self.state
        if factor is None or usual.updates < max(self.section.warmup_updates, 1):
            return None
        for name, value, log_average in (
            ("loss", loss, usual.log_loss),
            ("gradient norm", norm, usual.log_norm),
        ):
            if _log(value) > log_average + math.log(factor):
                return f"{name} {value:.4g} is over {factor:g} times the usual {math.exp(log_average):.4g}"
        return None

    def applied(self, loss: float, norm: float) -> None:
        """Take note of an update that was applied."""
        had = self.state
        # A plain mean at first, then an exponential one.
        weight = max(1.0 / (had.updates + 1), 1.0 / AVERAGED_UPDATES)
        self.state = had.model_copy(
            update={
                "log_loss": had.log_loss + weight * (_log(loss) - had.log_loss),
                "log_norm": had.log_norm + weight * (_log(norm) - had.log_norm),
                "updates": had.updates + 1,
            }
        )

    def dropped(self, start: int, reason: str) -> None:
        """Take note of a dropped update of the positions [start, start + batch).

        Raises:
            RollBackError: It was one too many.
        """
        stop = start + self.batch
        self.skips = merged(self.skips, (start, stop))
        log.warning("update of positions %d to %d dropped: %s", start, stop - 1, reason)
        recent = tuple(first for first in self.state.dropped if first >= stop - AVERAGED_UPDATES * self.batch)
        self.state = self.state.model_copy(update={"dropped": (*recent, start)})
        lost = len(self.state.dropped)
        if lost > self.section.skips:
            raise RollBackError(
                stop,
                f"{lost} of the last {AVERAGED_UPDATES} updates were dropped, the last one because {reason}",
            )

    def overflowed(self, start: int) -> None:
        """Take note of an update of the positions [start, start + batch) whose scaled loss was out of range.

        Finding the scale costs some, which do no harm and do not count against the budget (precision fp16).
        """
        self.skips = merged(self.skips, (start, start + self.batch))
        log.info(
            "update of positions %d to %d dropped: the loss scale is lowered", start, start + self.batch - 1
        )

    def passed_over(self, start: int, stop: int) -> None:
        """Take note that a rollback passed over the positions [start, stop); drops count anew after it."""
        self.skips = merged(self.skips, (start, stop))
        self.state = self.state.model_copy(update={"dropped": ()})


def merged(ranges: Sequence[tuple[int, int]], new: tuple[int, int]) -> list[tuple[int, int]]:
    """Append a range that begins at or after the end of the last one, joined to it where they touch."""
    assert new[0] < new[1], f"an empty range {new}"
    if ranges and ranges[-1][1] == new[0]:
        return [*ranges[:-1], (ranges[-1][0], new[1])]
    assert not ranges or ranges[-1][1] < new[0], f"{new} begins before the end of {ranges[-1]}"
    return [*ranges, new]


def _log(value: float) -> float:
    """Logarithm that has an answer for 0: a gradient can vanish."""
    return math.log(max(value, 1e-30))
