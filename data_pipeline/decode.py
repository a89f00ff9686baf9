"""Picture bytes -> uint8 pixels. The format is told by magic bytes, never by a file name.

JPEG goes through libjpeg-turbo by way of simplejpeg, which is faster than Pillow; everything else and every
odd JPEG goes through Pillow. Both give the same pixels bit for bit: which decoder ran never shows.
"""

import io
import struct
import zlib

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

UInt8Array = npt.NDArray[np.uint8]

MAX_PIXELS = 89_478_485
"""Larger pictures are refused before any pixel is decoded (Pillow's own warning level, 256 MB as RGB)."""

_EIGHT_BIT_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"})
_PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Not all Pillow knows: some of its readers start other programs (EPS) or have no place in a data set."""

_JPEG_MAGIC = b"\xff\xd8\xff"
_MAGIC = (
    (0, _JPEG_MAGIC, "jpg"),
    (0, b"\x89PNG\r\n\x1a\n", "png"),
    (8, b"WEBP", "webp"),
    (0, b"GIF8", "gif"),
    (0, b"BM", "bmp"),
    (0, b"II*\x00", "tiff"),
    (0, b"MM\x00*", "tiff"),
    (0, b"P5", "pgm"),
    (0, b"P6", "ppm"),
)
# What Pillow's and libjpeg's parsers raise on damaged input.
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class DecodeError(ValueError):
    """These bytes give no usable picture; the message is the reason, fit for a report."""


def sniff(head: bytes) -> str | None:
    """Name the picture format by the first 16 bytes ("jpg", "png", …); None if it looks like none."""
    for offset, magic, name in _MAGIC:
        if head[offset : offset + len(magic)] == magic:
            return name
    return None


def open_image(data: bytes, *, upright: bool = False) -> Image.Image:
    """Open and fully load a picture with Pillow (of an animation, the first frame).

    Args:
        data: The file's bytes.
        upright: Turn it as its EXIF orientation says.

    Raises:
        DecodeError: Not a picture, damaged, or larger than `MAX_PIXELS`.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=_PILLOW_FORMATS)
        _check_pixels(image.width, image.height)
        image.load()
        if upright:
            image = ImageOps.exif_transpose(image)
    except DecodeError:
        raise
    except UnidentifiedImageError as error:
        raise DecodeError("empty file" if not data else "not a picture of any known format") from error
    except _DECODER_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DecodeError(f"damaged picture: {reason}") from error
    return image


def to_channels(image: Image.Image, channels: int) -> Image.Image:
    """Convert to 8-bit grey ("L", ITU-R 601-2 luma) or "RGB"; transparent parts show white.

    Raises:
        DecodeError: The picture has more than 8 bits per channel, so its range is unknown.
    """
    assert channels in (1, 3)
    if image.mode not in _EIGHT_BIT_MODES:
        raise DecodeError(f"pixel mode {image.mode} is not 8 bits per channel; convert the picture")
    if image.has_transparency_data:
        coloured = image.convert("RGBA")
        image = Image.new("RGBA", image.size, "white")
        image.alpha_composite(coloured)
        image = image.convert("RGB")  # composited alpha is opaque: nothing is lost
    wanted = "L" if channels == 1 else "RGB"
    return image if image.mode == wanted else image.convert(wanted)


def pixels(image: Image.Image) -> UInt8Array:
    """Return an "L" or "RGB" picture as uint8 [H, W, C] with values 0 … 255."""
    array = np.asarray(image, dtype=np.uint8)
    return array[:, :, None] if array.ndim == 2 else array


def decode(data: bytes, channels: int) -> UInt8Array:
    """Decode one picture.

    Args:
        data: The file's bytes.
        channels: 1 for grey, 3 for RGB; other pictures are converted as by `to_channels`.

    Returns:
        uint8 [H, W, channels], values 0 … 255, bit-equal to Pillow's decoder.

    Raises:
        DecodeError: Not a picture, damaged, or too large.
    """
    if data.startswith(_JPEG_MAGIC):
        array = _decode_jpeg(data, channels)
        if array is not None:
            return array
    return pixels(to_channels(open_image(data), channels))


def _decode_jpeg(data: bytes, channels: int) -> UInt8Array | None:
    """Decode an ordinary JPEG; None for anything odd, which Pillow then judges."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        _check_pixels(width, height)
        if colorspace == "Gray":
            grey = np.asarray(simplejpeg.decode_jpeg(data, colorspace="GRAY"), dtype=np.uint8)
            return grey if channels == 1 else np.repeat(grey, 3, axis=2)
        if colorspace == "YCbCr" and channels == 3:
            return np.asarray(simplejpeg.decode_jpeg(data, colorspace="RGB"), dtype=np.uint8)
    except DecodeError:
        raise
    except ValueError:
        return None
    return None  # CMYK, RGB-coded, or colour wanted as grey: not the decoder's luma but Pillow's


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise DecodeError(f"{width} x {height} pixels is more than the limit of {MAX_PIXELS}")
