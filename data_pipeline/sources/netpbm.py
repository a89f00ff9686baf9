"""Bare pixels as picture files: PGM and PPM, whose bytes, unlike a PNG's, depend on no library version."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.decode import MAX_PIXELS, UInt8Array


@dataclass(frozen=True)
class PictureShape:
    """How an array is to be read as a picture.

    Attributes:
        height: Rows.
        width: Columns.
        channels: 1 for grey, 3 for RGB.
        planar: Its axes are [C, H, W], not [H, W, C] or [H, W].
    """

    height: int
    width: int
    channels: int
    planar: bool


def picture_shape(shape: Sequence[int]) -> PictureShape:
    """Tell which axis of a single picture's array is which.

    Args:
        shape: [H, W], [H, W, C] or [C, H, W] with 1 or 3 channels.

    Raises:
        ValueError: No such shape, or more than one of them; the message is the reason.
    """
    shown = list(shape)
    if len(shape) not in (2, 3) or min(shape) < 1:
        raise ValueError(f"shape {shown} is none of a picture")
    height, width, channels, planar = shape[0], shape[1], 1, False
    if len(shape) == 3:
        planar, last = shape[0] in (1, 3), shape[2] in (1, 3)
        if planar == last:
            many = "both" if last else "neither"
            raise ValueError(f"shape {shown} fits {many} [H, W, C] and [C, H, W] of 1 or 3 channels")
        channels, height, width = shape if planar else (shape[2], shape[0], shape[1])
    if height * width > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels is more than the limit of {MAX_PIXELS}")
    return PictureShape(height, width, channels, planar)


def netpbm(array: UInt8Array) -> bytes:
    """Return one picture as a file: PGM if it is grey, PPM if it is RGB.

    Args:
        array: uint8 [H, W], [H, W, C] or [C, H, W]; see `picture_shape`.

    Raises:
        ValueError: Another shape.
    """
    assert array.dtype == np.uint8, array.dtype
    shape = picture_shape(array.shape)
    magic = "P5" if shape.channels == 1 else "P6"
    rows = array.transpose(1, 2, 0) if shape.planar else array
    return f"{magic}\n{shape.width} {shape.height}\n255\n".encode() + rows.tobytes()
