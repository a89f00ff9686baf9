"""The choices of a build, and what follows from them."""

import math
from dataclasses import dataclass
from typing import Any, Final

from data_pipeline import geometry
from data_pipeline.decode import MAX_PIXELS, DecodeError, open_image
from data_pipeline.encoding import Encoding
from data_pipeline.errors import UserError
from data_pipeline.fit import Form
from data_pipeline.geometry import Geometry
from data_pipeline.index import BuildRecord, GeometryRecord, Index
from data_pipeline.sources import Source

_LARGEST_SIZE: Final = math.isqrt(MAX_PIXELS)
"""Larger squares could not be decoded again."""


@dataclass(frozen=True)
class BuildOptions:
    """The choices of a build; None leaves one to the source.

    Attributes:
        size: Side of the pictures in pixels. None: the source's own, which must be one for all.
        geometry: How they get there. None: `none` at the source's own size, else `ddpm-lsun`.
        encoding: See `Encoding`.
        channels: 1 (grey) or 3 (RGB).
        val_fraction: Share of pictures that go to the validation split, by content hash.
        shard_bytes: Largest size of a shard.
        max_rejected: Share of unreadable pictures that is tolerated; one always is.
        name: Name of the data set; None: the source's.
    """

    size: int | None = None
    geometry: Geometry | None = None
    encoding: Encoding = Encoding.PNG
    channels: int | None = None
    val_fraction: float | None = None
    shard_bytes: int = 8 << 20
    max_rejected: float = 0.001
    name: str | None = None


@dataclass(frozen=True)
class Plan:
    """Everything that decides the bytes of the shards.

    Attributes:
        name: Name of the data set.
        kind: Kind of the source.
        form: What the shards hold.
        build: Further choices.
        versions: Of the libraries that decide pixels and codes.
    """

    name: str
    kind: str
    form: Form
    build: BuildRecord
    versions: dict[str, str]

    def geometry_record(self) -> GeometryRecord:
        """What the index says of the pictures' shape."""
        return GeometryRecord(
            name=self.form.geometry.value,
            size=self.form.size,
            channels=self.form.channels,
            versions=self.versions,
        )

    def document(self) -> dict[str, Any]:
        """The plan as JSON data, but for what has a name of its own in `Unfinished`."""
        return {
            "size": self.form.size,
            "channels": self.form.channels,
            "geometry": self.form.geometry.value,
            "encoding": str(self.form.encoding),
            "val_fraction": self.build.val_fraction,
            "shard_bytes": self.build.shard_bytes,
            "versions": self.versions,
        }


def make_plan(source: Source, options: BuildOptions) -> Plan:
    """Decide every default and refuse impossible choices; looks at the first pictures if it must.

    Raises:
        UserError: An impossible choice, or no picture tells the size.
    """
    size = options.size if options.size is not None else source.default_size or source.native_size
    channels = options.channels if options.channels is not None else source.default_channels
    as_it_is = size is None or size == source.native_size
    chosen = options.geometry or (Geometry.NONE if as_it_is else Geometry.DDPM_LSUN)
    fraction = _val_fraction(source, options)
    if size is not None and not 1 <= size <= _LARGEST_SIZE:
        raise UserError(f"--size {size}: must be a number of pixels from 1 to {_LARGEST_SIZE}")
    if channels not in (1, 3):
        raise UserError(f"--channels {channels}: only 1 (grey) and 3 (RGB)")
    if options.shard_bytes < 1:
        raise UserError(f"--shard-bytes {options.shard_bytes}: not a positive number of bytes")
    if not 0.0 <= options.max_rejected <= 1.0:
        raise UserError(f"--max-rejected {options.max_rejected}: must lie between 0 and 1")
    if size is None and chosen is not Geometry.NONE:
        raise UserError(f"--geometry {chosen}: needs --size")
    form = Form(size or _first_size(source), chosen, options.encoding, channels)
    record = BuildRecord(val_fraction=fraction, shard_bytes=options.shard_bytes)
    return Plan(options.name or source.name, source.kind, form, record, geometry.library_versions())


def differences(plan: Plan, index: Index) -> list[str]:
    """Tell in what a finished data set differs from a plan (library versions apart)."""
    found = index.geometry
    wanted_and_found = {
        "kind": (plan.kind, index.kind),
        "name": (plan.name, index.name),
        "size": (plan.form.size, found.size),
        "channels": (plan.form.channels, found.channels),
        "geometry": (plan.form.geometry.value, found.name),
        "encoding": (str(plan.form.encoding), index.encoding),
        "build": (plan.build, index.build),
    }
    return [key for key, (wanted, there) in wanted_and_found.items() if wanted != there]


def _val_fraction(source: Source, options: BuildOptions) -> float | None:
    given = options.val_fraction
    if source.default_val_fraction is None:
        if given is not None:
            raise UserError(f"--val-fraction: {source.name} has its own validation split; leave it out")
        return None
    fraction = source.default_val_fraction if given is None else given
    if not 0.0 < fraction < 1.0:
        raise UserError(f"--val-fraction {fraction}: must lie between 0 and 1, e.g. 0.05")
    return fraction


def _first_size(source: Source) -> int:
    """The size of the source's first readable picture."""
    for item in source:
        try:
            image = open_image(item.data, upright=True)
        except DecodeError:
            continue  # the build itself will count and report it
        if image.width != image.height:
            raise UserError(
                f"{item.where}: {image.width} x {image.height} pixels is no square; "
                "give --size N to crop and resize all pictures"
            )
        return image.width
    raise UserError(f"{source.name}: none of its pictures can be read; are they pictures?")
