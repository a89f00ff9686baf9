"""One picture of a source -> what the shards hold of it: its own bytes, or the picture coded anew."""

from dataclasses import dataclass

from data_pipeline import geometry
from data_pipeline.decode import DecodeError, open_image, to_channels
from data_pipeline.encoding import Encoding, EncodingKind, encode
from data_pipeline.geometry import Geometry, GeometryError
from data_pipeline.headers import extension_if_it_fits


@dataclass(frozen=True)
class Form:
    """What every picture of a data set is brought to.

    Attributes:
        size: Side in pixels.
        geometry: How pictures of other shapes get there.
        encoding: How they are stored.
        channels: 1 (grey) or 3 (RGB).
    """

    size: int
    geometry: Geometry
    encoding: Encoding
    channels: int


@dataclass(slots=True)
class Fitted:
    """A picture as the shards hold it.

    Attributes:
        extension: The member's: "jpg", "png", "webp" or "npy".
        payload: The member's bytes.
        kept: They are the source's own.
    """

    extension: str
    payload: bytes
    kept: bool


def fit(data: bytes, form: Form) -> Fitted:
    """Bring one picture into the form. Pure: the same bytes give the same outcome in any process.

    With the encoding `source` a file that fits as it is (`headers.extension_if_it_fits`) is kept untouched.
    Every other picture is decoded, set upright, laid on white, brought to size and coded; under `source` as
    PNG, so that nothing is lost twice.

    Args:
        data: A picture file's bytes.
        form: What is wanted.

    Raises:
        DecodeError: No usable picture, or one so narrow that the geometry cannot be computed.
        GeometryError: The geometry is `none` and the picture, sound as it is, has another size.
    """
    encoding = form.encoding
    if encoding.kind is EncodingKind.SOURCE:
        extension = extension_if_it_fits(data, form.size, form.channels)
        if extension is not None:
            return Fitted(extension, data, kept=True)
        encoding = Encoding.PNG
    # By Pillow even where the faster JPEG decoder would do: turning its array into a picture costs more.
    image = to_channels(open_image(data, upright=True), form.channels)
    try:
        image = geometry.apply(form.geometry, image, form.size)
    except GeometryError as error:
        if form.geometry is Geometry.NONE:
            raise
        raise DecodeError(str(error)) from error
    return Fitted(*encode(image, encoding), kept=False)
