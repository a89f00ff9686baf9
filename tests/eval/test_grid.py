import io

import numpy as np
import pytest
from PIL import Image

from eval.report.grid import png_bytes, sample_grid


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_pictures_are_enlarged_and_in_order(channels: int, mode: str) -> None:
    images = np.arange(64, dtype=np.uint8)[:, None, None, None].repeat(8, 1).repeat(8, 2).repeat(channels, 3)
    grid = Image.open(io.BytesIO(png_bytes(sample_grid(images))))
    assert grid.mode == mode
    assert grid.size == (8 * 50 + 2, 8 * 50 + 2)  # 8 px enlarged six times, 2 px between
    pixels = np.asarray(grid).reshape(*grid.size, channels)
    centres = pixels[26::50, 26::50, 0]
    assert np.array_equal(centres.ravel(), np.arange(64))
    assert (pixels[0] == 255).all()


def test_large_pictures_and_unfinished_rows() -> None:
    grid = sample_grid(np.zeros((3, 80, 80, 3), dtype=np.uint8))
    assert grid.size == (2 * 82 + 2, 2 * 82 + 2)
    assert grid.getpixel((120, 120)) == (255, 255, 255)  # the empty place
