"""The judge of digits: real ones pass, noise and a single class do not."""

import numpy as np
from sklearn.datasets import load_digits

from launch.digits_check import judge


def test_real_digits_pass_and_noise_does_not() -> None:
    pixels = np.rint(load_digits().images * (255.0 / 16.0)).astype(np.uint8)[..., None]
    train, held_out, fresh = pixels[:1200], pixels[1200:1500], pixels[1500:]
    verdict = judge(fresh, train, held_out)
    assert verdict.accuracy > 0.9
    assert verdict.is_sure_enough
    assert verdict.has_every_class
    noise = np.random.default_rng(0).integers(0, 256, fresh.shape, dtype=np.uint8)
    assert judge(noise, train, held_out).sure_samples < 0.05
    shuffled = fresh.reshape(len(fresh), 64)[:, np.random.default_rng(0).permutation(64)].reshape(fresh.shape)
    assert judge(shuffled, train, held_out).sure_samples < 0.05, (
        "a digit's pixels in another order are no digit"
    )
    assert not judge(fresh[:1].repeat(100, axis=0), train, held_out).has_every_class
