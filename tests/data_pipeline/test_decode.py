"""Decoding is told by content, bit-equal to Pillow, and survives any damage."""

import io
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline import decode as decoding
from data_pipeline.decode import DecodeError, decode, open_image, pixels, sniff, to_channels


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """A smooth picture with some noise, so that JPEG's every path has work."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    smooth = np.stack([x * 5 + y, y * 7, 255 - x - y], axis=2) % 256
    noisy = np.clip(smooth + rng.integers(-20, 20, smooth.shape), 0, 255).astype(np.uint8)
    return Image.fromarray(noisy).convert(mode)


def coded(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def by_pillow(data: bytes, channels: int) -> np.ndarray:
    array = np.asarray(Image.open(io.BytesIO(data)).convert("L" if channels == 1 else "RGB"))
    return array[:, :, None] if array.ndim == 2 else array


@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from(["RGB", "L", "CMYK"]),
    st.integers(1, 100),
    st.sampled_from([0, 1, 2]),
    st.booleans(),
    st.sampled_from([1, 3]),
)
@settings(max_examples=80, deadline=None)
def test_jpeg_equals_pillow(
    width: int, height: int, mode: str, quality: int, subsampling: int, progressive: bool, channels: int
) -> None:
    data = coded(
        picture(width, height, mode, width),
        "JPEG",
        quality=quality,
        subsampling=subsampling,
        progressive=progressive,
    )
    found = decode(data, channels)
    assert found.shape == (height, width, channels)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, by_pillow(data, channels))


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_ordinary_jpeg_takes_the_fast_decoder(mode: str) -> None:
    data = coded(picture(33, 17, mode), "JPEG")
    assert decoding._decode_jpeg(data, 3) is not None
    assert decoding._decode_jpeg(coded(picture(8, 8, "CMYK"), "JPEG"), 3) is None


@pytest.mark.parametrize("form", ["PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
@pytest.mark.parametrize("channels", [1, 3])
def test_other_formats_equal_pillow(form: str, channels: int) -> None:
    data = coded(picture(19, 11), form)
    assert sniff(data[:16]) is not None
    np.testing.assert_array_equal(decode(data, channels), by_pillow(data, channels))


def test_transparency_shows_white() -> None:
    image = Image.new("RGBA", (2, 1), (10, 20, 30, 255))
    image.putpixel((1, 0), (10, 20, 30, 0))
    assert decode(coded(image, "PNG"), 3).tolist() == [[[10, 20, 30], [255, 255, 255]]]
    palette = Image.new("P", (2, 1), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.putpixel((1, 0), 0)
    assert decode(coded(palette, "PNG", transparency=0), 1).tolist() == [[[9], [255]]]


def test_sixteen_bits_are_refused_not_clipped() -> None:
    data = coded(Image.fromarray(np.full((4, 4), 300, dtype=np.uint16)), "PNG")
    with pytest.raises(DecodeError, match="I;16"):
        decode(data, 1)


def test_upright_follows_exif() -> None:
    image = picture(6, 4)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    data = coded(image, "PNG", exif=exif)
    assert open_image(data).size == (6, 4)
    turned = open_image(data, upright=True)
    np.testing.assert_array_equal(np.asarray(turned), np.rot90(np.asarray(image), -1))


def bomb(width: int, height: int) -> bytes:
    """A small PNG that claims to be huge."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    body = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_000, 20_000])  # above our limit; above Pillow's own error level
def test_bombs_are_refused_before_decoding(side: int) -> None:
    with pytest.raises(DecodeError, match=r"pixels|decompression bomb"):
        decode(bomb(side, side), 3)
    jpeg = bytearray(coded(picture(16, 16), "JPEG"))
    size_at = jpeg.index(b"\xff\xc0") + 5
    jpeg[size_at : size_at + 4] = side.to_bytes(2, "big") * 2
    with pytest.raises(DecodeError, match="more than the limit"):
        decode(bytes(jpeg), 3)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"<html>not found</html>", "not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "not a picture"),
        (coded(picture(40, 40), "JPEG")[:-200], "damaged|truncated"),
        (coded(picture(40, 40), "PNG")[:-200], "damaged|truncated"),
    ],
)
def test_what_is_no_picture_is_named(data: bytes, reason: str) -> None:
    with pytest.raises(DecodeError, match=reason):
        decode(data, 3)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@given(
    st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"]),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=8),
    st.integers(0, 100),
)
@settings(max_examples=150, deadline=None)
def test_damage_gives_pixels_or_a_decode_error(
    form: str, flips: list[tuple[int, int]], cut_percent: int
) -> None:
    data = bytearray(coded(picture(24, 16), form))
    for place, value in flips:
        data[place % len(data)] = value
    damaged = bytes(data[: len(data) * cut_percent // 100])
    try:
        found = decode(damaged, 3)
    except DecodeError:
        return
    assert found.dtype == np.uint8
    assert found.ndim == 3


def test_grey_is_exact() -> None:
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    for mode in ("L", "RGB", "RGBA", "LA"):
        assert np.array_equal(pixels(to_channels(ramp.convert(mode), 1))[:, :, 0], np.asarray(ramp))
