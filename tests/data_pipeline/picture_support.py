"""Pictures for tests, ordinary and hostile, coded by Pillow or by hand."""

import io
import zlib

import numpy as np
from PIL import Image

ORIENTATION = 0x0112


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


def turned_by(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def chunk(name: bytes, body: bytes) -> bytes:
    """A PNG chunk."""
    return len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big")


def png_by_hand(
    width: int, height: int, *, depth: int = 8, colour: int = 2, before: bytes = b"", after: bytes = b""
) -> bytes:
    """A black PNG of any kind, with chunks before and after its pixels; a large one has few of its pixels."""
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([depth, colour, 0, 0, 0])
    row = 1 + width * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour] * depth // 8
    body = zlib.compress(b"\0" * min(row * height, 10_000))
    chunks = chunk(b"IHDR", header) + before + chunk(b"IDAT", body) + after + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def npy_by_hand(shape: str, pixels: bytes, *, kind: str = "|u1", fortran: bool = False) -> bytes:
    """A NumPy file of version 1 after its published description."""
    header = f"{{'descr': '{kind}', 'fortran_order': {fortran}, 'shape': ({shape}), }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + pixels
