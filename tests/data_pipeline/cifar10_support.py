"""Tiny CIFAR-10 batches in the layouts of the distributed ones, written without the reader's help."""

import pickle
import struct
from typing import Any

import numpy as np

NAMES = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch")
COUNTS = (3, 2, 4, 1, 2, 3)
RNG = np.random.default_rng(10)
PIXELS = [RNG.integers(0, 256, (count, 3072), dtype=np.uint8) for count in COUNTS]
LABELS = [[int(label) for label in RNG.integers(0, 10, count)] for count in COUNTS]


def python_2(pixels: np.ndarray[Any, Any], labels: list[int]) -> bytes:
    """A batch as Python 2 pickled the distributed ones, opcode by opcode."""

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value

    def integer(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    dtype = b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R"
    dtype += b"(K\x03" + text(b"|") + b"NNN" + integer(-1) + integer(-1) + b"K\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
    shape = integer(pixels.shape[0]) + integer(pixels.shape[1]) + b"\x86"
    values = b"T" + struct.pack("<i", pixels.size) + pixels.tobytes()
    array += b"(K\x01" + shape + dtype + b"\x89" + values + b"tb"
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    entries = text(b"batch_label") + text(b"training batch 1 of 5") + text(b"labels") + numbers
    return b"\x80\x02}(" + entries + text(b"data") + array + b"u."


def python_3(
    pixels: np.ndarray[Any, Any], labels: list[int], *, keys: type = bytes, protocol: int = 2
) -> bytes:
    values = {"data": pixels, "labels": labels, "batch_label": "testing batch", "filenames": ["cat_1.png"]}
    return pickle.dumps(
        {key.encode() if keys is bytes else key: value for key, value in values.items()}, protocol
    )


def binary(pixels: np.ndarray[Any, Any], labels: list[int]) -> bytes:
    return b"".join(
        struct.pack("B3072s", label, row.tobytes()) for label, row in zip(labels, pixels, strict=True)
    )
