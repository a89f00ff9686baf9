"""How pictures are stored in shards: coded anew, or the source's own bytes."""

import io
import re
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, Final

import numpy as np
from PIL import Image

from data_pipeline.errors import UserError

_JPEG_TEXT: Final = re.compile(r"jpeg:([1-9][0-9]?|100)")
# Method and effort of libwebp, chosen by measurement: more of either gains a few per cent of size for
# several times the work, but for the step that grey needs to get below PNG.
_WEBP_EFFORT: Final = {"RGB": (0, 25), "L": (2, 25)}


class EncodingKind(StrEnum):
    """The ways in which shards hold pictures."""

    SOURCE = "source"
    """The source's own bytes where they fit as they are, PNG where they do not."""
    PNG = "png"
    """The pixels without loss, in the form everyone reads."""
    JPEG = "jpeg"
    """Smallest, fastest to decode and lossy: baseline, 4:4:4, of a chosen quality."""
    WEBP_LOSSLESS = "webp-lossless"
    """The pixels without loss; in colour, smaller and several times faster to write than PNG."""
    RAW = "raw"
    """The pixels uncoded, as a NumPy file."""


@dataclass(frozen=True)
class Encoding:
    """What the shards hold. `str` gives the text that `parse` reads and the index stores.

    Attributes:
        kind: The way of coding.
        quality: Of JPEG, 1 … 100; None for all others.
    """

    PNG: ClassVar["Encoding"]
    SOURCE: ClassVar["Encoding"]

    kind: EncodingKind
    quality: int | None = None

    def __post_init__(self) -> None:
        assert (self.quality is not None) == (self.kind is EncodingKind.JPEG)
        assert self.quality is None or 1 <= self.quality <= 100

    @classmethod
    def parse(cls, text: str) -> "Encoding":
        """Read what a user or an index calls an encoding.

        Raises:
            UserError: No such encoding.
        """
        jpeg = _JPEG_TEXT.fullmatch(text)
        if jpeg is not None:
            return cls(EncodingKind.JPEG, int(jpeg[1]))
        try:
            kind = EncodingKind(text)
        except ValueError:
            kind = EncodingKind.JPEG  # without a quality: as wrong as any other text
        if kind is EncodingKind.JPEG:
            raise UserError(
                f"--encoding {text}: give source, png, jpeg:Q with a quality Q of 1 to 100 (jpeg:95), "
                "webp-lossless or raw"
            )
        return cls(kind)

    def __str__(self) -> str:
        return self.kind.value if self.quality is None else f"{self.kind.value}:{self.quality}"


Encoding.PNG = Encoding(EncodingKind.PNG)
Encoding.SOURCE = Encoding(EncodingKind.SOURCE)


def encode(image: Image.Image, encoding: Encoding) -> tuple[str, bytes]:
    """Code a picture anew: the pixels and nothing else, no colour profile and no comment.

    Args:
        image: Mode "L" or "RGB".
        encoding: Any but `source`, which codes nothing.

    Returns:
        The member's extension and its bytes, the same for the same pixels and library versions.
    """
    assert image.mode in _WEBP_EFFORT
    array, buffer = np.asarray(image, dtype=np.uint8), io.BytesIO()
    # From bare pixels: saving the picture itself would copy what is attached to it.
    bare = Image.fromarray(array)
    match encoding.kind:
        case EncodingKind.RAW:
            np.save(buffer, array, allow_pickle=False)
            return "npy", buffer.getvalue()
        case EncodingKind.PNG:
            bare.save(buffer, "PNG")
            return "png", buffer.getvalue()
        case EncodingKind.JPEG:
            # Not by simplejpeg: below quality 96 it takes libjpeg's inexact transform (0.4 dB at 95).
            bare.save(buffer, "JPEG", quality=encoding.quality, subsampling="4:4:4")
            return "jpg", buffer.getvalue()
        case EncodingKind.WEBP_LOSSLESS:
            method, effort = _WEBP_EFFORT[bare.mode]
            # WebP knows no grey; three equal channels turn into the same grey again.
            bare.convert("RGB").save(buffer, "WEBP", lossless=True, method=method, quality=effort)
            return "webp", buffer.getvalue()
    raise AssertionError(f"{encoding} codes nothing")
