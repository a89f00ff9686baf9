"""What each `--encoding` of a data set costs: bytes, coding and decoding; and what keeping a file costs.

    python -m benchmarks.encodings [--pictures 200] [--size 256] [--json FILE]

The pictures are real: random squares of the two photographs that scikit-learn ships, brought to size with
Lanczos as the `ddpm-lsun` geometry does. One thread; rates are by processor time, the median of repeats
that go through all encodings in turn, so that a busy machine disturbs all of them alike.
"""

import argparse
import io
import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_image

from data_pipeline.decode import decode
from data_pipeline.encoding import Encoding, encode
from data_pipeline.fit import Form, fit
from data_pipeline.geometry import Geometry, apply, library_versions

ENCODINGS = ("png", "webp-lossless", "raw", "jpeg:75", "jpeg:95")
SOURCES: dict[str, tuple[str, dict[str, Any]]] = {
    # What collections are made of: name -> format and options.
    "jpeg of quality 75": ("JPEG", {"quality": 75}),
    "jpeg with exif": ("JPEG", {"quality": 75, "exif": b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0"}),
    "webp of quality 75": ("WEBP", {"quality": 75}),
    "png": ("PNG", {}),
}
_In = TypeVar("_In")


def main() -> None:
    """Measure and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers")
    options = parser.parse_args()
    pictures = photographs(options.pictures, options.size)
    rows = [row for mode in ("RGB", "L") for row in encodings(pictures, mode, options.repeats)]
    print(f"{options.pictures} pictures of {options.size} x {options.size}, one thread")
    print(f"{'encoding':16} {'mode':4} {'bytes/img':>10} {'encode img/s':>13} {'decode img/s':>13}")
    for row in rows:
        print(
            f"{row['encoding']:16} {row['mode']:4} {row['bytes']:10.0f} "
            f"{row['encode_per_second']:13.0f} {row['decode_per_second']:13.0f}"
        )
    kept = list(passthrough(pictures, options.size, options.repeats))
    print(f"\n{'kept as it is':20} {'bytes/img':>10} {'us/img':>8}")
    for row in kept:
        print(f"{row['source']:20} {row['bytes']:10.0f} {row['microseconds']:8.1f}")
    if options.json:
        document = {"schema": "encodings/1", "versions": library_versions(), "rows": rows, "kept": kept}
        options.json.write_text(json.dumps(document, indent=2))


def photographs(count: int, size: int) -> list[Image.Image]:
    """Random squares of real photographs, the same ones every time."""
    generator = np.random.default_rng(0)
    whole = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    found = []
    for number in range(count):
        photograph = whole[number % len(whole)]
        side = int(generator.integers(min(size, *photograph.size), min(photograph.size) + 1))
        left = int(generator.integers(photograph.width - side + 1))
        top = int(generator.integers(photograph.height - side + 1))
        square = photograph.crop((left, top, left + side, top + side))
        found.append(apply(Geometry.DDPM_LSUN, square, size))
    return found


def encodings(pictures: list[Image.Image], mode: str, repeats: int) -> Iterator[dict[str, object]]:
    """Code and decode all pictures in every encoding."""
    images = [picture.convert(mode) for picture in pictures]
    channels = len(images[0].getbands())
    chosen = [Encoding.parse(text) for text in ENCODINGS]
    coded = {form: [encode(image, form)[1] for image in images] for form in chosen}
    coding: dict[Encoding, list[float]] = {form: [] for form in chosen}
    decoding: dict[Encoding, list[float]] = {form: [] for form in chosen}
    for _ in range(repeats):
        for form in chosen:
            coding[form].append(seconds(partial(encode, encoding=form), images))
            decoding[form].append(seconds(partial(decode, channels=channels), coded[form]))
    for form in chosen:
        yield {
            "encoding": str(form),
            "mode": mode,
            "bytes": statistics.mean(map(len, coded[form])),
            "encode_per_second": 1 / statistics.median(coding[form]),
            "decode_per_second": 1 / statistics.median(decoding[form]),
        }


def passthrough(pictures: list[Image.Image], size: int, repeats: int) -> Iterator[dict[str, object]]:
    """Time `fit` where it keeps the source's own bytes."""
    form = Form(size, Geometry.DDPM_LSUN, Encoding.SOURCE, 3)
    for name, (kind, options) in SOURCES.items():
        files = []
        for picture in pictures:
            buffer = io.BytesIO()
            picture.save(buffer, kind, **options)
            files.append(buffer.getvalue())
        assert all(fit(file, form).kept for file in files)
        times = [seconds(partial(fit, form=form), files) for _ in range(10 * repeats)]
        yield {
            "source": name,
            "bytes": statistics.mean(map(len, files)),
            "microseconds": 1e6 * statistics.median(times),
        }


def seconds(work: Callable[[_In], object], items: list[_In]) -> float:
    """Processor seconds of this thread for each item."""
    began = time.thread_time()
    for item in items:
        work(item)
    return (time.thread_time() - began) / len(items)


if __name__ == "__main__":
    main()
