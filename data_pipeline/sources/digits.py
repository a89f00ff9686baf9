"""The embedded data set: 1797 real handwritten digits, 8 x 8 grey, as scikit-learn ships them.

Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning
Repository, 1998 (its test part); `sklearn.datasets.load_digits` ships it, so nothing is downloaded.
"""

from collections.abc import Iterator

import numpy as np
from sklearn.datasets import load_digits

from data_pipeline.sources import Item

_LARGEST_VALUE = 16  # the archive counts ink pixels in 4 x 4 blocks


class DigitsSource:
    """Handwritten digits; pixel = value * 255/16 rounded (half to even), label in the meta data."""

    kind = "digits"
    name = "digits"
    native_size: int | None = 8
    default_channels = 1
    default_val_fraction = 0.2

    def __init__(self) -> None:
        found = load_digits()
        self._images = np.rint(found.images * 255.0 / _LARGEST_VALUE).astype(np.uint8)
        self._labels = found.target.tolist()

    def count(self) -> int:
        """Return how many digits there are."""
        return len(self._labels)

    def __iter__(self) -> Iterator[Item]:
        """Iterate the digits as PGM files: their bytes, unlike a PNG's, depend on no library version."""
        header = f"P5\n{self._images.shape[2]} {self._images.shape[1]}\n255\n".encode()
        for number, (image, label) in enumerate(zip(self._images, self._labels, strict=True)):
            yield Item(
                key=f"{number:09d}",
                where=f"digits/{number}",
                data=header + image.tobytes(),
                meta={"label": label},
            )
