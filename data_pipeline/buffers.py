"""Memory for batches, used again once nobody looks at it any more.

Fresh memory costs more than it seems: the kernel clears every page of it, which for a batch of 64 JPEGs of
256 x 256 pixels takes a tenth of the time that decoding them does.
"""

import sys

import numpy as np
import torch

from data_pipeline.decode import UInt8Array

_OWN_REFERENCES = 3
"""To a block that nobody uses: the list's, the loop's and `getrefcount`'s own."""


class BatchBuffers:
    """Arrays of one shape in memory that is recycled when the last array, view or tensor over it is gone.

    On a machine with CUDA memory is page-locked and PyTorch recycles it, which knows of copies under way.

    Args:
        shape: Of one picture: height, width, channels.
    """

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self._shape = shape
        self._pinned = torch.cuda.is_available()
        self._blocks: list[UInt8Array] = []

    def array(self, count: int) -> UInt8Array:
        """Return uint8 [count, height, width, channels] of undefined content."""
        if self._pinned:
            return torch.empty((count, *self._shape), dtype=torch.uint8, pin_memory=True).numpy()
        # NumPy makes every view refer to the block itself, so its references tell whether it is in use.
        for block in self._blocks:
            if len(block) == count and sys.getrefcount(block) == _OWN_REFERENCES:
                return block[:]
        self._blocks.append(np.empty((count, *self._shape), dtype=np.uint8))
        return self._blocks[-1][:]
