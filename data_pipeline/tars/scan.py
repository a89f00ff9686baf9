"""One tar that is there already -> its records, its hash and the shape of its pictures."""

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final

import google_crc32c
import numpy as np

from data_pipeline.build.prepare import Rejected
from data_pipeline.decode import DecodeError, open_image, orientation, to_channels
from data_pipeline.errors import UserError
from data_pipeline.headers import extension_if_it_fits
from data_pipeline.index import RECORD
from data_pipeline.scratch import naming_full_scratch
from data_pipeline.sources.pictures import readable
from data_pipeline.storage import Storage
from data_pipeline.tars.samples import Payload, Sample, samples
from data_pipeline.tars.walk import StreamedFile, TarDamage

REMEDY: Final = "unpack them and build new shards with `ddpm data build folder … --size N`"
_GREY: Final = ("1", "L", "LA")
_ROWS: Final = 4096


@dataclass(frozen=True)
class ScannedTar:
    """What a tar was found to hold.

    Attributes:
        name: Its name.
        bytes: Its size.
        sha256: Its hash.
        samples: Samples that are used.
        side: Side of every picture in pixels; 0 if there is none.
        channels: 1 if all are grey, else 3.
        rejected: Samples that are not used.
        several: Samples with more than one picture.
        turned: Pictures that EXIF says are to be turned.
    """

    name: str
    bytes: int
    sha256: str
    samples: int
    side: int
    channels: int
    rejected: list[Rejected]
    several: int
    turned: int


@dataclass
class _Pictures:
    """The shape that all pictures of a tar have, by the first one."""

    tar: str
    side: int = 0
    channels: int = 1
    turned: int = 0
    first: str = ""

    def take(self, key: str, data: bytes) -> str:
        """Look at a picture; return why it cannot be used, or nothing.

        An ordinary file is judged by its headers; whatever is unusual is decoded.

        Raises:
            UserError: It is no square, or of another size than the first.
        """
        if self.side and extension_if_it_fits(data, self.side, self.channels) is not None:
            return ""
        if self.side and self.channels == 1 and extension_if_it_fits(data, self.side, 3) is not None:
            self.channels = 3
            return ""
        try:
            image = open_image(data)
            to_channels(image, 3)
        except DecodeError as error:
            return str(error)
        width, height = image.size
        if width != height:
            raise UserError(f"{self.tar}: {key} has {width} x {height} pixels, which is no square; {REMEDY}")
        if self.side not in (0, width):
            raise UserError(
                f"{self.tar}: pictures differ in size: {self.first} has {self.side} x {self.side} pixels, "
                f"{key} {width} x {height}; {REMEDY}"
            )
        if not self.side:
            self.side, self.first = width, key
        if image.mode not in _GREY:
            self.channels = 3
        self.turned += orientation(image) != 1
        return ""


@dataclass
class _Records:
    """The records of a tar on their way to a file."""

    file: BinaryIO
    count: int = 0
    _rows: list[tuple[int, ...]] = field(default_factory=list)

    def add(self, picture: Payload, meta: Payload | None) -> None:
        self._rows.append(
            (*_place(picture), *(_place(meta) if meta is not None and meta.data else (0, 0, 0)))
        )
        self.count += 1
        if len(self._rows) == _ROWS:
            self.flush()

    def flush(self) -> None:
        self.file.write(np.array(self._rows, dtype=RECORD).tobytes())
        self._rows.clear()


def scan_tar(source: Storage, name: str, records: Path, copy: Path | None) -> ScannedTar:
    """Read a tar once; find its samples, records and hash, and the shape of its pictures.

    Args:
        source: Where it lies.
        name: Its name.
        records: Local file that gets the records.
        copy: Local file that gets the whole tar.

    Raises:
        UserError: It is damaged, its pictures are no squares of one size, or the disk is full.
    """
    where = f"{source.url}/{name}"
    rejected: list[Rejected] = []
    several = 0
    pictures = _Pictures(where)
    with ExitStack() as stack, naming_full_scratch(records.parent):
        rows = _Records(stack.enter_context(records.open("wb")))
        copied = None if copy is None else stack.enter_context(copy.open("wb"))
        try:
            file = StreamedFile(source, name, copy=copied)
            for sample in samples(file):
                problem = _take(sample, pictures, rows)
                several += sample.more_pictures > 0
                if problem:
                    rejected.append(Rejected(f"{name}/{_shown(sample.key)}", problem))
        except FileNotFoundError as error:
            raise UserError(f"{where}: is gone; has somebody removed it?") from error
        except TarDamage as damage:
            raise UserError(f"{where}: {damage}; download or pack it again") from damage
        rows.flush()
        sha256 = file.finish()
    return ScannedTar(
        name=name,
        bytes=file.size,
        sha256=sha256,
        samples=rows.count,
        side=pictures.side,
        channels=pictures.channels,
        rejected=rejected,
        several=several,
        turned=pictures.turned,
    )


def one_shape(tars: Iterable[ScannedTar], where: str) -> tuple[int, int]:
    """Return side and channels of the pictures of all tars.

    Args:
        tars: At least one with a picture.
        where: URL of their folder.

    Raises:
        UserError: They differ in size.
    """
    filled = [tar for tar in tars if tar.samples]
    for tar in filled:
        if tar.side != filled[0].side:
            raise UserError(
                f"{where}: pictures differ in size: those of {filled[0].name} have {filled[0].side} x "
                f"{filled[0].side} pixels, those of {tar.name} {tar.side} x {tar.side}; {REMEDY}"
            )
    return filled[0].side, max(tar.channels for tar in filled)


def _take(sample: Sample, pictures: _Pictures, rows: _Records) -> str:
    if sample.picture is None:
        return sample.problem
    problem = pictures.take(_shown(sample.key), sample.picture.data)
    if not problem:
        rows.add(sample.picture, sample.meta)
    return problem


def _place(payload: Payload) -> tuple[int, int, int]:
    return payload.offset, len(payload.data), google_crc32c.value(payload.data)


def _shown(key: str) -> str:
    return readable(key.encode("utf-8", "surrogateescape"))
