import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.geometry import Geometry, GeometryError, apply, library_versions


def some_array(width: int, height: int, channels: int) -> np.ndarray:
    rng = np.random.default_rng(width * 61 + height)
    shape = (height, width) if channels == 1 else (height, width, 3)
    return rng.integers(0, 256, shape, dtype=np.uint8)


def stylegan(array: np.ndarray, size: int) -> np.ndarray:
    """The array arithmetic of StyleGAN's preparation of LSUN, and of EDM's `center-crop`."""
    crop = min(array.shape[:2])
    square = array[(array.shape[0] - crop) // 2 : (array.shape[0] + crop) // 2]
    square = square[:, (array.shape[1] - crop) // 2 : (array.shape[1] + crop) // 2]
    return np.asarray(Image.fromarray(square).resize((size, size), Image.Resampling.LANCZOS))


def guided_diffusion_loader(array: np.ndarray, size: int) -> np.ndarray:
    """What the loader of guided diffusion does with an ImageNet picture."""
    image = Image.fromarray(array)
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), resample=Image.Resampling.BOX)
    scale = size / min(*image.size)
    sides = tuple(round(side * scale) for side in image.size)
    resized = np.array(image.resize(sides, resample=Image.Resampling.BICUBIC))
    top, left = (resized.shape[0] - size) // 2, (resized.shape[1] - size) // 2
    return resized[top : top + size, left : left + size]


def guided_diffusion_bedrooms(array: np.ndarray, size: int) -> np.ndarray:
    """What guided diffusion's script for LSUN bedrooms does."""
    height, width = array.shape[:2]
    scale = size / min(width, height)
    sides = (int(round(scale * width)), int(round(scale * height)))  # noqa: RUF046 - as there
    resized = np.array(Image.fromarray(array).resize(sides, resample=Image.Resampling.BOX))
    off_y, off_x = (resized.shape[0] - size) // 2, (resized.shape[1] - size) // 2
    return resized[off_y : off_y + size, off_x : off_x + size]


PUBLISHED = {
    Geometry.DDPM_LSUN: stylegan,
    Geometry.EDM: stylegan,
    Geometry.ADM: guided_diffusion_loader,
    Geometry.BOX: guided_diffusion_bedrooms,
}


@pytest.mark.parametrize("name", PUBLISHED)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 40), st.sampled_from([1, 3]))
@example(1, 60, 40, 3)
@example(60, 1, 3, 1)
@example(40, 40, 40, 3)
@example(40, 57, 40, 1)
@example(64, 64, 16, 3)
@example(1, 1, 40, 1)
@settings(max_examples=60, deadline=None)
def test_each_is_the_published_preparation(
    name: Geometry, width: int, height: int, size: int, channels: int
) -> None:
    array = some_array(width, height, channels)
    found = apply(name, Image.fromarray(array), size)
    assert found.size == (size, size)
    assert found.mode == ("L" if channels == 1 else "RGB")
    np.testing.assert_array_equal(np.asarray(found), PUBLISHED[name](array, size))


def test_all_but_edm_differ_where_they_should() -> None:
    image = Image.fromarray(some_array(200, 133, 3))
    found = {name: apply(name, image, 32).tobytes() for name in PUBLISHED}
    assert found.pop(Geometry.EDM) == found[Geometry.DDPM_LSUN]
    assert len(set(found.values())) == len(found) == 3


@pytest.mark.parametrize("name", Geometry)
@pytest.mark.parametrize("channels", [1, 3])
def test_the_right_size_is_left_alone(name: Geometry, channels: int) -> None:
    image = Image.fromarray(some_array(24, 24, channels))
    assert apply(name, image, 24).tobytes() == image.tobytes()


def test_none_changes_nothing_and_checks() -> None:
    image = Image.new("RGB", (8, 8))
    assert apply(Geometry.NONE, image, 8) is image
    with pytest.raises(GeometryError, match="8 x 8 pixels, not 9 x 9"):
        apply(Geometry.NONE, image, 9)


@pytest.mark.parametrize("name", [Geometry.ADM, Geometry.BOX])
def test_a_thread_is_not_blown_up_to_a_rope(name: Geometry) -> None:
    thread = Image.new("L", (1, 60_000))
    with pytest.raises(GeometryError, match="1 x 60000 pixels would become 256 x 15360000 before the crop"):
        apply(name, thread, 256)
    assert apply(Geometry.DDPM_LSUN, thread, 256).size == (256, 256)


def test_versions_name_the_decoders() -> None:
    assert {"pillow", "simplejpeg", "libjpeg_turbo", "webp"} <= library_versions().keys()
