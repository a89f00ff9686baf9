"""The embedded data set: 1797 real handwritten digits, 8 x 8 grey, as scikit-learn ships them.

Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning
Repository, 1998 (its test part); `sklearn.datasets.load_digits` ships it, so nothing is downloaded.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from sklearn.datasets import load_digits

from data_pipeline.sources import Item, Place, Source, number_key
from data_pipeline.sources.netpbm import netpbm

_LARGEST_VALUE = 16  # the archive counts ink pixels in 4 x 4 blocks


class DigitsSource(Source):
    """Handwritten digits; pixel = value * 255/16 rounded (half to even), label in the meta data."""

    kind = "digits"
    name = "digits"
    native_size = 8
    default_channels = 1
    default_val_fraction = 0.2
    classes = tuple("0123456789")

    def __init__(self) -> None:
        found = load_digits()
        self._images = np.rint(found.images * 255.0 / _LARGEST_VALUE).astype(np.uint8)
        self._labels = [int(label) for label in found.target]

    def places(self) -> Iterator[Place]:
        """Iterate the digits' numbers."""
        yield from range(len(self._labels))

    def read(self, first: int, places: Sequence[Place]) -> Iterator[Item]:
        """Give digits as PGM files."""
        for number, place in enumerate(places, first):
            yield Item(
                key=number_key(number),
                where=f"digits/{place}",
                data=netpbm(self._images[place]),
                meta={"label": self._labels[place]},
            )
