"""May a picture file stay as it is? Told from its headers alone, in microseconds, without decoding pixels.

Shards that keep a source's own bytes hold only files that decode to the wanted pixels as they are: JPEG, PNG,
WebP or NumPy of the right size and channels, 8 bits, opaque, a single picture, upright, and whole as far as
the structure tells. Whatever is not certain is said not to fit: then it is decoded and coded anew, which
loses nothing. The walks below know the ordinary headers. A JPEG or WebP whose metadata could say that it is
to be turned (EXIF, XMP), or is rare, is shown to Pillow, which reads no pixels for its answer either.
"""

import struct
import zlib
from typing import Final

from data_pipeline.decode import DecodeError, npy_layout, open_header, orientation, sniff

_SOS, _DQT, _DHT, _DRI, _COMMENT = 0xDA, 0xDB, 0xC4, 0xDD, 0xFE
_APP0, _APP14, _APP15 = 0xE0, 0xEE, 0xEF
_FRAMES: Final = frozenset({0xC0, 0xC1, 0xC2})
"""Baseline, extended and progressive Huffman-coded frames: those that every decoder reads."""
_SKIPPED: Final = frozenset({_DHT, _DRI, _COMMENT})
_JPEG_SEGMENT: Final = struct.Struct(">BBH")
_EOI: Final = b"\xff\xd9"

_IHDR: Final = struct.Struct(">IIBBBBB")
_PNG_CHUNK: Final = struct.Struct(">I4s")
_UINT32: Final = struct.Struct(">I")
_PNG_START: Final = b"\x00\x00\x00\x0dIHDR"
_PNG_END: Final = b"\x00\x00\x00\x00IEND\xae\x42\x60\x82"
_PNG_PALETTE: Final = 3
_PNG_HARMLESS: Final = {b"gAMA": 4, b"cHRM": 32, b"sRGB": 1, b"pHYs": 9, b"bKGD": 1, b"sBIT": 1, b"tIME": 7}
"""Chunks that decoding does not heed, and their least lengths."""
_PNG_KEYWORDS: Final = frozenset(
    {b"Title", b"Author", b"Description", b"Copyright", b"Creation Time", b"Software", b"Disclaimer"}
    | {b"Warning", b"Source", b"Comment", b"date:create", b"date:modify", b"date:timestamp"}
)
"""Text that decoding does not heed. Not all is harmless: EXIF hides in text too."""
_PNG_TEXT_LIMIT: Final = 1 << 20

_VP8_START: Final = b"\x9d\x01\x2a"
_VP8L_START: Final = 0x2F
_VP8X_HEADER: Final = struct.Struct("<II3s3s")
_PROFILE_EXIF_XMP: Final = 0x20 | 0x08 | 0x04
"""Bits that a still, opaque picture may set."""


def extension_if_it_fits(data: bytes, size: int, channels: int) -> str | None:
    """Tell whether a picture file may be kept as it is.

    Args:
        data: The file's bytes.
        size: Wanted side in pixels.
        channels: Wanted channels. Grey fits 3 too: it decodes to three equal channels, exactly.

    Returns:
        "jpg", "png", "webp" or "npy"; None if it does not fit, or is not certain to.
    """
    form = sniff(data[:16])
    try:
        match form:
            case "jpg":
                fits = _jpeg_fits(data, size, channels)
            case "png":
                fits = _png_fits(data, size, channels)
            case "webp":
                fits = _webp_fits(data, size, channels)
            case "npy":
                fits = _npy_fits(data, size, channels)
            case _:
                fits = False
    except (IndexError, struct.error, DecodeError):  # headers that end in mid-air
        return None
    return form if fits else None


def _jpeg_fits(data: bytes, size: int, channels: int) -> bool:
    if not data.endswith(_EOI) and not data.rstrip(b"\0").endswith(_EOI):
        return False
    position, components, plain = 2, 0, True
    while True:
        prefix, marker, length = _JPEG_SEGMENT.unpack_from(data, position)
        if prefix != 0xFF:
            return False
        if marker == 0xFF:  # any number of these may stand before a marker
            position += 1
            continue
        body = position + 4
        position += 2 + length
        if marker in _SKIPPED:
            if length < 2:
                return False
        elif marker in _FRAMES:
            if components or not _jpeg_frame_fits(data[body:position], size, channels):
                return False
            components = data[body + 5]
        elif marker == _SOS:
            scan = data[body]
            whole = 1 <= scan <= components and length == 6 + 2 * scan and position + len(_EOI) < len(data)
            return whole and (plain or _pillow_finds_it_fits(data, size, channels))
        elif _APP0 <= marker <= _APP15 or marker == _DQT:
            plain = plain and _jpeg_segment_is_ordinary(
                marker, length, data[body], data[body + 65 : body + 66]
            )
        else:
            return False


def _jpeg_segment_is_ordinary(marker: int, length: int, first: int, second_table: bytes) -> bool:
    """Tell whether a segment is one of those that nearly all files have and that turn nothing."""
    if marker == _DQT:  # one or two tables of 8 bits
        return first < 16 and (length == 67 or (length == 132 and second_table < b"\x10"))
    return length >= {_APP0: 16, _APP14: 14}.get(marker, 1 << 16)


def _jpeg_frame_fits(frame: bytes, size: int, channels: int) -> bool:
    if len(frame) < 6:
        return False
    bits, height, width, components = struct.unpack_from(">BHHB", frame)
    return (
        (bits, height, width) == (8, size, size)
        and (components == 1 or components == channels == 3)
        and len(frame) == 6 + 3 * components
    )


def _pillow_finds_it_fits(data: bytes, size: int, channels: int) -> bool:
    image = open_header(data)
    return (
        image.size == (size, size)
        and image.mode in (("L", "RGB") if channels == 3 else ("L",))
        and getattr(image, "n_frames", 1) == 1
        and orientation(image) == 1
    )


def _png_fits(data: bytes, size: int, channels: int) -> bool:
    if data[8:16] != _PNG_START or not data.endswith(_PNG_END):
        return False
    width, height, depth, colour, compression, filtering, interlace = _IHDR.unpack_from(data, 16)
    if (width, height, depth, compression, filtering) != (size, size, 8, 0, 0) or interlace > 1:
        return False
    if colour != 0 and (colour not in (2, _PNG_PALETTE) or channels != 3):
        return False  # with an alpha channel, or colour wanted as grey
    return _png_chunks_fit(data, colour)


def _png_chunks_fit(data: bytes, colour: int) -> bool:
    """Walk all chunks before the last: such as turn nothing, with right checksums, the pixels' in one row."""
    view = memoryview(data)
    position, end = 8, len(data) - len(_PNG_END)
    idat_ends, palette, text = 0, False, 0
    while position < end:
        length, name = _PNG_CHUNK.unpack_from(data, position)
        start, body, position = position, position + 8, position + 12 + length
        if name == b"IDAT":
            ordinary = idat_ends in (0, start)
            idat_ends = position
        elif name == b"PLTE":
            ordinary = colour != 0 and not palette and idat_ends == 0 and length in range(3, 769, 3)
            palette = True
        elif name == b"tEXt":
            text += length
            keyword = data[body : body + length].partition(b"\0")[0]
            ordinary = keyword in _PNG_KEYWORDS and len(keyword) < length and text <= _PNG_TEXT_LIMIT
        else:
            ordinary = start == 8 or length >= _PNG_HARMLESS.get(name, length + 1)
        (checksum,) = _UINT32.unpack_from(data, body + length)
        if not ordinary or zlib.crc32(view[start + 4 : body + length]) != checksum:
            return False
    return position == end and idat_ends > 0 and (palette or colour != _PNG_PALETTE)


def _webp_fits(data: bytes, size: int, channels: int) -> bool:
    if channels != 3 or data[:4] != b"RIFF" or int.from_bytes(data[4:8], "little") + 8 != len(data):
        return False  # WebP knows no grey
    if data[12:16] != b"VP8X":
        return _webp_picture_ends(data, 12, size) == len(data)
    length, flags, *sides = _VP8X_HEADER.unpack_from(data, 16)
    if length != 10 or flags & ~_PROFILE_EXIF_XMP or sides != [(size - 1).to_bytes(3, "little")] * 2:
        return False  # with alpha, animated, of another size, or none of today's files
    position, pictures, plain = 30, 0, True
    while position < len(data):
        name = data[position : position + 4]
        if name in (b"VP8 ", b"VP8L"):
            position = _webp_picture_ends(data, position, size)
            if position == 0:
                return False
            pictures += 1
            continue
        if name in (b"EXIF", b"XMP "):
            plain = False
        elif name != b"ICCP":
            return False
        length = int.from_bytes(data[position + 4 : position + 8], "little")
        position += 8 + length + length % 2
    if position != len(data) or pictures != 1:
        return False
    return plain or _pillow_finds_it_fits(data, size, channels)


def _webp_picture_ends(data: bytes, position: int, size: int) -> int:
    """Where the chunk of an opaque picture of that size ends; 0 if that is not what stands there."""
    name, length = data[position : position + 4], int.from_bytes(data[position + 4 : position + 8], "little")
    body = position + 8
    stop = body + length + length % 2
    if stop > len(data) or length < 11:
        return 0
    if name == b"VP8 ":
        tag = int.from_bytes(data[body : body + 3], "little")
        # A key frame that is shown, of a known profile, with its first part inside the chunk.
        sound = tag & 1 == 0 and tag >> 1 & 7 <= 3 and tag >> 4 & 1 == 1 and tag >> 5 < length
        width, height = struct.unpack_from("<HH", data, body + 6)
        found = (width & 0x3FFF, height & 0x3FFF)
        return stop if sound and data[body + 3 : body + 6] == _VP8_START and found == (size, size) else 0
    if name == b"VP8L":
        bits = int.from_bytes(data[body + 1 : body + 5], "little")
        found = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        # What is left of the bits: whether there is alpha, and the version.
        return stop if data[body] == _VP8L_START and bits >> 28 == 0 and found == (size, size) else 0
    return 0


def _npy_fits(data: bytes, size: int, channels: int) -> bool:
    found = npy_layout(data)
    fits = (found.height, found.width) == (size, size) and found.channels in (1, channels)
    return fits and len(data) == found.file_bytes
