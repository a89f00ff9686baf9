"""Guards of a run: updates dropped for non-finite gradients are counted within a budget."""

from dataclasses import dataclass, field
from typing import Final

MAX_CONSECUTIVE_SKIPS: Final = 20
"""So many dropped updates in a row mean that training has diverged."""


class DivergedError(RuntimeError):
    """Gradients stay non-finite; going on is useless."""


@dataclass
class SkipBudget:
    """The ranges of stream positions whose update was dropped.

    Attributes:
        skips: Half-open ranges, merged where they touch; part of the trajectory, saved in manifests.
    """

    skips: list[tuple[int, int]] = field(default_factory=list)
    _consecutive: int = 0

    def applied(self) -> None:
        """Note a good update."""
        self._consecutive = 0

    def dropped(self, start: int, stop: int) -> None:
        """Note a dropped update of the positions [start, stop).

        Raises:
            DivergedError: Too many in a row.
        """
        if self.skips and self.skips[-1][1] == start:
            self.skips[-1] = (self.skips[-1][0], stop)
        else:
            self.skips.append((start, stop))
        self._consecutive += 1
        if self._consecutive >= MAX_CONSECUTIVE_SKIPS:
            raise DivergedError(
                f"{self._consecutive} updates in a row had non-finite gradients (up to position {stop}); "
                "lower optimizer.learning_rate or resume from an earlier checkpoint"
            )
