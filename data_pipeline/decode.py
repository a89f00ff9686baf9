"""Picture bytes -> uint8 pixels. The format is told by magic bytes, never by a file name.

JPEG goes through libjpeg-turbo by way of simplejpeg, PNG and WebP through libpng and libwebp by way of
imagecodecs, which are faster than Pillow; NumPy's files are taken as they lie; everything else and every odd
picture goes through Pillow. All give the same pixels bit for bit: which one ran never shows.
"""

import io
import re
import struct
import zlib
from collections.abc import Sequence
from typing import Final, NamedTuple

import imagecodecs
import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import ExifTags, Image, UnidentifiedImageError

UInt8Array = npt.NDArray[np.uint8]

MAX_PIXELS = 89_478_485
"""Larger pictures are refused before any pixel is decoded (Pillow's own warning level, 256 MB as RGB)."""

_EIGHT_BIT_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"})
_PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Not all Pillow knows: some of its readers start other programs (EPS) or have no place in a data set."""

_JPEG_MAGIC = b"\xff\xd8\xff"
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_NPY_MAGIC = b"\x93NUMPY"
_MAGIC = (
    (0, _JPEG_MAGIC, "jpg"),
    (0, _PNG_MAGIC, "png"),
    (8, b"WEBP", "webp"),
    (0, b"GIF8", "gif"),
    (0, b"BM", "bmp"),
    (0, b"II*\x00", "tiff"),
    (0, b"MM\x00*", "tiff"),
    (0, b"P5", "pgm"),
    (0, b"P6", "ppm"),
    (0, _NPY_MAGIC, "npy"),
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
_TURNS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What sets a picture with that EXIF orientation upright."""

_NPY_HEADER_LIMIT: Final = 4096
# A Python dict in text form, read without evaluating it; possessive, so that no text takes long to refuse.
_NPY_HEADER: Final = re.compile(
    rb"\s*+\{(?:\s*+(?:"
    rb"'descr'\s*+:\s*+'(?P<type>[^']*+)'"
    rb"|'fortran_order'\s*+:\s*+(?P<fortran>True|False)"
    rb"|'shape'\s*+:\s*+\((?P<shape>[^)]*+)\)"
    rb")\s*+,?)*+\s*+\}\s*+"
)
_NPY_SHAPE: Final = re.compile(rb"\s*+(\d{1,9})\s*+,\s*+(\d{1,9})\s*+(?:,\s*+([13])\s*+)?+,?\s*+")


class DecodeError(ValueError):
    """These bytes give no usable picture; the message is the reason, fit for a report."""


class NpyLayout(NamedTuple):
    """Where the pixels of a NumPy file lie: uint8 [height, width, channels] from byte `offset` on."""

    height: int
    width: int
    channels: int
    offset: int

    @property
    def file_bytes(self) -> int:
        """Length of a whole file of this layout."""
        return self.offset + self.height * self.width * self.channels


def sniff(head: bytes) -> str | None:
    """Name the picture format by the first 16 bytes ("jpg", "png", …); None if it looks like none."""
    for offset, magic, name in _MAGIC:
        if head[offset : offset + len(magic)] == magic:
            return name
    return None


def open_header(data: bytes) -> Image.Image:
    """Open a picture with Pillow; its pixels are not decoded before they are asked for.

    Raises:
        DecodeError: Not a picture, damaged so that it shows already, or larger than `MAX_PIXELS`.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=_PILLOW_FORMATS)
    except UnidentifiedImageError as error:
        raise DecodeError("empty file" if not data else "not a picture of any known format") from error
    except _DECODER_ERRORS as error:
        raise _damaged(error) from error
    _check_pixels(image.width, image.height)
    return image


def open_image(data: bytes, *, upright: bool = False) -> Image.Image:
    """Open and fully load a picture (of an animation, the first frame).

    Args:
        data: The file's bytes.
        upright: Turn it as its EXIF orientation says.

    Raises:
        DecodeError: Not a picture, damaged, or larger than `MAX_PIXELS`.
    """
    if data.startswith(_NPY_MAGIC):
        array = _decode_npy(data)
        return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
    image = open_header(data)
    try:
        image.load()
    except _DECODER_ERRORS as error:
        raise _damaged(error) from error
    turn = _TURNS.get(orientation(image)) if upright else None
    return image if turn is None else image.transpose(turn)


def orientation(image: Image.Image) -> int:
    """Return a picture's EXIF orientation, 1 … 8: 1 is upright, and so is one whose EXIF makes no sense."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except _DECODER_ERRORS:
        return 1
    return int(value) if value in _TURNS else 1


def to_channels(image: Image.Image, channels: int) -> Image.Image:
    """Convert to 8-bit grey ("L", ITU-R 601-2 luma) or "RGB"; transparent parts show white.

    Raises:
        DecodeError: The picture has more than 8 bits per channel, so its range is unknown.
    """
    assert channels in (1, 3)
    if image.mode not in _EIGHT_BIT_MODES:
        raise DecodeError(f"pixel mode {image.mode} is not 8 bits per channel; convert the picture")
    try:
        transparent = image.has_transparency_data
    except AssertionError as error:  # Pillow's, of a palette picture without a palette
        raise DecodeError("damaged picture: its palette is missing") from error
    if transparent:
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
        uint8 [H, W, channels], values 0 … 255, bit-equal to Pillow's decoder; it may be read-only.

    Raises:
        DecodeError: Not a picture, damaged, or too large.
    """
    array: UInt8Array | None = None
    if data.startswith(_JPEG_MAGIC):
        array = _decode_jpeg(data, channels)
    elif data.startswith(_PNG_MAGIC):
        array = _decode_png(data, channels)
    elif data[8:16] in (b"WEBPVP8 ", b"WEBPVP8L"):
        array = _decode_webp(data, channels)
    elif data.startswith(_NPY_MAGIC):
        array = _to_wider(_decode_npy(data), channels)
    if array is not None:
        return array
    return pixels(to_channels(open_image(data), channels))


def npy_layout(data: bytes) -> NpyLayout:
    """Read the header of a NumPy file (`.npy`) that holds one picture.

    Raises:
        DecodeError: Not uint8 [H, W], [H, W, 1] or [H, W, 3] in C order, larger than `MAX_PIXELS`,
            or no sound header.
    """
    if data[6:7] == b"\x01":
        length, start = int.from_bytes(data[8:10], "little"), 10
    else:  # versions 2 and 3
        length, start = int.from_bytes(data[8:12], "little"), 12
    offset = start + length
    found = _NPY_HEADER.fullmatch(data, start, offset) if length <= _NPY_HEADER_LIMIT else None
    if found is None or offset > len(data) or None in found.groups():
        raise DecodeError("NumPy file whose header tells of no plain array")
    kind, fortran, shape = found.groups()
    if kind.lstrip(b"|<>=") != b"u1":
        raise DecodeError(f"NumPy file of type {kind[:20].decode('ascii', 'replace')!r}, not uint8")
    if fortran == b"True":
        raise DecodeError("NumPy file in Fortran order")
    sides = _NPY_SHAPE.fullmatch(shape)
    height, width, channels = (int(side or 1) for side in sides.groups()) if sides else (0, 0, 0)
    if height * width == 0:
        text = shape[:40].decode("ascii", "replace")
        raise DecodeError(f"NumPy file of shape ({text}), which is no picture [H, W], [H, W, 1] or [H, W, 3]")
    _check_pixels(width, height)
    return NpyLayout(height, width, channels, offset)


def _decode_npy(data: bytes) -> UInt8Array:
    """Return the pixels of a NumPy file where they lie, uint8 [H, W, C]."""
    layout = npy_layout(data)
    if len(data) < layout.file_bytes:
        raise DecodeError(f"damaged picture: {len(data)} bytes of a NumPy file of {layout.file_bytes}")
    shape = layout.height, layout.width, layout.channels
    return np.frombuffer(data, np.uint8, layout.file_bytes - layout.offset, layout.offset).reshape(shape)


def decode_into(data: UInt8Array, out: UInt8Array, *, mirrored: bool = False) -> None:
    """Decode one picture straight to its place in a batch.

    Ordinary JPEGs are written there by the decoder itself, without an array of their own.

    Args:
        data: uint8 [n], the file's bytes.
        out: uint8 [H, W, C], C-contiguous, C of 1 or 3; receives the pixels that `decode` would return.
        mirrored: Flip it left to right.

    Raises:
        DecodeError: As `decode`, and for a picture of another height or width.
    """
    if data[: len(_JPEG_MAGIC)].tobytes() == _JPEG_MAGIC and _decode_jpeg_into(data, out, mirrored):
        return
    array = decode(data.tobytes(), out.shape[2])
    _check_shape(array.shape[:2], out)
    out[...] = array[:, ::-1] if mirrored else array


def _decode_jpeg_into(data: UInt8Array, out: UInt8Array, mirrored: bool) -> bool:
    """Decode an ordinary JPEG of as many channels as `out`; False for any other."""
    height, width, channels = out.shape
    try:
        *shape, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        if colorspace != ("YCbCr" if channels == 3 else "Gray"):
            return False
        _check_shape(shape, out)
        order = "GRAY" if channels == 1 else "RGB"
        if not mirrored or width * channels % 8:
            simplejpeg.decode_jpeg(data, colorspace=order, buffer=out)
            if mirrored:
                out[...] = out[:, ::-1].copy()
            return True
        # A row whose bytes are reversed is the mirrored row with its colours the other way round: decode the
        # colours that way, and reverse eight bytes at a time, which costs a tenth of moving pixel by pixel.
        backwards = np.empty_like(out)
        order = "BGR" if channels == 3 else order
        simplejpeg.decode_jpeg(data, colorspace=order, buffer=backwards)
        rows, reversed_rows = out.reshape(height, -1), backwards.reshape(height, -1)
        rows.view("<u8")[...] = reversed_rows.view(">u8")[:, ::-1]
    except DecodeError:
        raise
    except ValueError:
        return False
    return True


def _check_shape(shape: Sequence[int], out: UInt8Array) -> None:
    if tuple(shape) != out.shape[:2]:
        raise DecodeError(f"{shape[1]} x {shape[0]} pixels, the index says {out.shape[1]} x {out.shape[0]}")


def _decode_jpeg(data: bytes, channels: int) -> UInt8Array | None:
    """Decode an ordinary JPEG; None for anything odd, which Pillow then judges."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        _check_pixels(width, height)
        if colorspace == "Gray":
            return _to_wider(np.asarray(simplejpeg.decode_jpeg(data, colorspace="GRAY"), np.uint8), channels)
        if colorspace == "YCbCr" and channels == 3:
            return np.asarray(simplejpeg.decode_jpeg(data, colorspace="RGB"), dtype=np.uint8)
    except DecodeError:
        raise
    except ValueError:
        return None
    return None  # CMYK, RGB-coded, or colour wanted as grey: not the decoder's luma but Pillow's


def _decode_png(data: bytes, channels: int) -> UInt8Array | None:
    """Decode a PNG of 8-bit grey or RGB without transparency; None for any other: that is Pillow's."""
    width, height, depth, colour = struct.unpack_from(">IIBB", data.ljust(26, b"\0"), 16)
    first = data.find(b"IDAT")
    if depth != 8 or colour not in (0, 2) or first < 0 or b"tRNS" in data[:first]:
        return None
    _check_pixels(width, height)
    try:
        array = imagecodecs.png_decode(data)
    except (imagecodecs.PngError, ValueError):  # it fails to read some of its own messages
        return None
    return _plain(array, channels)


def _decode_webp(data: bytes, channels: int) -> UInt8Array | None:
    """Decode a still WebP without transparency; None for any other: that is Pillow's."""
    if len(data) < 30:
        return None
    if data[15:16] == b"L":  # lossless: both sides less one, in 14 bits each
        sides = int.from_bytes(data[21:25], "little")
        width, height = (sides & 0x3FFF) + 1, (sides >> 14 & 0x3FFF) + 1
    else:
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
    _check_pixels(width, height)
    try:
        array = imagecodecs.webp_decode(data)
    except (imagecodecs.WebpError, ValueError):
        return None
    return _plain(array, channels)


def _plain(array: npt.NDArray[np.generic], channels: int) -> UInt8Array | None:
    """Return what a decoder gave as [H, W, channels]; None if it has alpha or would have to become grey."""
    if array.dtype != np.uint8:
        return None
    shaped = array.astype(np.uint8, copy=False).reshape(*array.shape[:2], -1)
    return _to_wider(shaped, channels) if shaped.shape[2] in (1, 3) else None


def _to_wider(array: UInt8Array, channels: int) -> UInt8Array | None:
    """Repeat grey to RGB if wanted; None for colour wanted as grey, which is Pillow's work."""
    if array.shape[2] == channels:
        return array
    return np.repeat(array, 3, axis=2) if channels == 3 else None


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise DecodeError(f"{width} x {height} pixels is more than the limit of {MAX_PIXELS}")


def _damaged(error: BaseException) -> DecodeError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return DecodeError(f"damaged picture: {reason}")
