"""Decoding is told by content, bit-equal to Pillow, and survives any damage."""

import io
import struct
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline import decode as decoding
from data_pipeline.decode import (
    DecodeError,
    decode,
    decode_into,
    npy_layout,
    open_image,
    orientation,
    pixels,
    sniff,
    to_channels,
)
from tests.data_pipeline.picture_support import coded, npy_by_hand, picture, png_by_hand, turned_by


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


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize(
    ("value", "turn"),
    [
        (1, lambda a: a),
        (2, np.fliplr),
        (3, lambda a: np.rot90(a, 2)),
        (4, np.flipud),
        (5, lambda a: np.swapaxes(a, 0, 1)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: np.rot90(np.swapaxes(a, 0, 1), 2)),
        (8, np.rot90),
        (9, lambda a: a),  # there is no such orientation
    ],
)
def test_upright_follows_exif(form: str, value: int, turn: object) -> None:
    image = picture(6, 4)
    options = {"lossless": True} if form == "WEBP" else {}
    data = coded(image, form, exif=turned_by(value), **options)
    as_stored = np.asarray(image if form != "JPEG" else Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(np.asarray(open_image(data, upright=True)), turn(as_stored))
    if form != "TIFF":  # Pillow turns these itself
        np.testing.assert_array_equal(np.asarray(open_image(data)), as_stored)
        assert orientation(open_image(data)) == (value if value < 9 else 1)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize(
    "exif", [b"no TIFF at all", b"II*\0\xff\xff\xff\x7f", b"MM\0*\0\0\0\x08\xff\xff", b""]
)
def test_unreadable_exif_turns_nothing(exif: bytes) -> None:
    data = coded(picture(6, 4), "JPEG", exif=b"Exif\0\0" + exif)
    np.testing.assert_array_equal(np.asarray(open_image(data, upright=True)), by_pillow(data, 3))


def test_numpy_files_are_pictures() -> None:
    colour = np.asarray(picture(5, 3))
    grey = np.asarray(picture(5, 3, "L"))
    for array in (colour, grey, grey[:, :, None]):
        buffer = io.BytesIO()
        np.save(buffer, array)
        data = buffer.getvalue()
        assert sniff(data[:16]) == "npy"
        wide = array if array.ndim == 3 else array[:, :, None]
        expected = np.repeat(wide, 3, axis=2) if wide.shape[2] == 1 else wide
        np.testing.assert_array_equal(decode(data, 3), expected)
        image = open_image(data)
        assert image.mode == ("RGB" if wide.shape[2] == 3 else "L")
        np.testing.assert_array_equal(decode(data, 1), pixels(image.convert("L")))


@pytest.mark.parametrize("version", [1, 2, 3])
def test_numpy_headers_of_every_version_and_order(version: int) -> None:
    header = b"{ 'shape':(2,3 , 3),'fortran_order' : False, 'descr':'<u1'} \n"
    length = len(header).to_bytes(2 if version == 1 else 4, "little")
    data = b"\x93NUMPY" + bytes([version, 0]) + length + header + bytes(range(18))
    np.testing.assert_array_equal(decode(data, 3), np.arange(18, dtype=np.uint8).reshape(2, 3, 3))
    assert np.array_equal(np.load(io.BytesIO(data)), decode(data, 3))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (npy_by_hand("2, 2", b"1234", kind="<f4"), "type '<f4', not uint8"),
        (npy_by_hand("2, 2", b"1234", kind="|O"), "not uint8"),
        (npy_by_hand("2, 2", b"1234", kind="|i1"), "not uint8"),
        (npy_by_hand("2, 2", b"1234", fortran=True), "Fortran order"),
        (npy_by_hand("4,", b"1234"), "no picture"),
        (npy_by_hand("1, 2, 2", b"1234"), "no picture"),
        (npy_by_hand("1, 1, 1, 4", b"1234"), "no picture"),
        (npy_by_hand("0, 4", b""), "no picture"),
        (npy_by_hand("", b"1"), "no picture"),
        (npy_by_hand("1 2, 2", b"1234"), "no picture"),
        (npy_by_hand("-2, 2", b"1234"), "no picture"),
        (npy_by_hand("2, 2", b"123"), "damaged picture"),
        (npy_by_hand("60000, 60000, 3", b"1234"), "more than the limit"),
        (npy_by_hand("9" * 4000 + ", 2", b""), "no picture"),
        (npy_by_hand("2, 2", b"1234").replace(b"'shape'", b"'shade'"), "tells of no plain array"),
        (npy_by_hand("2, 2", b"1234").replace(b"(2, 2)", b"eval()"), "tells of no plain array"),
        (npy_by_hand("2, 2", b"1234").replace(b"'|u1'", b"[('a', '|u1')]"), "tells of no plain array"),
        (npy_by_hand("2, 2", b"1234")[:40], "tells of no plain array"),
        (b"\x93NUMPY", "tells of no plain array"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff", "tells of no plain array"),
    ],
)
def test_other_numpy_files_are_refused(data: bytes, reason: str) -> None:
    for read in (npy_layout, lambda d: decode(d, 3), open_image):
        if read is npy_layout and reason == "damaged picture":
            continue  # the header alone is sound
        with pytest.raises(DecodeError, match=reason):
            read(data)


def test_a_pickle_in_a_numpy_file_is_not_loaded() -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([[{"a": 1}]], dtype=object), allow_pickle=True)
    with pytest.raises(DecodeError, match="not uint8"):
        decode(buffer.getvalue(), 3)


@pytest.mark.parametrize("filling", [b" ", b"'descr':'|u1'" + b" " * 100, b"'shape': (,", b", "])
def test_no_numpy_header_takes_long(filling: bytes) -> None:
    header = (b"{" + filling * 4096)[:4096]
    began = time.process_time()
    with pytest.raises(DecodeError):
        npy_layout(b"\x93NUMPY\x02\x00" + struct.pack("<I", len(header)) + header)
    assert time.process_time() - began < 0.1


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_000, 20_000, 60_000])  # above our limit; above Pillow's own error level
def test_bombs_are_refused_before_decoding(side: int) -> None:
    with pytest.raises(DecodeError, match=r"pixels|decompression bomb"):
        decode(png_by_hand(side, side), 3)
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
    st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "NPY"]),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=8),
    st.integers(0, 100),
)
@settings(max_examples=150, deadline=None)
def test_damage_gives_pixels_or_a_decode_error(
    form: str, flips: list[tuple[int, int]], cut_percent: int
) -> None:
    image = picture(24, 16)
    data = bytearray(npy_by_hand("16, 24, 3", image.tobytes()) if form == "NPY" else coded(image, form))
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


@pytest.mark.parametrize("channels", [1, 3])
def test_a_palette_picture_without_its_palette(channels: int) -> None:
    buffer = io.BytesIO()
    Image.new("P", (8, 8)).save(buffer, "PNG")
    whole = buffer.getvalue()
    start = whole.index(b"PLTE") - 4
    length = int.from_bytes(whole[start : start + 4], "big")
    with pytest.raises(DecodeError, match="its palette is missing"):
        decode(whole[:start] + whole[start + 12 + length :], channels)


@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from(["RGB", "L", "CMYK"]),
    st.sampled_from(["JPEG", "PNG", "WEBP"]),
    st.sampled_from([1, 3]),
    st.booleans(),
)
@settings(max_examples=120, deadline=None)
def test_decoding_into_a_batch_gives_the_same(
    width: int, height: int, mode: str, form: str, channels: int, mirrored: bool
) -> None:
    if mode == "CMYK":
        form = "JPEG"
    data = coded(picture(width, height, mode, 3), form)
    batch = np.full((3, height, width, channels), 77, dtype=np.uint8)
    decode_into(np.frombuffer(data, np.uint8), batch[1], mirrored=mirrored)
    expected = decode(data, channels)
    assert np.array_equal(batch[1], expected[:, ::-1] if mirrored else expected)
    assert (batch[[0, 2]] == 77).all()


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_decoding_into_a_batch_refuses_other_shapes(form: str) -> None:
    data = np.frombuffer(coded(picture(9, 8), form), np.uint8)
    with pytest.raises(DecodeError, match="9 x 8 pixels, the index says 8 x 8"):
        decode_into(data, np.empty((8, 8, 3), dtype=np.uint8))
    with pytest.raises(DecodeError):
        decode_into(data[: len(data) // 2], np.empty((8, 9, 3), dtype=np.uint8))


@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from(["RGB", "L", "RGBA", "P", "LA", "1"]),
    st.sampled_from(["PNG", "WEBP"]),
    st.booleans(),
    st.sampled_from([1, 3]),
    st.integers(0, 5),
)
@settings(max_examples=150, deadline=None)
def test_png_and_webp_equal_pillow(
    width: int, height: int, mode: str, form: str, lossless: bool, channels: int, seed: int
) -> None:
    image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    image.convert(mode).save(buffer, form, **({"lossless": lossless} if form == "WEBP" else {}))
    data = buffer.getvalue()
    expected = pixels(to_channels(open_image(data), channels))  # by Pillow alone
    assert np.array_equal(decode(data, channels), expected)


def test_a_transparent_colour_of_a_png_shows_white() -> None:
    image = Image.new("RGB", (4, 4), (10, 20, 30))
    image.putpixel((1, 2), (99, 0, 0))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", transparency=(10, 20, 30))
    array = decode(buffer.getvalue(), 3)
    assert (array[0, 0] == 255).all()
    assert array[2, 1].tolist() == [99, 0, 0]


@pytest.mark.parametrize(("form", "decoder"), [("PNG", "png_decode"), ("WEBP", "webp_decode")])
def test_ordinary_png_and_webp_take_the_fast_decoder(
    form: str, decoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    real = getattr(decoding.imagecodecs, decoder)
    monkeypatch.setattr(decoding.imagecodecs, decoder, lambda data: calls.append(1) or real(data))
    decode(coded(picture(9, 8), form), 3)
    assert calls == [1]


@pytest.mark.parametrize("lossless", [True, False])
def test_webp_bombs_are_refused_before_decoding(lossless: bool) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "WEBP", lossless=lossless)
    data = bytearray(buffer.getvalue())
    if lossless:
        data[21:25] = ((1 << 28) - 1).to_bytes(4, "little")
    else:
        data[26:30] = b"\xff\x3f\xff\x3f"
    with pytest.raises(DecodeError, match="is more than the limit"):
        decode(bytes(data), 3)
