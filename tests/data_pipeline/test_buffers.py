import gc

import numpy as np
import torch

from data_pipeline.buffers import Buffers

SHAPE = (16, 256, 256, 3)


def test_memory_is_used_again_but_never_while_anything_looks_at_it() -> None:
    buffers, kept = Buffers(), []
    for number in range(40):
        array = buffers.array(SHAPE)
        array[...] = number
        # A view, a view of a view, a tensor: each keeps its memory.
        kept = [*kept[-2:], (number, [array[5:], array[1:][:, 3:], torch.from_numpy(array)][number % 3])]
        del array
        for value, view in kept:
            assert np.asarray(view).min() == np.asarray(view).max() == value
    assert len(buffers._blocks) <= 5
    addresses = {block.ctypes.data for block in buffers._blocks}
    kept.clear()
    gc.collect()
    assert buffers.array(SHAPE).ctypes.data in addresses


def test_a_smaller_array_takes_a_larger_block_but_no_giant() -> None:
    buffers = Buffers()
    large = buffers.array((8 << 20,))
    address = large.ctypes.data
    del large
    assert buffers.array((4 << 20,)).ctypes.data == address
    assert buffers.array((1 << 20,)).ctypes.data != address


def test_small_arrays_are_not_kept() -> None:
    buffers = Buffers()
    assert buffers.array((3, 5)).shape == (3, 5)
    assert buffers._blocks == []
