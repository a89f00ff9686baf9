"""What is stored is what was meant: exact where it says so, and readable by everyone."""

import io
import subprocess
import sys

import numpy as np
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.decode import decode, pixels
from data_pipeline.encoding import Encoding, EncodingKind, encode
from data_pipeline.errors import UserError
from tests.data_pipeline.picture_support import coded, picture

LOSSLESS = ["png", "webp-lossless", "raw"]
MODES = {"L": 1, "RGB": 3}


@given(st.sampled_from([kind for kind in EncodingKind if kind is not EncodingKind.JPEG]))
def test_text_and_value_are_one(kind: EncodingKind) -> None:
    assert Encoding.parse(str(Encoding(kind))) == Encoding(kind)
    assert str(Encoding.parse(kind.value)) == kind.value


@given(st.integers(1, 100))
def test_jpeg_has_a_quality(quality: int) -> None:
    encoding = Encoding(EncodingKind.JPEG, quality)
    assert str(encoding) == f"jpeg:{quality}"
    assert Encoding.parse(str(encoding)) == encoding


def test_constants() -> None:
    assert Encoding.parse("png") == Encoding.PNG
    assert Encoding.parse("source") == Encoding.SOURCE
    assert Encoding.PNG != Encoding.SOURCE


@pytest.mark.parametrize(
    "text",
    ["", "PNG", "jpg", "jpeg", "jpeg:", "jpeg:0", "jpeg:101", "jpeg:095", "jpeg:9.5", "jpeg:-1", "png:9"],
)
def test_any_other_text_is_a_user_mistake(text: str) -> None:
    with pytest.raises(UserError) as caught:
        Encoding.parse(text)
    assert str(caught.value).startswith(f"--encoding {text}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", LOSSLESS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [1, 2, 33])
def test_lossless_means_every_pixel(text: str, mode: str, size: int) -> None:
    image = picture(size, size, mode)
    _, payload = encode(image, Encoding.parse(text))
    np.testing.assert_array_equal(decode(payload, MODES[mode]), pixels(image))


@pytest.mark.parametrize("text", LOSSLESS)
def test_all_256_greys_survive_as_grey_and_as_colour(text: str) -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    _, payload = encode(Image.fromarray(ramp), Encoding.parse(text))
    np.testing.assert_array_equal(decode(payload, 1)[:, :, 0], ramp)
    np.testing.assert_array_equal(decode(payload, 3), np.repeat(ramp[:, :, None], 3, axis=2))


def test_png_is_as_pillow_writes_it_from_bare_pixels() -> None:
    image = picture(20, 20)
    image.info["icc_profile"] = b"profile"
    assert encode(image, Encoding.PNG) == ("png", coded(picture(20, 20), "PNG"))


def test_jpeg_is_standard_and_keeps_all_colour_samples() -> None:
    image = picture(32, 32)
    image.info["comment"] = b"made with love"
    extension, payload = encode(image, Encoding.parse("jpeg:90"))
    opened = Image.open(io.BytesIO(payload))
    assert (extension, opened.format, opened.mode) == ("jpg", "JPEG", "RGB")
    assert [layer[1:3] for layer in opened.layer] == [(1, 1)] * 3  # 4:4:4
    assert "progressive" not in opened.info
    assert "comment" not in opened.info
    assert payload == coded(picture(32, 32), "JPEG", quality=90, subsampling=0)
    assert len(encode(image, Encoding.parse("jpeg:50"))[1]) < len(payload)


def test_jpeg_of_grey_stays_grey() -> None:
    _, payload = encode(picture(32, 32, "L"), Encoding.parse("jpeg:90"))
    assert Image.open(io.BytesIO(payload)).mode == "L"


@pytest.mark.parametrize("mode", MODES)
def test_webp_is_lossless_webp(mode: str) -> None:
    extension, payload = encode(picture(32, 32, mode), Encoding.parse("webp-lossless"))
    assert (extension, payload[:4], payload[8:16]) == ("webp", b"RIFF", b"WEBPVP8L")


@pytest.mark.parametrize("mode", MODES)
def test_raw_is_what_numpy_and_webdataset_read(mode: str) -> None:
    image = picture(9, 9, mode)
    extension, payload = encode(image, Encoding.parse("raw"))
    assert extension == "npy"
    read = webdataset.autodecode.basichandlers(extension, payload)
    assert read.dtype == np.uint8
    assert read.shape == ((9, 9) if mode == "L" else (9, 9, 3))
    np.testing.assert_array_equal(read, np.asarray(image))
    np.testing.assert_array_equal(np.load(io.BytesIO(payload), allow_pickle=False), read)


def test_another_process_writes_the_same_bytes() -> None:
    script = (
        "import sys; from data_pipeline.encoding import Encoding, encode;"
        "from tests.data_pipeline.picture_support import picture;"
        "sys.stdout.buffer.write(encode(picture(24, 24, sys.argv[2]), Encoding.parse(sys.argv[1]))[1])"
    )
    for text, mode in [("raw", "RGB"), ("webp-lossless", "L"), ("jpeg:80", "RGB")]:
        other = subprocess.run([sys.executable, "-c", script, text, mode], capture_output=True, check=True)
        assert other.stdout == encode(picture(24, 24, mode), Encoding.parse(text))[1]
