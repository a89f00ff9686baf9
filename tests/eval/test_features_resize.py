import numpy as np
import pytest
import torch
from cleanfid.resize import build_resizer, make_resizer
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from eval.features.resize import (
    ResizeMode,
    resize_clean,
    resize_legacy_pytorch,
    resize_legacy_tensorflow,
    resize_name,
    to_float,
)


def pictures(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (3, height, width, channels), dtype=np.uint8)


SIZES = [(8, 8), (32, 32), (45, 61), (300, 310)]


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("threads", [1, 2])
def test_clean_is_clean_fids_to_the_last_bit(height: int, width: int, threads: int) -> None:
    images = pictures(height, width)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for side in (224, 299):
            resize = make_resizer("PIL", False, "bicubic", (side, side))
            expected = np.stack([resize(image) for image in images]).transpose(0, 3, 1, 2)
            found = resize_clean(images, side)
            assert np.array_equal(found.numpy(), expected)
            assert found.is_contiguous(memory_format=torch.channels_last)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_legacy_pytorch_is_clean_fids_to_the_last_bit(height: int, width: int) -> None:
    images = pictures(height, width)
    resize = build_resizer("legacy_pytorch")
    expected = np.stack([resize(image) for image in images]).transpose(0, 3, 1, 2)
    assert np.array_equal(resize_legacy_pytorch(images, 299).numpy(), expected)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_legacy_tensorflow_is_torch_fidelitys_to_the_last_bit(height: int, width: int) -> None:
    images = pictures(height, width)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    expected = interpolate_bilinear_2d_like_tensorflow1x(x, (299, 299), align_corners=False)
    assert torch.equal(resize_legacy_tensorflow(images, 299), expected)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: to_float(x),
        lambda x: resize_clean(x, 20),
        lambda x: resize_legacy_pytorch(x, 20),
        lambda x: resize_legacy_tensorflow(x, 20),
    ],
)
def test_grey_is_repeated_to_rgb(function) -> None:
    grey = pictures(8, 8, channels=1)
    assert torch.equal(function(grey), function(grey.repeat(3, axis=3)))


def test_names() -> None:
    # The first is part of the hashes of old protocols.
    assert [resize_name(mode, 299) for mode in ResizeMode] == [
        "clean-fid/PIL-bicubic-float32/299",
        "clean-fid/legacy_tensorflow/299",
        "clean-fid/legacy_pytorch/299",
    ]
