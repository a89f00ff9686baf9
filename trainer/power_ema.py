"""Power-function averages of the weights, and any of them from stored ones after training; pure.

The average taken after t images weighs the weights of every earlier moment u by its *profile*
p(u) = (g + 1) u^g / t^(g + 1), so its width grows with training: the standard deviation of u under p is a
fixed share of t, the relative standard deviation that names the average.

Source, with its numbers of equations: Karras et al. 2024, "Analyzing and Improving the Training Dynamics of
Diffusion Models" (arXiv 2312.02696), section 3 and appendix C.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

WIDEST_STD: Final = 1 / math.sqrt(12)
"""Relative standard deviation of the plain mean over all of training (exponent 0): no average is wider."""
NEGLIGIBLE: Final = 1e-9
"""Stored averages of a smaller coefficient are left out: float32 weights do not show them."""
Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class PowerAverage:
    """One average.

    Attributes:
        images: Training images seen when it was taken, more than 0.
        std: Relative standard deviation of its profile, in (0, `WIDEST_STD`).
    """

    images: float
    std: float


@dataclass(frozen=True)
class Fit:
    """Stored averages that stand for another one.

    Attributes:
        coefficients: float64 [stored]; their sum is 1, those below `NEGLIGIBLE` are exactly 0.
        residual: Norm of the difference between the profile they make and the wanted one, relative to the
            norm of the wanted one. Rounding hides what is below about 1e-7.
    """

    coefficients: Matrix
    residual: float


def std_of(exponent: float) -> float:
    """Relative standard deviation of the profile of an exponent > -1 (eq. 123)."""
    return math.sqrt((exponent + 1) / (exponent + 3)) / (exponent + 2)


def exponent_of(std: float) -> float:
    """The exponent > 0 whose profile has this relative standard deviation (eq. 126).

    With s = std^-2 it is the largest root of g^3 + 7 g^2 + (16 - s) g + 12 - s. That cubic is positive at
    -2 and -1 and negative at 0 if s > 12, so it has three real roots and Viete's cosine gives the largest.

    Raises:
        ValueError: `std` is not in (0, `WIDEST_STD`).
    """
    if not 0 < std < WIDEST_STD:
        raise ValueError(f"relative standard deviation {std} is not between 0 and {WIDEST_STD:.4f}")
    s = std**-2
    spread = math.sqrt(1 + 3 * s)
    angle = math.acos(max(-1.0, -(1 + 18 * s) / spread**3)) / 3
    return (2 * spread * math.cos(angle) - 7) / 3


def power_decay(std: float, images: int, batch: int) -> float:
    """Decay for the update from `images` to `images + batch` (eq. 127): 0 at the first, which copies.

    The decays from t to u multiply to (t / u)^(exponent + 1), the share of the profile that lies before t: so
    the average is exactly the profile's integral over weights that change at the updates alone.
    """
    return float((images / (images + batch)) ** (exponent_of(std) + 1))


def inner_products(left: Sequence[PowerAverage], right: Sequence[PowerAverage]) -> Matrix:
    """Integrals of the products of two profiles, each pair's (eq. 151).

    The integral ends with the earlier average, beyond which its profile is 0.

    Returns:
        float64 [left, right], in 1 / images.
    """
    t, g = _columns(left)
    u, h = (column.T for column in _columns(right))
    latest = np.maximum(t, u)
    # (earlier / later) to the exponent of the later one.
    overlap = (np.minimum(t, u) / latest) ** np.where(t < u, h, g)
    products: Matrix = (g + 1) * (h + 1) / (g + h + 1) * overlap / latest
    return products


def fit(stored: Sequence[PowerAverage], wanted: PowerAverage) -> Fit:
    """Find the stored averages' coefficients whose sum of profiles comes nearest to the wanted profile.

    Least squares over the profiles, scaled to sum 1 so that weights that never changed stay what they are
    (algorithm 3). Averages that depend on each other (one stored twice, say) share their coefficient.

    Args:
        stored: At least one, none later than the wanted one.
        wanted: The average to make.
    """
    gram, target = inner_products(stored, stored), inner_products(stored, [wanted])[:, 0]
    square = float(inner_products([wanted], [wanted])[0, 0])
    # Profiles of unit norm: early ones are steep, and would spoil the condition of the system.
    scale = 1 / np.sqrt(np.diag(gram))
    solution = np.linalg.lstsq(gram * np.outer(scale, scale), target * scale, rcond=None)[0] * scale
    solution[np.abs(solution) < NEGLIGIBLE] = 0.0
    solution /= solution.sum()
    error = square - 2 * solution @ target + solution @ gram @ solution
    return Fit(solution, math.sqrt(max(float(error), 0.0) / square))


def _columns(averages: Sequence[PowerAverage]) -> tuple[Matrix, Matrix]:
    """Images and exponents as float64 [averages, 1]."""
    images = np.array([[average.images] for average in averages], dtype=np.float64)
    exponents = np.array([[exponent_of(average.std)] for average in averages], dtype=np.float64)
    return images, exponents
