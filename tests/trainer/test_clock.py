"""The image clock against the paper's per-step arithmetic and closed forms."""

import pytest

from trainer.clock import ema_decay, is_due, learning_rate
from trainer.recipe import EmaProfile, load_recipe


def test_warmup_is_the_papers_5000_steps_from_zero() -> None:
    section = load_recipe("cifar10").optimizer
    assert learning_rate(section, 0) == 0.0
    for step in (1, 2500, 4999):
        assert learning_rate(section, 128 * step) == pytest.approx(2e-4 * step / 5000, rel=1e-12)
    assert learning_rate(section, 128 * 5000) == 2e-4
    assert learning_rate(section, 10**9) == 2e-4


def test_decay_is_per_images_not_per_step() -> None:
    profile = load_recipe("cifar10").ema["paper"]
    assert ema_decay(profile, 0, 128) == 0.0, "the first update copies the weights"
    assert ema_decay(profile, 128, 128) == pytest.approx(0.9999, rel=1e-15)
    assert ema_decay(profile, 128, 64) ** 2 == pytest.approx(0.9999, rel=1e-12)


def test_half_life_and_its_share() -> None:
    plain = EmaProfile(half_life_images=1000)
    assert ema_decay(plain, 64, 1000) == pytest.approx(0.5)
    capped = EmaProfile(half_life_images=1000, half_life_share=0.05)
    assert ema_decay(capped, 936, 64) == pytest.approx(0.5 ** (64 / 50))
    assert ema_decay(capped, 10**6, 64) == ema_decay(plain, 10**6, 64)


@pytest.mark.parametrize("batch", [1, 7, 64, 100])
def test_due_events_fire_once_per_multiple(batch: int) -> None:
    ends = range(batch, 10_000 + batch, batch)
    fired = [end for end in ends if is_due(100, end - batch, end)]
    assert len(fired) == ends[-1] // 100
    assert all(end % 100 < batch for end in fired)
