"""Whatever picture comes: kept if it needs nothing, else baked to the same pixels, else refused by reason."""

import io
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.decode import DecodeError, decode, open_image, orientation, pixels, to_channels
from data_pipeline.encoding import Encoding, EncodingKind
from data_pipeline.fit import Fitted, Form, fit
from data_pipeline.geometry import Geometry, GeometryError, apply
from data_pipeline.headers import extension_if_it_fits
from tests.data_pipeline.picture_support import chunk, coded, npy_by_hand, picture, png_by_hand, turned_by

SIZE = 16
UPRIGHT_XMP = b"http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation='0' tiff:Orientation=\"1\"/>"
TURNED_XMP = b"http://ns.adobe.com/xap/1.0/\0<tiff:Orientation>6</tiff:Orientation>"


def form(encoding: str = "source", *, channels: int = 3, geometry: Geometry = Geometry.DDPM_LSUN) -> Form:
    return Form(SIZE, geometry, Encoding.parse(encoding), channels)


def square(mode: str = "RGB") -> Image.Image:
    return picture(SIZE, SIZE, mode)


def npy(mode: str = "RGB", shape: str = "") -> bytes:
    image = square(mode)
    return npy_by_hand(shape or ("16, 16" if mode == "L" else "16, 16, 3"), image.tobytes())


def with_segments(jpeg: bytes, *segments: tuple[int, bytes]) -> bytes:
    """Put segments at the start of a JPEG."""
    put = b"".join(bytes([0xFF, m]) + (len(body) + 2).to_bytes(2, "big") + body for m, body in segments)
    return jpeg[:2] + put + jpeg[2:]


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    """A WebP of these chunks."""
    body = b"".join(
        name + len(data).to_bytes(4, "little") + data + b"\0" * (len(data) % 2) for name, data in chunks
    )
    return b"RIFF" + (len(body) + 4).to_bytes(4, "little") + b"WEBP" + body


def webp_picture(**options: object) -> tuple[bytes, bytes]:
    """The chunk of an ordinary WebP."""
    data = coded(square(), "WEBP", **options)
    return data[12:16], data[20 : 20 + int.from_bytes(data[16:20], "little")]


def vp8x(flags: int, side: int = SIZE) -> tuple[bytes, bytes]:
    return b"VP8X", bytes([flags, 0, 0, 0]) + (side - 1).to_bytes(3, "little") * 2


def frames(count: int = 2) -> list[Image.Image]:
    return [picture(SIZE, SIZE, seed=seed) for seed in range(count)]


def animated(kind: str) -> bytes:
    first, *others = frames()
    return coded(first, kind, save_all=True, append_images=others)


def palette(colours: int, **options: object) -> bytes:
    return coded(square().quantize(colours), "PNG", **options)


TEXT = chunk(b"tEXt", b"Software\0any")
KEPT: dict[str, tuple[str, bytes, tuple[int, ...]]] = {
    # name: (extension, bytes, channels for which it fits)
    "jpeg": ("jpg", coded(square(), "JPEG"), (3,)),
    "progressive jpeg": ("jpg", coded(square(), "JPEG", progressive=True, subsampling=2), (3,)),
    "jpeg in rgb": ("jpg", coded(square(), "JPEG", keep_rgb=True), (3,)),
    "grey jpeg": ("jpg", coded(square("L"), "JPEG"), (1, 3)),
    "jpeg with restarts": ("jpg", coded(square(), "JPEG", restart_marker_rows=1), (3,)),
    "jpeg padded with zeros": ("jpg", coded(square(), "JPEG") + b"\0" * 700, (3,)),
    "jpeg with fill bytes": (
        "jpg",
        coded(square(), "JPEG").replace(b"\xff\xdb", b"\xff\xff\xff\xdb", 1),
        (3,),
    ),
    "jpeg with a comment": ("jpg", coded(square(), "JPEG", comment=b"hello"), (3,)),
    "jpeg with a profile": ("jpg", coded(square(), "JPEG", icc_profile=b"x" * 99), (3,)),
    "upright jpeg": ("jpg", coded(square(), "JPEG", exif=turned_by(1)), (3,)),
    "upright jpeg by xmp": ("jpg", with_segments(coded(square(), "JPEG"), (0xE1, UPRIGHT_XMP)), (3,)),
    "jpeg with unreadable exif": ("jpg", coded(square(), "JPEG", exif=b"Exif\0\0nothing"), (3,)),
    "png": ("png", coded(square(), "PNG"), (3,)),
    "grey png": ("png", coded(square("L"), "PNG"), (1, 3)),
    "palette png": ("png", palette(100), (3,)),
    "png with text": ("png", png_by_hand(SIZE, SIZE, before=TEXT, after=TEXT), (3,)),
    "webp": ("webp", coded(square(), "WEBP"), (3,)),
    "lossless webp": ("webp", coded(square(), "WEBP", lossless=True), (3,)),
    "webp with a profile": ("webp", coded(square(), "WEBP", icc_profile=b"x" * 99), (3,)),
    "upright webp": ("webp", coded(square(), "WEBP", exif=turned_by(1)), (3,)),
    "webp with unreadable exif": ("webp", coded(square(), "WEBP", exif=b"nothing"), (3,)),
    "npy": ("npy", npy(), (3,)),
    "grey npy": ("npy", npy("L"), (1, 3)),
    "grey npy with channel": ("npy", npy("L", "16, 16, 1"), (1, 3)),
}

BAKED: dict[str, bytes] = {
    "too large": coded(picture(20, 16), "JPEG"),
    "jpeg turned by exif": coded(square(), "JPEG", exif=turned_by(6)),
    "jpeg turned by xmp": with_segments(coded(square(), "JPEG"), (0xE1, TURNED_XMP)),
    "jpeg of two exifs": with_segments(
        coded(square(), "JPEG", exif=turned_by(1)), (0xE1, b"Exif\0\0" + turned_by(3).tobytes()[6:])
    ),
    "jpeg with garbage behind": coded(square(), "JPEG") + b"garbage",
    "cmyk jpeg": coded(square("CMYK"), "JPEG"),
    "multi-picture jpeg": animated("MPO"),
    "png turned by exif": coded(square(), "PNG", exif=turned_by(8)),
    "png turned by exif behind": png_by_hand(SIZE, SIZE, after=chunk(b"eXIf", turned_by(8).tobytes()[6:])),
    "png with alpha": coded(square("RGBA"), "PNG"),
    "png of grey and alpha": coded(square("LA"), "PNG"),
    "png palette with transparency": palette(100, transparency=3),
    "png palette of four bits": palette(16),
    "png with a transparent colour": coded(square(), "PNG", transparency=(1, 2, 3)),
    "png of 16-bit colour": png_by_hand(SIZE, SIZE, depth=16),
    "png of one bit": coded(square("1"), "PNG"),
    "png with garbage behind": coded(square(), "PNG") + b"garbage",
    "animated png": animated("PNG"),
    "png with text that turns it": png_by_hand(
        SIZE, SIZE, before=chunk(b"tEXt", b'XML:com.adobe.xmp\0tiff:Orientation="6"')
    ),
    "webp turned by exif": coded(square(), "WEBP", exif=turned_by(5)),
    "webp turned by xmp": coded(square(), "WEBP", xmp=TURNED_XMP[29:]),
    "webp with alpha": coded(square("RGBA").rotate(30), "WEBP"),
    "lossless webp with alpha": coded(square("RGBA").rotate(30), "WEBP", lossless=True),
    "animated webp": animated("WEBP"),
    "gif": coded(square(), "GIF"),
    "animated gif": animated("GIF"),
    "bmp": coded(square(), "BMP"),
    "tiff": coded(square(), "TIFF"),
    "ppm": coded(square(), "PPM"),
    "one pixel": coded(picture(1, 1), "PNG"),
    "npy with garbage behind": npy() + b"garbage",
}

REFUSED: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "empty file"),
    "zeros": (bytes(500), "not a picture"),
    "text": (b"<html>404 not found</html>", "not a picture"),
    "png bomb": (png_by_hand(60_000, 60_000), "decompression bomb"),
    "large png": (png_by_hand(10_000, 10_000), "more than the limit"),
    "npy bomb": (npy_by_hand("60000, 60000, 3", b"x"), "more than the limit"),
    "jpeg cut short": (coded(picture(40, 40), "JPEG")[:-200], "damaged picture"),
    "jpeg of a head": (coded(square(), "JPEG")[:30], "damaged picture|not a picture"),
    "png cut short": (coded(picture(SIZE, SIZE), "PNG")[:-200], "damaged picture"),
    "webp cut short": (coded(square(), "WEBP", lossless=True)[:-200], "damaged picture|not a picture"),
    "npy cut short": (npy()[:-1], "damaged picture"),
    "grey of 16 bits": (coded(Image.fromarray(np.full((16, 16), 300, np.uint16)), "PNG"), "not 8 bits"),
    "floats": (coded(Image.new("F", (16, 16)), "TIFF"), "not 8 bits"),
}


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("channels", [1, 3])
def test_what_fits_is_kept_untouched(name: str, channels: int) -> None:
    extension, data, fitting = KEPT[name]
    fitted = fit(data, form(channels=channels))
    baked = fit(data, form("png", channels=channels))
    np.testing.assert_array_equal(decode(fitted.payload, channels), decode(baked.payload, channels))
    if channels in fitting:
        assert fitted == Fitted(extension, data, kept=True)
    else:
        assert (fitted.kept, fitted.payload) == (False, baked.payload)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("name", BAKED)
def test_what_does_not_fit_is_baked_without_loss(name: str) -> None:
    data = BAKED[name]
    fitted = fit(data, form())
    assert (fitted.extension, fitted.kept) == ("png", False)
    assert fitted == fit(data, form("png"))
    upright = to_channels(open_image(data, upright=True), 3)
    np.testing.assert_array_equal(decode(fitted.payload, 3), pixels(apply(Geometry.DDPM_LSUN, upright, SIZE)))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("encoding", ["source", "png"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_usable_picture_is_refused_by_reason(name: str, encoding: str) -> None:
    data, reason = REFUSED[name]
    with pytest.raises(DecodeError, match=reason):
        fit(data, form(encoding))


def test_upright_and_white_are_what_one_sees() -> None:
    image = square()
    turned = fit(coded(image, "PNG", exif=turned_by(6)), form())
    np.testing.assert_array_equal(decode(turned.payload, 3), np.rot90(np.asarray(image), -1))
    glass = fit(coded(Image.new("RGBA", (SIZE, SIZE), (9, 9, 9, 0)), "PNG"), form())
    assert np.unique(decode(glass.payload, 3)).tolist() == [255]


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "MPO"])
def test_of_an_animation_the_first_picture_counts(kind: str) -> None:
    found = decode(fit(animated(kind), form()).payload, 3).astype(int)
    first, second = (np.abs(found - np.asarray(frame).astype(int)).mean() for frame in frames())
    assert first < second / 2 + 12  # GIF and JPEG lose something
    if kind == "PNG":
        assert first == 0


def test_adobes_inverted_cmyk_is_not_a_negative() -> None:
    white = Image.new("CMYK", (SIZE, SIZE), 0)
    by_adobe = coded(white, "JPEG")
    assert b"Adobe" in by_adobe
    assert decode(fit(by_adobe, form()).payload, 3).min() > 250


def test_a_gif_called_jpg_is_known_by_its_bytes() -> None:
    assert fit(coded(square(), "GIF"), form()).extension == "png"  # nobody asks for its name


@pytest.mark.parametrize("encoding", ["source", "png", "raw"])
def test_none_wants_the_exact_size(encoding: str) -> None:
    wanted = form(encoding, geometry=Geometry.NONE)
    with pytest.raises(GeometryError, match="20 x 16 pixels, not 16 x 16"):
        fit(coded(picture(20, 16), "JPEG"), wanted)
    assert fit(coded(square(), "JPEG"), wanted).kept == (encoding == "source")
    with pytest.raises(DecodeError, match="decompression bomb"):
        fit(png_by_hand(60_000, 60_000), wanted)


@pytest.mark.parametrize("geometry", [Geometry.ADM, Geometry.BOX])
def test_a_thread_is_a_rejected_picture_not_a_fault(geometry: Geometry) -> None:
    with pytest.raises(DecodeError, match="before the crop"):
        fit(coded(Image.new("L", (1, 60_000_00)), "PNG"), form(geometry=geometry))


@pytest.mark.parametrize(
    ("encoding", "extension"),
    [("png", "png"), ("jpeg:90", "jpg"), ("webp-lossless", "webp"), ("raw", "npy")],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_all_other_encodings_bake_everything(encoding: str, extension: str, channels: int) -> None:
    for data in (coded(square(), "JPEG"), coded(square("L"), "PNG"), npy(), coded(picture(40, 30), "WEBP")):
        fitted = fit(data, form(encoding, channels=channels))
        assert (fitted.extension, fitted.kept) == (extension, False)
        assert decode(fitted.payload, channels).shape == (SIZE, SIZE, channels)


def test_workers_can_be_sent_everything() -> None:
    wanted = Form(SIZE, Geometry.ADM, Encoding(EncodingKind.JPEG, 90), 1)
    assert pickle.loads(pickle.dumps(wanted)) == wanted
    fitted = fit(KEPT["jpeg"][1], form())
    assert pickle.loads(pickle.dumps(fitted)) == fitted


def spoiled(data: bytes, start: int, put: bytes, remove: int | None = None) -> bytes:
    return data[:start] + put + data[start + (len(put) if remove is None else remove) :]


JPEG, PNG = KEPT["jpeg"][1], coded(square(), "PNG")
VP8, VP8L = webp_picture(), webp_picture(lossless=True)
SPOILED: dict[str, bytes] = {
    "no end of image": JPEG[:-2],
    "the end of image alone": JPEG[: JPEG.index(b"\xff\xda") + 14] + b"\xff\xd9",
    "12 bits": spoiled(JPEG, JPEG.index(b"\xff\xc0") + 4, b"\x0c"),
    "arithmetic coding": JPEG.replace(b"\xff\xc0", b"\xff\xc9"),
    "two frames": JPEG.replace(b"\xff\xc0", JPEG[JPEG.index(b"\xff\xc0") :][:19] + b"\xff\xc0"),
    "no frame": JPEG.replace(JPEG[JPEG.index(b"\xff\xc0") :][:19], b""),
    "frame of a wrong length": spoiled(JPEG, JPEG.index(b"\xff\xc0") + 9, b"\1"),
    "segment without length": with_segments(JPEG)[:2] + b"\xff\xfe\0\0" + JPEG[2:],
    "junk between segments": JPEG[:2] + b"junk" + JPEG[2:],
    "odd quantisation table": spoiled(JPEG, JPEG.index(b"\xff\xdb") + 4, b"\x10"),
    "short jfif": with_segments(JPEG, (0xE0, b"JFIF")),
    "short adobe": with_segments(JPEG, (0xEE, b"Adobe")),
    "broken photoshop": with_segments(JPEG, (0xED, b"Photoshop 3.0\x008BIM\x04\x04")),
    "header that ends nowhere": JPEG[:2] + b"\xff\xfe\xff\xff" + JPEG[4:],
    "wrong checksum": spoiled(PNG, 29, b"\0"),
    "wrong checksum of the pixels": spoiled(PNG, 60, bytes([PNG[60] ^ 1])),
    "no checksum of the end": PNG[:-1] + b"\0",
    "no pixels": png_by_hand(SIZE, SIZE)[:33] + chunk(b"IEND", b""),
    "pixels in two places": png_by_hand(SIZE, SIZE, after=TEXT + chunk(b"IDAT", b"")),
    "second header": png_by_hand(SIZE, SIZE, before=png_by_hand(8, 8)[8:33]),
    "unknown critical chunk": png_by_hand(SIZE, SIZE, before=chunk(b"ABCD", b"")),
    "short gamma": png_by_hand(SIZE, SIZE, before=chunk(b"gAMA", b"\0")),
    "text with a wrong checksum": png_by_hand(SIZE, SIZE, before=TEXT[:-1] + b"\0"),
    "text called transparency": png_by_hand(SIZE, SIZE, before=chunk(b"tEXt", b"transparency\0x")),
    "text of a keyword alone": png_by_hand(SIZE, SIZE, before=chunk(b"tEXt", b"Software")),
    "endless text": png_by_hand(SIZE, SIZE, before=chunk(b"tEXt", b"Comment\0" + bytes(1 << 20))),
    "exif in text": png_by_hand(SIZE, SIZE, before=chunk(b"tEXt", b"exif\0" + turned_by(6).tobytes())),
    "palette without colours": png_by_hand(SIZE, SIZE, colour=3),
    "palette of half a colour": png_by_hand(SIZE, SIZE, colour=3, before=chunk(b"PLTE", bytes(4))),
    "palette of grey": png_by_hand(SIZE, SIZE, colour=0, before=chunk(b"PLTE", bytes(3))),
    "palette behind": png_by_hand(SIZE, SIZE, colour=3, after=chunk(b"PLTE", bytes(3))),
    "chunk beyond the end": spoiled(PNG, 33, b"\0\xff\xff\xff"),
    "unknown compression": png_by_hand(SIZE, SIZE).replace(
        chunk(b"IHDR", bytes([0, 0, 0, 16, 0, 0, 0, 16, 8, 2, 0, 0, 0])),
        chunk(b"IHDR", bytes([0, 0, 0, 16, 0, 0, 0, 16, 8, 2, 1, 0, 0])),
    ),
    "riff longer than the file": riff(VP8)[:-2],
    "riff shorter than the file": riff(VP8) + b"\0\0",
    "riff of something else": b"RIFX" + riff(VP8)[4:],
    "picture shorter than riff": riff(VP8, (b"ABCD", b"")),
    "hidden frame": riff((b"VP8 ", spoiled(VP8[1], 0, bytes([VP8[1][0] & ~0x10])))),
    "inter frame": riff((b"VP8 ", spoiled(VP8[1], 0, bytes([VP8[1][0] | 1])))),
    "first part too long": riff((b"VP8 ", spoiled(VP8[1], 1, b"\xff\xff"))),
    "vp8 without start": riff((b"VP8 ", spoiled(VP8[1], 3, b"\0"))),
    "lossless with alpha": riff((b"VP8L", spoiled(VP8L[1], 4, bytes([VP8L[1][4] | 0x10])))),
    "lossless of version 1": riff((b"VP8L", spoiled(VP8L[1], 4, bytes([VP8L[1][4] | 0x20])))),
    "lossless without start": riff((b"VP8L", spoiled(VP8L[1], 0, b"\0"))),
    "canvas larger than the picture": riff(vp8x(0, 20), VP8),
    "picture larger than the canvas": riff(vp8x(0), (b"VP8 ", spoiled(VP8[1], 6, b"\x14\0"))),
    "two pictures": riff(vp8x(0), VP8, VP8),
    "no picture": riff(vp8x(0), (b"ICCP", b"")),
    "alpha flag": riff(vp8x(0x10), VP8),
    "reserved flag": riff(vp8x(0x40), VP8),
    "animation flag": riff(vp8x(2), VP8),
    "unknown chunk": riff(vp8x(0), VP8, (b"ABCD", b"1234")),
    "long extended header": riff((b"VP8X", vp8x(0)[1] + b"\0\0"), VP8),
    "npy of numbers": npy_by_hand("16, 16", bytes(1024), kind="<i4"),
    "npy of another size": npy_by_hand("16, 8, 3", bytes(384)),
}


@pytest.mark.parametrize("name", SPOILED)
def test_what_is_not_certain_is_not_kept(name: str) -> None:
    assert extension_if_it_fits(SPOILED[name], SIZE, 3) is None


def test_the_spoiled_webps_were_sound_before() -> None:
    for data in (
        riff(VP8),
        riff(VP8L),
        riff(vp8x(0), VP8),
        riff(vp8x(8), VP8L, (b"EXIF", turned_by(1).tobytes())),
    ):
        assert extension_if_it_fits(data, SIZE, 3) == "webp"


@pytest.mark.parametrize("name", KEPT)
def test_no_part_of_a_file_is_kept(name: str) -> None:
    extension, data, (*_, channels) = KEPT[name]
    cut = (data[:end] for end in range(len(data)) if data[end:].strip(b"\0"))  # zeros behind may go
    assert all(extension_if_it_fits(part, SIZE, channels) is None for part in cut), extension


def upright_picture_of_its_own(data: bytes, channels: int) -> None:
    """What Pillow must find in everything that is kept."""
    image = Image.open(io.BytesIO(data))
    assert image.size == (SIZE, SIZE)
    assert image.mode in (("L",) if channels == 1 else ("L", "RGB", "P"))
    assert getattr(image, "n_frames", 1) == 1
    assert not image.has_transparency_data
    # Not asked of a PNG: Pillow would decode its pixels for the answer, and they may be damaged here.
    assert image.format == "PNG" or orientation(image) == 1


EDITS = st.lists(
    st.tuples(st.sampled_from(["set", "insert", "remove"]), st.integers(0, 10**6), st.integers(0, 255)),
    min_size=1,
    max_size=4,
)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@given(st.sampled_from(sorted(KEPT)), EDITS, st.sampled_from([1, 3]))
@settings(max_examples=600, deadline=None)
def test_pillow_opens_whatever_is_kept(name: str, edits: list[tuple[str, int, int]], channels: int) -> None:
    data = bytearray(KEPT[name][1])
    for edit, place, value in edits:
        at = place % min(len(data), 700)  # where the headers are
        if edit == "set":
            data[at] = value
        elif edit == "insert":
            data.insert(at, value)
        else:
            del data[at]
    kept = extension_if_it_fits(bytes(data), SIZE, channels)
    if kept is None:
        return
    if kept == "npy":
        assert decode(bytes(data), channels).shape == (SIZE, SIZE, channels)
    else:
        upright_picture_of_its_own(bytes(data), channels)
