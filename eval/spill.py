"""Features of many pictures in a temporary file, for the metrics that need each of them and not only sums.

50,000 vectors of 2048 numbers are 410 MB: much beside a network in a small host's memory, little on its disk.
"""

import os
import tempfile
from typing import IO

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.errors import UserError

Float32Array = NDArray[np.float32]


class FeatureSpill:
    """Takes feature vectors in order, gives them back as one read-only array.

    The file lies in TMPDIR without a name and goes when the array does.

    Args:
        dim: d, the number of features.
    """

    def __init__(self, dim: int) -> None:
        self._dim, self._count = dim, 0
        self._file: IO[bytes] = tempfile.TemporaryFile(prefix="ddpm-features-")  # noqa: SIM115  (outlives this call)

    def add(self, features: Tensor) -> None:
        """Append [n, d] float32 vectors.

        Raises:
            UserError: The disk is full.
        """
        assert features.shape[1] == self._dim, features.shape
        try:
            self._file.write(np.ascontiguousarray(features.numpy(), dtype=np.float32).tobytes())
        except OSError as error:  # not through a memory map: a full disk would be a SIGBUS there
            raise UserError(
                f"{tempfile.gettempdir()}: cannot keep features ({os.strerror(error.errno or 0)}); "
                "point TMPDIR to a disk with more room"
            ) from error
        self._count += len(features)

    def array(self) -> Float32Array:
        """All vectors so far, [N, d] float32, mapped from the file."""
        self._file.flush()
        if self._count == 0:
            return np.empty((0, self._dim), dtype=np.float32)
        return np.memmap(self._file, dtype=np.float32, mode="r", shape=(self._count, self._dim))
