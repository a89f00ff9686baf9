"""Contact sheets: pictures in rows, enlarged until a person can see them."""

import io
import math
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_MIN_SIDE: Final = 48
_GAP: Final = 2
_GROUND: Final = 255


def sample_grid(images: NDArray[np.uint8], columns: int | None = None) -> Image.Image:
    """Lay pictures out in a grid on white ground.

    Args:
        images: [n, H, W, C] uint8, n >= 1, C is 1 or 3.
        columns: Pictures per row; by default the grid is as square as n allows, e.g. 8 x 8 for 64.

    Returns:
        A grey or RGB picture; small pictures are enlarged by a whole factor, without smoothing, to at
        least 48 pixels a side.
    """
    count, height, width, channels = images.shape
    assert count > 0, "a grid needs at least one picture"
    columns = columns or math.ceil(math.sqrt(count))
    rows = -(-count // columns)
    factor = max(1, -(-_MIN_SIDE // min(height, width)))
    height, width = height * factor, width * factor
    shape = (rows * (height + _GAP) + _GAP, columns * (width + _GAP) + _GAP, channels)
    canvas = np.full(shape, _GROUND, dtype=np.uint8)
    for index, picture in enumerate(images):
        top = _GAP + index // columns * (height + _GAP)
        left = _GAP + index % columns * (width + _GAP)
        enlarged = picture.repeat(factor, axis=0).repeat(factor, axis=1)
        canvas[top : top + height, left : left + width] = enlarged
    return to_pil(canvas)


def to_pil(image: NDArray[np.uint8]) -> Image.Image:
    """Make a Pillow picture of [H, W, C] uint8 (C = 1: mode L, C = 3: mode RGB)."""
    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)


def png_bytes(image: Image.Image) -> bytes:
    """Encode a picture as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
