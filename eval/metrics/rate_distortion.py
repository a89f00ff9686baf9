"""The rate-distortion curve of progressive coding (Ho et al. 2020, section 4.3, figure 5 and table 4).

A sender tells x_T, then one x_t after the other down to the finest one, in about as many bits as the terms of
the bound L_T, L_{T-1}, ..., L_1 say. A receiver who has got as far as x_t knows the network's estimate of x_0
from it. What is told by then is the rate; how far the estimate is from x_0 is the distortion.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Final, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer

LEVELS_PER_UNIT: Final = 127.5
"""8-bit levels per unit of the network's scale [-1, 1]."""

Number = Annotated[
    float,
    BeforeValidator(lambda value: math.nan if value is None else value),
    PlainSerializer(lambda value: value if math.isfinite(value) else None),
]
"""A float that may be NaN or infinite, which JSON does not know: there both are null, read back as NaN."""


class RateDistortion(BaseModel):
    """One curve: the entry of timestep t, counted from 0, is the receiver's state who knows x_t.

    The last point is t = 0: all but L_0 is told. The paper's 1.78 bits/dim at an error of 0.95 for CIFAR-10
    is this point.

    Attributes:
        terms: [T], bits/dim of each term of the bound; that of t = 0 is L_0, which a lossless code needs too.
        rate: [T], bits/dim told so far: L_T and the terms of all timesteps above t. Falls with t.
        rmse: [T], root of the mean squared error of the estimate of x_0, over all pixels of all pictures, on
            the scale 0..255.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    terms: tuple[Number, ...]
    rate: tuple[Number, ...]
    rmse: tuple[Number, ...]

    @classmethod
    def of(cls, prior: float, terms: NDArray[np.float64], x0_mse: NDArray[np.float64]) -> Self:
        """Build the curve of the bound's mean terms.

        Args:
            prior: L_T in bits/dim.
            terms: [T], bits/dim by timestep, `TimestepBits.rate` averaged over pictures.
            x0_mse: [T], likewise `TimestepBits.x0_mse`, on the scale [-1, 1].
        """
        assert terms.shape == x0_mse.shape, (terms.shape, x0_mse.shape)
        above = np.concatenate(([prior], terms[:0:-1]))  # in the order of telling: L_T, then T-1, ..., 1
        return cls(
            terms=_numbers(terms),
            rate=_numbers(np.cumsum(above)[::-1]),
            rmse=tuple(rmse_in_levels(float(mse)) for mse in x0_mse),
        )


def rmse_in_levels(mse: float) -> float:
    """Root of a mean squared error on the scale [-1, 1], on the scale 0..255."""
    return LEVELS_PER_UNIT * math.sqrt(mse)


def _numbers(values: NDArray[np.float64]) -> tuple[float, ...]:
    listed: Sequence[float] = values.tolist()
    return tuple(listed)
