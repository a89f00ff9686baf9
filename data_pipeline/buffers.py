"""Memory that is used again once nobody looks at it any more.

Fresh memory costs more than it seems: the kernel clears every page of it. For a batch of 64 JPEGs of 256 x
256 pixels that takes a tenth of the time of decoding them, for the bytes they are decoded from half as much.
"""

import math
import sys
import threading
from collections.abc import Sequence
from typing import Final

import numpy as np
import torch

from data_pipeline.decode import UInt8Array

_OWN_REFERENCES: Final = 3
"""To a block that nobody uses: the list's, the loop's and `getrefcount`'s own."""
_SMALLEST: Final = 1 << 20  # what is smaller the C library recycles well enough
_TOO_LARGE: Final = 4  # times what is asked for: such a block is left for those who need it


class Buffers:
    """Arrays in memory that is recycled when the last array, view or tensor over it is gone.

    Small ones come from the C library. Safe to use from several threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks: list[UInt8Array] = []

    def array(self, shape: Sequence[int]) -> UInt8Array:
        """Return uint8 of that shape and undefined content."""
        size = math.prod(shape)
        if size < _SMALLEST:
            return np.empty(shape, dtype=np.uint8)
        with self._lock:
            # NumPy makes every view refer to the block itself, so its references tell whether it is in use.
            for block in self._blocks:
                if size <= len(block) <= _TOO_LARGE * size and sys.getrefcount(block) == _OWN_REFERENCES:
                    return block[:size].reshape(shape)
            self._blocks.append(np.empty(size, dtype=np.uint8))
            return self._blocks[-1][:].reshape(shape)


class PinnedBuffers(Buffers):
    """Arrays in page-locked memory, from which copies to a CUDA device need not wait.

    PyTorch recycles it itself, for it knows of copies that are still under way.
    """

    def array(self, shape: Sequence[int]) -> UInt8Array:
        """Return uint8 of that shape and undefined content."""
        return torch.empty(tuple(shape), dtype=torch.uint8, pin_memory=True).numpy()


def batch_buffers() -> Buffers:
    """Return buffers for batches that are copied to this machine's devices."""
    return PinnedBuffers() if torch.cuda.is_available() else Buffers()
