"""The kinds of collections by name, and how each is opened; every kind's libraries are imported with it."""

from enum import StrEnum
from pathlib import Path

from data_pipeline.errors import UserError
from data_pipeline.sources import Source


class Kind(StrEnum):
    """What `ddpm data build` takes."""

    LSUN = "lsun"
    """An LMDB as LSUN distributes it: folder, data.mdb, or the zip that holds it."""
    CELEBAHQ = "celebahq"
    """CelebA-HQ in any form in which it is passed on: pictures in a folder, zip or tar, TFRecords, arrays."""
    CIFAR10 = "cifar10"
    """The python or binary version, or a tree of class folders; its own test split."""
    FOLDER = "folder"
    """One's own pictures, sub-folders included."""
    ZIP = "zip"
    """Pictures in a zip, those of EDM and StyleGAN with their labels."""
    TAR = "tar"
    """Pictures in a tar, compressed or not."""
    NPZ = "npz"
    """Arrays of pictures: .npz, .npy, or a folder of .npy files."""
    WEBDATASET = "webdataset"
    """WebDataset tars that are there already: they are only indexed."""
    DIGITS = "digits"
    """1797 handwritten digits, embedded."""


def open_source(kind: Kind, path: Path | None, *, labels: bool = False, size: int | None = None) -> Source:
    """Open a collection of pictures.

    Args:
        kind: Of any kind but `webdataset`, whose tars are not read picture by picture.
        path: Where it lies; None for `digits`.
        labels: Take labels from folders (or the collection's own list).
        size: Wanted side in pixels, for a collection that holds several.

    Raises:
        UserError: Not such a collection.
    """
    assert kind is not Kind.WEBDATASET
    if kind is Kind.DIGITS:
        if path is not None:
            raise UserError(f"{path}: digits are embedded and take no SOURCE; leave it out")
        from data_pipeline.sources.digits import DigitsSource

        return DigitsSource()
    if path is None:
        raise UserError(f"ddpm data build {kind}: name the SOURCE after `{kind}`")
    if labels and kind in (Kind.LSUN, Kind.CELEBAHQ):
        raise UserError(f"--labels: {kind} has no labels; leave it out")
    match kind:
        case Kind.LSUN:
            from data_pipeline.sources.lsun import LsunSource

            return LsunSource(path)
        case Kind.CELEBAHQ:
            from data_pipeline.sources.celebahq import CelebaHqSource

            return CelebaHqSource(path, size=size)
        case Kind.CIFAR10:
            from data_pipeline.sources.cifar10 import Cifar10Source

            return Cifar10Source(path)
        case Kind.FOLDER:
            from data_pipeline.sources.folder import FolderSource

            return FolderSource(path, labels=labels)
        case Kind.ZIP:
            from data_pipeline.sources.zip_archive import ZipSource

            return ZipSource(path, labels=labels)
        case Kind.TAR:
            from data_pipeline.sources.tar_archive import TarSource

            return TarSource(path, labels=labels)
        case Kind.NPZ:
            from data_pipeline.sources.arrays import ArraySource

            return ArraySource(path, labels=labels)
