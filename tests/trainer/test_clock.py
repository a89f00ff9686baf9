"""The image clock against the paper's per-step arithmetic and closed forms."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError

from trainer.clock import adam_epsilon, ema_decay, is_due, learning_rate
from trainer.recipe import load_recipe
from trainer.recipe_sections import EmaProfile, EmaWarmup, EpsilonForm, OptimizerSection


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


def test_tensorflows_warmup_is_per_images_too() -> None:
    """tf.train.ExponentialMovingAverage: min(decay, (1 + num_updates) / (10 + num_updates))."""
    profile = EmaProfile(decay=0.999, per_images=128, warmup=EmaWarmup.TENSORFLOW)
    assert ema_decay(profile, 0, 128) == 0.0
    for updates in (1, 2, 50, 5000):
        assert ema_decay(profile, 128 * updates, 128) == pytest.approx((1 + updates) / (10 + updates))
    assert ema_decay(profile, 128 * 8990, 128) == pytest.approx(0.999, rel=1e-9)
    assert ema_decay(profile, 128 * 10**6, 128) == 0.999
    assert ema_decay(profile, 128, 64) ** 2 == pytest.approx(2 / 11)


def test_the_power_function_shrinks_with_the_share_of_the_batch() -> None:
    """Karras et al. 2024, eq. 127: (1 - batch / t)^(exponent + 1), t after the update."""
    profile = EmaProfile(std=0.1)
    assert ema_decay(profile, 0, 128) == 0.0
    for images in (128, 12800, 10**9):
        wanted = (1 - 128 / (images + 128)) ** 7.937203937601809
        assert ema_decay(profile, images, 128) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "give either decay with per_images, or half_life_images, or std"),
        ({"std": 0.1, "decay": 0.9, "per_images": 1}, "give either"),
        ({"std": 0.1, "half_life_images": 5}, "give either"),
        ({"std": 0.1, "half_life_share": 0.05}, "half_life_share does not belong to std"),
        ({"std": 0.1, "warmup": "tensorflow"}, "warmup belongs to decay"),
        ({"half_life_images": 5, "warmup": "tensorflow"}, "warmup belongs to decay"),
        (
            {"decay": 0.9, "per_images": 1, "half_life_share": 0.1, "warmup": "tensorflow"},
            "without half_life_share",
        ),
        ({"std": 0.1, "per_images": 128}, "belong together"),
        ({"std": 0.2887}, r"less than 0\.2886"),
        ({"std": 0.0}, "greater than 0"),
    ],
)
def test_an_average_has_one_form(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        EmaProfile.model_validate(fields)


@pytest.mark.parametrize("batch", [1, 7, 64, 100])
def test_due_events_fire_once_per_multiple(batch: int) -> None:
    ends = range(batch, 10_000 + batch, batch)
    fired = [end for end in ends if is_due(100, end - batch, end)]
    assert len(fired) == ends[-1] // 100
    assert all(end % 100 < batch for end in fired)


Vector = NDArray[np.float64]


def tensorflow_adam(
    start: Vector, grads: list[Vector], rate: float, b1: float, b2: float, eps: float
) -> Vector:
    """The update rule in the notes of tf.train.AdamOptimizer, in float64."""
    w, m, v = start.copy(), np.zeros_like(start), np.zeros_like(start)
    for t, g in enumerate(grads, start=1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        w -= rate * np.sqrt(1 - b2**t) / (1 - b1**t) * m / (np.sqrt(v) + eps)
    return w


@pytest.mark.parametrize("eps", [1e-8, 1e-3])
def test_adam_with_tensorflows_epsilon(eps: float) -> None:
    rng = np.random.default_rng(0)
    start, grads = rng.normal(size=7), [rng.normal(size=7) * 1e-3 for _ in range(20)]
    section = OptimizerSection(
        learning_rate=1e-2, warmup_images=0, eps=eps, epsilon_form=EpsilonForm.TENSORFLOW
    )
    w = torch.tensor(start, requires_grad=True)
    adam = torch.optim.Adam([w], lr=section.learning_rate, betas=section.betas)
    for updates, grad in enumerate(grads):
        adam.param_groups[0]["eps"] = adam_epsilon(section, updates)
        w.grad = torch.from_numpy(grad)
        adam.step()
    expected = tensorflow_adam(start, grads, 1e-2, 0.9, 0.999, eps)
    assert w.detach().numpy() == pytest.approx(expected, abs=1e-9)
    plain = section.model_copy(update={"epsilon_form": EpsilonForm.TORCH})
    assert [adam_epsilon(plain, updates) for updates in (0, 10)] == [eps, eps]
    assert adam_epsilon(section, 0) == pytest.approx(eps * 31.6, rel=1e-3)  # 32 times larger at first
