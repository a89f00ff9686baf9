import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.geometry import Geometry, GeometryError, apply, library_versions


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 40), st.sampled_from([1, 3]))
@settings(max_examples=60, deadline=None)
def test_ddpm_lsun_is_the_published_preparation(width: int, height: int, size: int, channels: int) -> None:
    rng = np.random.default_rng(width * 61 + height)
    shape = (height, width) if channels == 1 else (height, width, 3)
    array = rng.integers(0, 256, shape, dtype=np.uint8)
    # The array arithmetic of StyleGAN's preparation of LSUN.
    crop = min(array.shape[:2])
    square = array[(height - crop) // 2 : (height + crop) // 2, (width - crop) // 2 : (width + crop) // 2]
    expected = Image.fromarray(square).resize((size, size), Image.Resampling.LANCZOS)
    found = apply(Geometry.DDPM_LSUN, Image.fromarray(array), size)
    assert found.size == (size, size)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


def test_none_changes_nothing_and_checks() -> None:
    image = Image.new("RGB", (8, 8))
    assert apply(Geometry.NONE, image, 8) is image
    with pytest.raises(GeometryError, match="8 x 8 pixels, not 9 x 9"):
        apply(Geometry.NONE, image, 9)


def test_versions_name_the_decoder() -> None:
    assert {"pillow", "libjpeg_turbo"} <= library_versions().keys()
