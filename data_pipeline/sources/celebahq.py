"""CelebA-HQ in whatever form people have it: there is no official ready-made one."""

import logging
import os
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from data_pipeline.errors import UserError
from data_pipeline.sources import Item, Place, Source, npy
from data_pipeline.sources.arrays import ArraySource
from data_pipeline.sources.folder import FolderSource
from data_pipeline.sources.pictures import has_picture_name
from data_pipeline.sources.tar_archive import TarSource
from data_pipeline.sources.tfrecord import TfRecordSource, is_tfrecord
from data_pipeline.sources.unpack import kind_of
from data_pipeline.sources.zip_archive import ZipSource

_logger = logging.getLogger(__name__)

_OFFICIAL_COUNT: Final = 30_000
_ACCEPTED: Final = (
    "name a folder, zip or tar of pictures, .tfrecords or their folder, an .npy, .npz or folder of .npy"
)


class CelebaHqSource(Source):
    """CelebA-HQ, told apart by content and read by the source for that kind.

    Pictures keep the size they have: those of 1024 are made smaller only if the user names a size. It has
    no classes, and a split only where the files are divided (Glow's are). Another number of pictures than
    30,000 is logged, not refused.

    Args:
        path: A folder, zip or tar of pictures, a file or folder of TFRecords, an `.npy`, `.npz` or a folder
            of `.npy` files.
        size: Of TFRecords in several resolutions the one to take. None: 256.

    Raises:
        UserError: No such path, something else in it, or what the source for that kind refuses.
    """

    kind = "celebahq"
    name = "celebahq"

    def __init__(self, path: str | os.PathLike[str], *, size: int | None = None) -> None:
        self._path = Path(path).expanduser()
        self._inner = _inner(self._path, size)
        self._was_counted = False
        self.native_size = self._inner.native_size
        self.default_channels = self._inner.default_channels
        self.default_val_fraction = self._inner.default_val_fraction

    def places(self) -> Iterator[Place]:
        """Iterate the places as the source for that kind does."""
        count = 0
        for place in self._inner.places():
            count += 1
            yield place
        self.ignored = self._inner.ignored
        if count != _OFFICIAL_COUNT and not self._was_counted:
            _logger.warning("%s: %d pictures, not CelebA-HQ's %d", self._path, count, _OFFICIAL_COUNT)
        self._was_counted = True

    def read(self, first: int, places: Sequence[Place]) -> Iterator[Item]:
        """Give the items of the source for that kind."""
        return self._inner.read(first, places)

    def files(self) -> Sequence[Path]:
        """The files of the source for that kind."""
        return tuple(self._inner.files())

    def describe(self, place: Place) -> str:
        """A place as the source for that kind describes it."""
        return self._inner.describe(place)

    def close(self) -> None:
        """Close the source for that kind."""
        self._inner.close()


def _inner(path: Path, size: int | None) -> Source:
    """Open the source that can read what lies at the path."""
    if path.is_dir():
        return _inner_of_folder(path, size)
    if not path.is_file():
        raise UserError(f"{path}: no such file; {_ACCEPTED}")
    try:
        with path.open("rb") as file:
            head = file.read(len(npy.MAGIC))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); make it readable") from error
    if head == npy.MAGIC:
        return ArraySource(path)
    match kind_of(path):
        case "zip":
            return ArraySource(path) if _holds_arrays(path) else ZipSource(path)
        case "tar":
            return TarSource(path)
    if is_tfrecord(path):
        return TfRecordSource(path, size=size)
    raise UserError(f"{path}: nothing that CelebA-HQ comes in; {_ACCEPTED}")


def _inner_of_folder(path: Path, size: int | None) -> Source:
    """Open the source for what most files of a folder are; TFRecords, being few and large, go first."""
    kinds = Counter[str]()
    for _, folders, names in os.walk(path, followlinks=False):
        folders[:] = [name for name in folders if not name.startswith(".")]
        kinds.update(_kind_by_name(name) for name in names if not name.startswith("."))
    if kinds["tfrecord"]:
        return TfRecordSource(path, size=size)
    if kinds["npy"] > kinds["picture"]:
        return ArraySource(path)
    if kinds["picture"]:
        return FolderSource(path)
    raise UserError(f"{path}: nothing that CelebA-HQ comes in; {_ACCEPTED}")


def _kind_by_name(name: str) -> str:
    if ".tfrecord" in name:
        return "tfrecord"
    if name.endswith(".npy"):
        return "npy"
    return "picture" if has_picture_name(name) else "other"


def _holds_arrays(path: Path) -> bool:
    """Tell an .npz from a zip of pictures."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return False  # the source for pictures will say what is wrong with it
    return any(name.endswith(".npy") for name in names) and not any(map(has_picture_name, names))
