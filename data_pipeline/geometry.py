"""Crop and resize recipes by name. A name's pixels never change: another rule gets another name."""

from enum import StrEnum

import imagecodecs
import PIL
import simplejpeg
from PIL import Image, features

from data_pipeline.decode import MAX_PIXELS

_Resampling = Image.Resampling


class Geometry(StrEnum):
    """How a picture of any shape becomes a square of the wanted size.

    Every one leaves a picture alone that has the size already. Halves of pixels: a crop leaves the odd
    pixel over at the bottom and right.
    """

    NONE = "none"
    """Pixels as they are; the picture must already be a square of that size."""

    DDPM_LSUN = "ddpm-lsun"
    """Centre crop to the shorter side, then Lanczos to the size: the LSUN preparation of StyleGAN's
    dataset tool (`create_lsun`), which the paper used (Ho, Jain, Abbeel 2020, appendix B)."""

    ADM = "adm"
    """Halve with a box filter while the shorter side is at least twice the size, bicubic so that it is the
    size, then centre crop: the loader of Dhariwal and Nichol 2021, "Diffusion Models Beat GANs on Image
    Synthesis", in whose form ImageNet is mostly used; `center-crop-dhariwal` of EDM2 (Karras et al. 2024)."""

    EDM = "edm"
    """`center-crop` of the dataset tool of Karras, Aittala, Aila, Laine 2022, "Elucidating the Design Space
    of Diffusion-Based Generative Models". The same pixels as `ddpm-lsun`, under the name its users know."""

    BOX = "box"
    """Box filter so that the shorter side is the size, then centre crop: the LSUN preparation of Dhariwal
    and Nichol 2021 (their script for bedrooms), on which their LSUN results and reference batches rest."""


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
        GeometryError: `Geometry.NONE` and the picture has another shape; or it is so narrow that the
            recipe would blow it up beyond `MAX_PIXELS` before the crop.
    """
    if image.size == (size, size):
        return image
    match name:
        case Geometry.NONE:
            raise GeometryError(f"{image.width} x {image.height} pixels, not {size} x {size}")
        case Geometry.DDPM_LSUN | Geometry.EDM:
            square = _centre(image, min(image.size))
            return square if square.width == size else square.resize((size, size), _Resampling.LANCZOS)
        case Geometry.ADM:
            while min(image.size) >= 2 * size:
                image = image.resize((image.width // 2, image.height // 2), _Resampling.BOX)
            return _centre(_shorter_side_to(image, size, _Resampling.BICUBIC), size)
        case Geometry.BOX:
            return _centre(_shorter_side_to(image, size, _Resampling.BOX), size)


def _shorter_side_to(image: Image.Image, size: int, filtering: Image.Resampling) -> Image.Image:
    """Resize a whole picture so that its shorter side has `size` pixels."""
    scale = size / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    if width * height > MAX_PIXELS:
        raise GeometryError(
            f"{image.width} x {image.height} pixels would become {width} x {height} before the crop, "
            f"more than the limit of {MAX_PIXELS}"
        )
    return image.resize((width, height), filtering)


def _centre(image: Image.Image, side: int) -> Image.Image:
    """Cut the square of that side out of the middle."""
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def library_versions() -> dict[str, str]:
    """Return the versions of whatever decides pixels and bytes (decoders, resampler, coders)."""
    found = {
        "pillow": PIL.__version__,
        "simplejpeg": simplejpeg.__version__,
        "imagecodecs": imagecodecs.__version__,
    }
    for feature in ("libjpeg_turbo", "zlib", "zlib_ng", "webp"):
        version = features.version(feature)
        if version is not None:
            found[feature] = version
    return found
