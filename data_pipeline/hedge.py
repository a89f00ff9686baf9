"""Asking a second time when an answer takes far longer than any did lately, and taking whichever comes first.

One stalled answer then costs some times the usual, not its whole timeout (Dean & Barroso 2013, "The Tail at
Scale": hedged requests). A store that grows slow as a whole is not asked twice: what is usual grows with it.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, TypeVar

T = TypeVar("T")

PATIENCE: Final = 3.0
"""Times the slowest of the recent answers, after which a second one is asked for."""
_SHORTEST_SECONDS: Final = 0.1
_REMEMBERED: Final = 64
_FEWEST: Final = 8
"""Answers before which nothing is known to be usual."""


class Hedge:
    """Decides when to ask again, and remembers how long answers took. Used within one event loop."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=_REMEMBERED)
        self.count = 0
        """How often a second answer was asked for."""

    async def ask(self, request: Callable[[], Awaitable[T]]) -> T:
        """Return the first good answer of one request or, if it takes too long, of two.

        Args:
            request: Starts the request; safe to start twice.

        Raises:
            Exception: What the request raised, if no other one is left that could succeed.
        """
        loop = asyncio.get_running_loop()
        began = loop.time()
        asked = [asyncio.ensure_future(request())]
        try:
            done, _ = await asyncio.wait(asked, timeout=self._patience())
            if not done:
                self.count += 1
                asked.append(asyncio.ensure_future(request()))
            answer = await self._first_good(asked)
            self._seconds.append(loop.time() - began)
            return answer
        finally:
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)

    def _patience(self) -> float | None:
        """Seconds to wait before asking again; None for as long as nothing is known."""
        if len(self._seconds) < _FEWEST:
            return None
        return max(PATIENCE * max(self._seconds), _SHORTEST_SECONDS)

    @staticmethod
    async def _first_good(asked: "Sequence[asyncio.Future[T]]") -> T:
        left = set(asked)
        while True:
            done, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if not left or (not task.cancelled() and task.exception() is None):
                    return task.result()
