"""Intervals from standard errors."""

from statistics import NormalDist


def normal_interval(value: float, standard_error: float, level: float) -> tuple[float, float]:
    """Two-sided interval value -+ z * standard_error of a nearly normal estimate.

    Args:
        value: The estimate.
        standard_error: Its standard deviation.
        level: Share of such intervals that are to hold the estimated quantity, in (0, 1).

    Returns:
        (low, high).
    """
    assert 0 < level < 1, level
    reach = NormalDist().inv_cdf((1 + level) / 2) * standard_error
    return value - reach, value + reach
