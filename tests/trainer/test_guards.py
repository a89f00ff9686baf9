"""The guard's judgement: what is dropped, what is counted, when the run goes back."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.guards import AVERAGED_UPDATES, Guard, RollBackError, merged
from trainer.recipe_sections import GuardSection

BATCH = 4


def trained(section: GuardSection, updates: int, loss: float = 0.1, norm: float = 0.5) -> Guard:
    guard = Guard(section, BATCH)
    for _ in range(updates):
        guard.applied(loss, norm)
    return guard


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_from_the_first_update_on(value: float) -> None:
    guard = Guard(GuardSection(spike_factor=None), BATCH)
    assert guard.objection(1.0, 1.0) is None
    assert "not finite" in str(guard.objection(value, 1.0))
    assert "not finite" in str(guard.objection(1.0, value))


def test_spikes_are_measured_against_the_running_average() -> None:
    guard = trained(GuardSection(spike_factor=10, warmup_updates=20), 30)
    assert guard.objection(0.99, 4.9) is None
    assert str(guard.objection(1.01, 0.5)).startswith("loss 1.01 is over 10 times the usual 0.1")
    assert str(guard.objection(0.1, 5.1)).startswith("gradient norm 5.1 is over 10 times the usual 0.5")


def test_before_the_warm_up_ends_and_without_a_factor_there_are_no_spikes() -> None:
    assert trained(GuardSection(warmup_updates=20), 19).objection(1e6, 1e6) is None
    assert trained(GuardSection(warmup_updates=20), 20).objection(1e6, 1e6) is not None
    assert trained(GuardSection(warmup_updates=0), 0).objection(1e6, 1e6) is None, (
        "nothing to measure against"
    )
    assert trained(GuardSection(spike_factor=None), 500).objection(1e6, 1e6) is None


def test_the_average_follows_and_forgets() -> None:
    guard = trained(GuardSection(spike_factor=10), 200, norm=100.0)
    for _ in range(10 * AVERAGED_UPDATES):
        guard.applied(0.1, 1.0)
    assert math.exp(guard.state.log_norm) == pytest.approx(1.0, rel=1e-3)


def test_a_loss_scale_that_is_searched_for_is_no_harm() -> None:
    guard = Guard(GuardSection(skips=0), BATCH)
    for start in range(0, 80, BATCH):
        guard.overflowed(start)
    assert guard.skips == [(0, 80)]
    with pytest.raises(RollBackError, match="1 of the last"):
        guard.dropped(80, "harm")


def test_the_state_is_all_there_is() -> None:
    """A guard made from skips and state judges as the one they came from."""
    guard = trained(GuardSection(), 150)
    guard.dropped(0, "test")
    again = Guard(guard.section, BATCH, list(guard.skips), guard.state)
    guard.applied(0.3, 0.7)
    again.applied(0.3, 0.7)
    assert again == guard


def test_one_drop_more_than_the_budget_goes_back() -> None:
    guard = Guard(GuardSection(skips=2), BATCH)
    guard.dropped(0, "a")
    guard.dropped(40, "b")
    with pytest.raises(RollBackError, match=r"3 of the last 100 updates were dropped.*because c") as caught:
        guard.dropped(80, "c")
    assert caught.value.position == 84
    assert guard.skips == [(0, 4), (40, 44), (80, 84)]


def test_old_drops_and_those_a_rollback_dealt_with_do_not_count() -> None:
    guard = Guard(GuardSection(skips=1), BATCH)
    guard.dropped(0, "a")
    guard.dropped(AVERAGED_UPDATES * BATCH, "the first one is out of the window by now")
    guard.passed_over(450, 500)
    assert guard.skips[-1] == (450, 500)
    guard.dropped(500, "counts")
    with pytest.raises(RollBackError, match="2 of the last"):
        guard.dropped(508, "counts too")


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 5)), max_size=20))
def test_ranges_merge_where_they_touch_and_cover_the_same(steps: list[tuple[int, int]]) -> None:
    ranges: list[tuple[int, int]] = []
    covered: set[int] = set()
    at = 0
    for gap, length in steps:
        at += gap
        ranges = merged(ranges, (at, at + length))
        covered |= set(range(at, at + length))
        at += length
    assert {n for start, stop in ranges for n in range(start, stop)} == covered
    assert all(stop < start for (_, stop), (start, _) in itertools.pairwise(ranges))
