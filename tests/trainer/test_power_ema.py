"""Power-function averages: the paper's formulas re-derived by quadrature and by cubic roots, in float64."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from trainer.power_ema import (
    WIDEST_STD,
    PowerAverage,
    exponent_of,
    fit,
    inner_products,
    power_decay,
    std_of,
)

STDS = st.floats(0.005, 0.288)
Profile = Callable[[NDArray[np.float64]], NDArray[np.float64]]
NODES, WEIGHTS = np.polynomial.legendre.leggauss(400)


def profile(average: PowerAverage) -> Profile:
    """The averaging profile as a function of images (eq. 121)."""
    g, t = exponent_of(average.std), average.images
    return lambda u: np.where(u <= t, (g + 1) / t * np.where(u <= t, u / t, 0) ** g, 0.0)


def integral(function: Profile, breaks: Sequence[float]) -> float:
    """Gauss-Legendre between every two breaks, from 0."""
    total, start = 0.0, 0.0
    for stop in sorted(set(breaks)):
        points = (stop - start) / 2 * NODES + (stop + start) / 2
        total += float((stop - start) / 2 * (WEIGHTS * function(points)).sum())
        start = stop
    return total


def test_the_exponents_the_paper_gives() -> None:
    """Section 3.2: relative standard deviations 0.05 and 0.10 are exponents 16.97 and 6.94."""
    assert exponent_of(0.05) == pytest.approx(16.97, abs=0.005)
    assert exponent_of(0.10) == pytest.approx(6.94, abs=0.005)
    assert std_of(0.0) == pytest.approx(WIDEST_STD, rel=1e-15)


@settings(max_examples=100, deadline=None)
@given(STDS)
def test_std_to_exponent_and_back(std: float) -> None:
    assert std_of(exponent_of(std)) == pytest.approx(std, rel=1e-12)


@settings(max_examples=100, deadline=None)
@given(st.floats(1e-3, 1e4))
def test_exponent_to_std_and_back(exponent: float) -> None:
    assert exponent_of(std_of(exponent)) == pytest.approx(exponent, rel=1e-9, abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(STDS)
def test_the_exponent_is_the_cubics_largest_root(std: float) -> None:
    s = std**-2
    roots = np.roots([1, 7, 16 - s, 12 - s])
    assert exponent_of(std) == pytest.approx(roots.real.max(), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("std", [0.0, -0.1, WIDEST_STD, 0.5])
def test_an_impossible_width(std: float) -> None:
    with pytest.raises(ValueError, match=r"not between 0 and 0\.2887"):
        exponent_of(std)


@settings(max_examples=100, deadline=None)
@given(STDS, st.floats(1.0, 1e9))
def test_the_profile_has_that_width(std: float, images: float) -> None:
    p = profile(PowerAverage(images, std))
    mass = integral(p, [images])
    mean = integral(lambda u: u * p(u), [images])
    square = integral(lambda u: (u - mean) ** 2 * p(u), [images])
    assert mass == pytest.approx(1, rel=1e-6)
    assert np.sqrt(square) / images == pytest.approx(std, rel=1e-5)


@settings(max_examples=100, deadline=None)
@given(STDS, st.lists(st.integers(1, 500), min_size=2, max_size=30))
def test_decays_make_the_profile(std: float, batches: list[int]) -> None:
    """What an update weighs in the end is the profile's integral over its images, for any batches."""
    ends = np.cumsum(batches)
    decays = [power_decay(std, int(end - batch), batch) for end, batch in zip(ends, batches, strict=True)]
    assert decays[0] == 0.0
    weights = [(1 - decay) * np.prod(decays[i + 1 :]) for i, decay in enumerate(decays)]
    shares = (ends / ends[-1]) ** (exponent_of(std) + 1)
    assert weights == pytest.approx(np.diff(shares, prepend=0.0), rel=1e-9, abs=1e-15)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(1.0, 1e8), STDS), min_size=1, max_size=4))
def test_inner_products_by_quadrature(pairs: list[tuple[float, float]]) -> None:
    averages = [PowerAverage(images, std) for images, std in pairs]
    found = inner_products(averages, averages)
    for i, left in enumerate(averages):
        for j, right in enumerate(averages):
            p, q = profile(left), profile(right)
            wanted = integral(lambda u, p=p, q=q: p(u) * q(u), [left.images, right.images])  # type: ignore[misc]
            assert found[i, j] == pytest.approx(wanted, rel=1e-5, abs=1e-12 / left.images)


def grid(count: int, stds: Sequence[float], last: float = 1e6) -> list[PowerAverage]:
    return [PowerAverage(last * (i + 1) / count, std) for i in range(count) for std in stds]


@pytest.mark.parametrize(("std", "most"), [(0.05, 1e-6), (0.08, 4e-3), (0.10, 1e-6), (0.15, 0.02)])
def test_the_residual_is_that_of_the_profiles(std: float, most: float) -> None:
    stored, wanted = grid(16, (0.05, 0.10)), PowerAverage(1e6, std)
    found = fit(stored, wanted)
    breaks = [average.images for average in stored]

    def difference(u: NDArray[np.float64]) -> NDArray[np.float64]:
        made = sum(c * profile(a)(u) for c, a in zip(found.coefficients, stored, strict=True))
        return np.asarray(made - profile(wanted)(u)) ** 2

    square = integral(lambda u: profile(wanted)(u) ** 2, breaks)
    by_quadrature = np.sqrt(integral(difference, breaks) / square)
    assert found.residual == pytest.approx(by_quadrature, rel=1e-3, abs=1e-6)
    assert by_quadrature < most
    assert found.coefficients.sum() == pytest.approx(1, abs=1e-12)


def test_least_squares_in_numpy() -> None:
    """The fit against one over profiles sampled on a fine grid, with numpy's own solver."""
    stored, wanted = grid(8, (0.05, 0.10), last=1.0), PowerAverage(1.0, 0.07)
    points = (np.arange(200_000) + 0.5) / 200_000
    columns = np.stack([profile(average)(points) for average in stored], axis=1)
    solution = np.linalg.lstsq(columns, profile(wanted)(points), rcond=None)[0]
    solution /= solution.sum()
    assert fit(stored, wanted).coefficients == pytest.approx(solution, abs=1e-4)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(1, 10**6), min_size=1, max_size=12, unique=True),
    st.sampled_from([(0.05, 0.1), (0.1,), (0.02, 0.05, 0.2)]),
    st.integers(0, 2),
)
def test_a_stored_average_is_itself(images: list[int], stds: tuple[float, ...], which: int) -> None:
    # Neighbours nearer than 1 % are nearly the same average, whose coefficients are not unique.
    spaced = [images[0]]
    for count in sorted(images):
        if count > spaced[-1] * 1.01:
            spaced.append(count)
    stored = [PowerAverage(count, std) for count in spaced for std in stds]
    wanted = PowerAverage(spaced[-1], stds[which % len(stds)])
    found = fit(stored, wanted)
    expected = [1.0 if average == wanted else 0.0 for average in stored]
    assert found.coefficients == pytest.approx(expected, abs=1e-6)
    assert found.residual < 1e-6


def test_averages_stored_twice_share_their_coefficient() -> None:
    found = fit(grid(4, (0.05, 0.05, 0.10)), PowerAverage(1e6, 0.05))
    assert found.coefficients[-3:] == pytest.approx([0.5, 0.5, 0.0], abs=1e-6)
    assert found.residual < 1e-6


@pytest.mark.parametrize("count", [100, 1000])
def test_many_snapshots_stay_well_behaved(count: int) -> None:
    found = fit(grid(count, (0.05, 0.10)), PowerAverage(1e6, 0.08))
    assert found.residual < 1e-3
    assert np.abs(found.coefficients).sum() < 10, "large coefficients would multiply the stored rounding"


def test_one_stored_average_stands_for_all() -> None:
    found = fit([PowerAverage(100, 0.05)], PowerAverage(100, 0.15))
    assert found.coefficients.tolist() == [1.0]
    assert found.residual > 0.5
