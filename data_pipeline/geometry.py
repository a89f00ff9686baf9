"""Crop and resize recipes by name. A name's pixels never change: another rule gets another name."""

from enum import StrEnum

import PIL
from PIL import Image, features


class Geometry(StrEnum):
    """How a picture of any shape becomes a square of the wanted size."""

    NONE = "none"
    """Pixels as they are; the picture must already be a square of that size."""

    DDPM_LSUN = "ddpm-lsun"
    """Centre crop to the shorter side, then Lanczos to the size: the LSUN preparation of StyleGAN's
    dataset tool, which the paper used (Ho, Jain, Abbeel 2020, appendix B)."""


class GeometryError(ValueError):
    """The picture does not fit the recipe; the message is the reason."""


def apply(name: Geometry, image: Image.Image, size: int) -> Image.Image:
    """Bring one picture to size x size pixels.

    Args:
        name: The recipe.
        image: Mode "L" or "RGB", 8 bits.
        size: Wanted side in pixels.

    Returns:
        A picture of the same mode, size x size.

    Raises:
        GeometryError: `Geometry.NONE` and the picture has another shape.
    """
    if name is Geometry.NONE:
        if image.size != (size, size):
            raise GeometryError(f"{image.width} x {image.height} pixels, not {size} x {size}")
        return image
    assert name is Geometry.DDPM_LSUN
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return square if side == size else square.resize((size, size), Image.Resampling.LANCZOS)


def library_versions() -> dict[str, str]:
    """Return the versions of whatever decides the pixels (decoder, resampler, PNG coder) for the index."""
    found = {"pillow": PIL.__version__}
    for feature in ("libjpeg_turbo", "zlib", "zlib_ng", "webp"):
        version = features.version(feature)
        if version is not None:
            found[feature] = version
    return found
