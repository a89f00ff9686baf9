"""A second request where the first takes far longer than usual: when, how often, and what is returned."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from data_pipeline.hedge import Hedge


class Store:
    """Answers requests at once, or as the given ones say; counts what was asked and what was cancelled."""

    def __init__(self) -> None:
        self.asked = self.cancelled = 0
        self.special: dict[int, Callable[[], Awaitable[str]]] = {}

    async def __call__(self) -> str:
        number, self.asked = self.asked, self.asked + 1
        try:
            return await self.special[number]() if number in self.special else f"answer {number}"
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


async def never() -> str:
    await asyncio.Event().wait()
    raise AssertionError("unreachable")


async def failed() -> str:
    raise ConnectionError("reset")


async def warm(hedge: Hedge, store: Store) -> None:
    for _ in range(8):
        await hedge.ask(store)
    assert hedge.count == 0


def test_a_stalled_answer_is_asked_for_again_and_given_up() -> None:
    async def scenario() -> None:
        hedge, store = Hedge(), Store()
        await warm(hedge, store)
        store.special[8] = never
        assert await hedge.ask(store) == "answer 9"
        assert (hedge.count, store.asked, store.cancelled) == (1, 10, 1)

    asyncio.run(scenario())


def test_before_anything_is_known_nobody_is_asked_twice() -> None:
    async def scenario() -> None:
        hedge, store = Hedge(), Store()
        store.special[0] = never
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await hedge.ask(store)
        assert (hedge.count, store.asked, store.cancelled) == (0, 1, 1)

    asyncio.run(scenario())


def test_a_quick_failure_is_told_at_once() -> None:
    async def scenario() -> None:
        hedge, store = Hedge(), Store()
        await warm(hedge, store)
        store.special[8] = failed
        with pytest.raises(ConnectionError, match="reset"):
            await hedge.ask(store)
        assert (hedge.count, store.asked) == (0, 9)

    asyncio.run(scenario())


def test_the_second_may_fail_while_the_first_still_answers() -> None:
    async def scenario() -> None:
        hedge, store = Hedge(), Store()
        await warm(hedge, store)
        second_asked = asyncio.Event()

        async def slow() -> str:
            await second_asked.wait()
            await asyncio.sleep(0)
            return "late"

        async def fails() -> str:
            second_asked.set()
            raise ConnectionError("reset")

        store.special |= {8: slow, 9: fails}
        assert await hedge.ask(store) == "late"
        assert hedge.count == 1

    asyncio.run(scenario())


def test_if_both_fail_the_error_is_told() -> None:
    async def scenario() -> None:
        hedge, store = Hedge(), Store()
        await warm(hedge, store)
        second_asked = asyncio.Event()

        async def slow() -> str:
            await second_asked.wait()
            raise ConnectionError("first")

        async def fails() -> str:
            second_asked.set()
            raise ConnectionError("second")

        store.special |= {8: slow, 9: fails}
        with pytest.raises(ConnectionError):
            await hedge.ask(store)

    asyncio.run(scenario())
