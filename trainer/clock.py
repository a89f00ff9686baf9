"""The one clock: everything that changes over training is a pure function of the images seen.

Intervals are half-open: a quantity for the update from `images` to `images + B` is evaluated at
`images`, the value before the update. With the paper's batch this reproduces its step counting from 0
(first update with learning rate 0).
"""

import math

from trainer.power_ema import power_decay
from trainer.recipe_sections import EmaProfile, EmaWarmup, EpsilonForm, OptimizerSection


def learning_rate(section: OptimizerSection, images: int) -> float:
    """Learning rate of the update that starts at `images`: linear from 0 over `warmup_images`, then flat.

    Source: paper, appendix B (5000 steps of warm-up); its code counts the step from 0.
    """
    if images >= section.warmup_images:
        return section.learning_rate
    return section.learning_rate * images / section.warmup_images


def adam_epsilon(section: OptimizerSection, updates: int) -> float:
    """Adam's epsilon for the update after `updates` ones, as torch's Adam takes it.

    torch divides by sqrt(v / (1 - b2^t)) + eps, TensorFlow by (sqrt(v) + eps_hat) / sqrt(1 - b2^t): the same
    with eps = eps_hat / sqrt(1 - b2^t), t = updates + 1. Source: Kingma & Ba 2015, end of section 2.
    """
    if section.epsilon_form is EpsilonForm.TORCH:
        return section.eps
    return float(section.eps / math.sqrt(1.0 - section.betas[1] ** (updates + 1)))


def ema_decay(profile: EmaProfile, images: int, batch: int) -> float:
    """Decay of an EMA for the update from `images` to `images + batch`.

    `decay` per `per_images` becomes `decay^(batch / per_images)`; a half-life h becomes
    `0.5^(batch / h)`. With `half_life_share` s the half-life is at most s times the images seen after the
    update; with `warmup: tensorflow` the decay per `per_images` is at most `(1 + n) / (10 + n)`, n being
    `images / per_images`. `std` is the power function's, `(images / (images + batch))^(exponent + 1)`. The
    very first update copies the weights (decay 0), as the paper's code does.
    """
    if images == 0:
        return 0.0
    if profile.std is not None:
        return power_decay(profile.std, images, batch)
    if profile.decay is not None:
        assert profile.per_images is not None
        base = profile.decay
        if profile.warmup is EmaWarmup.TENSORFLOW:
            updates = images / profile.per_images
            base = min(base, (1 + updates) / (10 + updates))
        flat = base ** (batch / profile.per_images)
    else:
        assert profile.half_life_images is not None
        flat = 0.5 ** (batch / profile.half_life_images)
    if profile.half_life_share is None:
        return float(flat)
    return float(min(flat, 0.5 ** (batch / (profile.half_life_share * (images + batch)))))


def is_due(every_images: int, before: int, after: int) -> bool:
    """Tell whether a multiple of `every_images` was reached by the update from `before` to `after`."""
    return before // every_images < after // every_images
