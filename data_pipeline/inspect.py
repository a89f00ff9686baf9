"""Looking into a finished data set: verification, statistics, a contact sheet, the order."""

import hashlib
import math
from typing import ClassVar

import google_crc32c
import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict

from data_pipeline.decode import DecodeError, UInt8Array, decode
from data_pipeline.documents import Document
from data_pipeline.errors import StorageFault
from data_pipeline.index import LoadedIndex, ShardEntry, load_index, load_records
from data_pipeline.order import Order
from data_pipeline.progress import Progress
from data_pipeline.reader import ShardReader
from data_pipeline.stream import read_split


class BuildReport(Document):
    """What lies at a URL after a build."""

    SCHEMA: ClassVar[str] = "data-build/1"

    url: str
    index_sha256: str
    name: str
    size: int
    channels: int
    shards: int
    samples: dict[str, int]
    rejected: int
    ignored: int
    already_built: bool


class VerifyReport(Document):
    """What `verify` found; `problems` is empty for a sound data set."""

    SCHEMA: ClassVar[str] = "data-verify/1"

    url: str
    index_sha256: str
    shards: int
    samples: int
    problems: list[str]


class SplitStats(BaseModel):
    """Numbers of one split; `mean` and `std` (0 … 255) per channel over the first `pixels_of` pictures."""

    model_config = ConfigDict(frozen=True)

    shards: int
    samples: int
    bytes: int
    pixels_of: int
    mean: list[float]
    std: list[float]


class StatsReport(Document):
    """What `stats` found."""

    SCHEMA: ClassVar[str] = "data-stats/1"

    url: str
    index_sha256: str
    name: str
    kind: str
    geometry: str
    size: int
    channels: int
    encoding: str
    rejected: int
    splits: dict[str, SplitStats]


class OrderRow(BaseModel):
    """Where one stream position lies."""

    model_config = ConfigDict(frozen=True)

    position: int
    epoch: int
    shard: str
    member: int
    key: str


class OrderReport(Document):
    """A stretch of the order."""

    SCHEMA: ClassVar[str] = "data-order/1"

    url: str
    index_sha256: str
    split: str
    seed: int
    window_shards: int
    epoch_size: int
    rows: list[OrderRow]


def summarise(url: str, *, already_built: bool, ignored: int) -> BuildReport:
    """Sum up a finished data set for the one who built it.

    Args:
        url: The data set.
        already_built: It was there before.
        ignored: Files of the source that are no pictures.

    Raises:
        UserError: No data set there.
    """
    loaded = load_index(url)
    index = loaded.index
    return BuildReport(
        url=loaded.storage.url,
        index_sha256=loaded.sha256,
        name=index.name,
        size=index.geometry.size,
        channels=index.geometry.channels,
        shards=sum(len(entries) for entries in index.splits.values()),
        samples={split: index.samples(split) for split in index.splits},
        rejected=index.rejected,
        ignored=ignored,
        already_built=already_built,
    )


def verify(loaded: LoadedIndex) -> VerifyReport:
    """Read every byte of a data set and check it: sizes, SHA-256, every CRC32C, every picture.

    One shard is in memory at a time. Nothing found is raised; it is listed with its shard and member.
    """
    problems: list[str] = []
    entries = [entry for shards in loaded.index.splits.values() for entry in shards]
    total = sum(entry.samples for entry in entries)
    done = 0
    with Progress("verify", total, "img") as progress:
        for entry in entries:
            problems.extend(f"{entry.name}: {problem}" for problem in _verify_shard(loaded, entry))
            done += entry.samples
            progress.update(done, problems=str(len(problems)))
    return VerifyReport(
        url=loaded.storage.url,
        index_sha256=loaded.sha256,
        shards=len(entries),
        samples=total,
        problems=problems,
    )


def _verify_shard(loaded: LoadedIndex, entry: ShardEntry) -> list[str]:
    try:
        records = load_records(loaded, entry.name)
        data = loaded.storage.read(entry.name)
    except FileNotFoundError:
        return ["missing"]
    except StorageFault as fault:
        return [str(fault)]
    problems = []
    if len(data) != entry.bytes:
        problems.append(f"{len(data)} bytes, the index says {entry.bytes}")
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        problems.append("SHA-256 differs from the index")
    for member, record in enumerate(records):
        problem = _verify_member(loaded, data, record)
        if problem:
            problems.append(f"member {member}: {problem}")
    return problems


def _verify_member(loaded: LoadedIndex, shard: bytes, record: np.void) -> str:
    """Return what is wrong with one member; empty if nothing is."""
    if not _crc_matches(shard, record, "meta_"):
        return "meta data has a wrong CRC32C"
    if not _crc_matches(shard, record, ""):
        return "picture has a wrong CRC32C"
    start, size = int(record["offset"]), int(record["size"])
    geometry = loaded.index.geometry
    try:
        shape = decode(shard[start : start + size], geometry.channels).shape
    except DecodeError as error:
        return str(error)
    if shape[:2] != (geometry.size, geometry.size):
        return f"{shape[1]} x {shape[0]} pixels, the index says {geometry.size} x {geometry.size}"
    return ""


def _crc_matches(shard: bytes, record: np.void, prefix: str) -> bool:
    start, size = int(record[prefix + "offset"]), int(record[prefix + "size"])
    return bool(google_crc32c.value(shard[start : start + size]) == int(record[prefix + "crc32c"]))


def stats(loaded: LoadedIndex, *, limit: int) -> StatsReport:
    """Count a data set and measure the pixels of the first `limit` pictures of each split.

    Raises:
        StorageFault: Damaged shards.
    """
    geometry = loaded.index.geometry
    return StatsReport(
        url=loaded.storage.url,
        index_sha256=loaded.sha256,
        name=loaded.index.name,
        kind=loaded.index.kind,
        geometry=geometry.name,
        size=geometry.size,
        channels=geometry.channels,
        encoding=loaded.index.encoding,
        rejected=loaded.index.rejected,
        splits={split: _split_stats(loaded, split, limit) for split in loaded.index.splits},
    )


def _split_stats(loaded: LoadedIndex, split: str, limit: int) -> SplitStats:
    channels, size = loaded.index.geometry.channels, loaded.index.geometry.size
    pictures = 0
    # Integer sums are exact: 255^2 * 2^47 pixels fit into 63 bits.
    sums, squares = np.zeros(channels, np.int64), np.zeros(channels, np.int64)
    for images in read_split(
        loaded.storage.url, split, channels=channels, image_size=size, batch=64, limit=limit
    ):
        values = images.astype(np.int64)
        sums += values.sum(axis=(0, 1, 2))
        squares += (values * values).sum(axis=(0, 1, 2))
        pictures += len(images)
    pixels = max(pictures * size * size, 1)
    mean = sums / pixels
    entries = loaded.shards(split)
    return SplitStats(
        shards=len(entries),
        samples=sum(entry.samples for entry in entries),
        bytes=sum(entry.bytes for entry in entries),
        pixels_of=pictures,
        mean=mean.tolist(),
        std=np.sqrt(np.maximum(squares / pixels - mean * mean, 0.0)).tolist(),
    )


def order_of(
    loaded: LoadedIndex, *, split: str, seed: int, window_shards: int, position: int, count: int
) -> OrderReport:
    """Tell which pictures stand at `count` stream positions from `position` on.

    Raises:
        UserError: No such split, or an empty one.
    """
    entries = loaded.shards(split)
    order = Order([entry.samples for entry in entries], seed, window_shards)
    reader = ShardReader(loaded, split)
    positions = np.arange(position, position + count, dtype=np.int64)
    shards, members = order.locate(positions)
    rows = [
        OrderRow(
            position=p, epoch=p // order.epoch_size, shard=entries[s].name, member=m, key=reader.key(s, m)
        )
        for p, s, m in zip(positions.tolist(), shards.tolist(), members.tolist(), strict=True)
    ]
    return OrderReport(
        url=loaded.storage.url,
        index_sha256=loaded.sha256,
        split=split,
        seed=seed,
        window_shards=window_shards,
        epoch_size=order.epoch_size,
        rows=rows,
    )


def contact_sheet(images: UInt8Array, *, border: int = 2) -> Image.Image:
    """Lay pictures out in a near-square grid on white.

    Args:
        images: uint8 [B, H, W, C], B >= 1.
        border: Pixels between pictures.
    """
    count, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    sheet = np.full(
        (rows * (height + border) + border, columns * (width + border) + border, channels),
        255,
        dtype=np.uint8,
    )
    for i, image in enumerate(images):
        top = border + (i // columns) * (height + border)
        left = border + (i % columns) * (width + border)
        sheet[top : top + height, left : left + width] = image
    return Image.fromarray(sheet[:, :, 0] if channels == 1 else sheet)
