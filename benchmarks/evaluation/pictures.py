"""The same pictures for everyone: in memory, and as files for who wants a folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.encodings import photographs
from eval.statistics import Pictures

SIZE: Final = 32
"""Side of the pictures, as CIFAR-10's."""


@dataclass(frozen=True)
class PictureSet:
    """Some pictures.

    Attributes:
        images: [N, H, W, 3] uint8.
        folder: The same as PNG files, named in this order.
    """

    images: NDArray[np.uint8]
    folder: Path

    @classmethod
    def write(cls, folder: Path, count: int, skip: int = 0) -> "PictureSet":
        """Cut squares of photographs and write them to a new folder.

        Args:
            folder: Is made.
            count: N.
            skip: Leave out so many squares before, for another set.
        """
        folder.mkdir()
        images = np.stack([np.asarray(square) for square in photographs(skip + count, SIZE)[skip:]])
        for number, image in enumerate(images):
            Image.fromarray(image).save(folder / f"{number:06d}.png")
        return cls(images, folder)

    @classmethod
    def read(cls, folder: Path) -> "PictureSet":
        """Read what `write` wrote."""
        return cls(np.stack([np.asarray(Image.open(path)) for path in sorted(folder.iterdir())]), folder)

    def chunks(self, chunk: int) -> "ArraySource":
        """The pictures as our evaluation takes them."""
        return ArraySource(self.images, chunk)


@dataclass(frozen=True)
class ArraySource:
    """Numbered chunks of an array (`eval.statistics.PictureSource`)."""

    images: NDArray[np.uint8]
    chunk: int

    def __call__(self, index: int) -> Pictures:
        """Return chunk `index`."""
        part = self.images[index * self.chunk : (index + 1) * self.chunk]
        return Pictures(part, np.ones(len(part), dtype=np.bool_))
