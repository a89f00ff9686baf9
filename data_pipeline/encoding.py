"""How pictures are stored in shards: coded anew without loss, or the source's own bytes."""

import io
from enum import StrEnum
from typing import Final

from PIL import Image

from data_pipeline.decode import pixels, sniff
from data_pipeline.errors import UserError

_KEPT_FORMATS: Final = ("jpg", "png", "webp")
_EXIF_ORIENTATION: Final = 0x0112


class Encoding(StrEnum):
    """What the shards hold."""

    PNG = "png"
    """Pixels after the geometry, coded without loss."""
    SOURCE = "source"
    """The source's own bytes; its pictures must have the right size already."""


def png(image: Image.Image) -> bytes:
    """Code an "L" or "RGB" picture as PNG: the pixels and nothing else."""
    array = pixels(image)
    buffer = io.BytesIO()
    # From bare pixels: saving the picture itself would copy its colour profile and comments.
    Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array).save(buffer, "PNG")
    return buffer.getvalue()


def kept_extension(data: bytes, image: Image.Image, where: str) -> str:
    """Return the extension under which a source's own bytes are kept.

    Args:
        data: The file's bytes.
        image: The same, opened and not turned.
        where: The file's name for messages.

    Raises:
        UserError: A format shards do not hold, or pixels that need turning.
    """
    extension = sniff(data[:16])
    if extension not in _KEPT_FORMATS:
        raise UserError(f"{where}: --encoding source keeps {', '.join(_KEPT_FORMATS)} only; use png")
    if image.getexif().get(_EXIF_ORIENTATION, 1) != 1:
        raise UserError(f"{where}: turned by its EXIF orientation, which only --encoding png applies")
    return extension
