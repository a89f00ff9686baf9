"""Looking into a finished data set: a summary, statistics, a contact sheet, the order."""

import math
from collections import Counter
from collections.abc import Iterator
from typing import ClassVar

import google_crc32c
import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict

from data_pipeline.decode import UInt8Array
from data_pipeline.documents import Document
from data_pipeline.errors import StorageFault
from data_pipeline.index import TRIES, LoadedIndex, Records, load_index, load_records
from data_pipeline.order import Order
from data_pipeline.reader import ShardReader, coalesce, label_of
from data_pipeline.split_reader import read_split


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
    duplicates: int = 0
    kept: int = 0


class SplitStats(BaseModel):
    """Numbers of one split.

    Attributes:
        shards: How many.
        samples: Pictures.
        bytes: Of all its tars.
        pixels_of: Pictures that were looked at: the first ones, as many as asked for.
        mean: By channel, of their pixels (0 … 255).
        std: Deviation, by channel.
        picture_bytes: Mean size of their files.
        labelled: Those among them with a class number in their meta data.
        labels: How many of each class, by name, or by number where the class has no name.
    """

    model_config = ConfigDict(frozen=True)

    shards: int
    samples: int
    bytes: int
    pixels_of: int
    mean: list[float]
    std: list[float]
    picture_bytes: float
    labelled: int
    labels: dict[str, int]


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
    duplicates: int
    kept: int
    classes: list[str]
    splits: dict[str, SplitStats]


class OrderRow(BaseModel):
    """Where one stream position lies; `key` is None if it was not asked for."""

    model_config = ConfigDict(frozen=True)

    position: int
    epoch: int
    shard: str
    member: int
    key: str | None


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
        duplicates=index.duplicates,
        kept=index.kept,
    )


def stats(loaded: LoadedIndex, *, limit: int) -> StatsReport:
    """Count a data set and look at the first `limit` pictures of each split: their pixels, sizes, labels.

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
        duplicates=loaded.index.duplicates,
        kept=loaded.index.kept,
        classes=loaded.index.classes,
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
    picture_bytes, labels = 0, Counter[int]()
    for shard, records in _first_records(loaded, split, limit):
        picture_bytes += int(records["size"].sum(dtype=np.int64))
        labels.update(_labels(loaded, shard, records))
    classes = dict(enumerate(loaded.index.classes))
    return SplitStats(
        shards=len(entries),
        samples=sum(entry.samples for entry in entries),
        bytes=sum(entry.bytes for entry in entries),
        pixels_of=pictures,
        mean=mean.tolist(),
        std=np.sqrt(np.maximum(squares / pixels - mean * mean, 0.0)).tolist(),
        picture_bytes=picture_bytes / max(pictures, 1),
        labelled=labels.total(),
        labels={classes.get(label, str(label)): count for label, count in sorted(labels.items())},
    )


def _first_records(loaded: LoadedIndex, split: str, limit: int) -> Iterator[tuple[str, Records]]:
    """Iterate shards and their records, up to `limit` records in all."""
    for entry in loaded.shards(split):
        if limit <= 0:
            return
        records = load_records(loaded, entry)[:limit]
        limit -= len(records)
        yield entry.name, records


def _labels(loaded: LoadedIndex, shard: str, records: Records) -> Iterator[int]:
    """Iterate the class numbers that the meta data of some members tell."""
    records = records[records["meta_size"] > 0]
    starts = records["meta_offset"].astype(np.int64)
    stops = starts + records["meta_size"].astype(np.int64)
    for group in coalesce(starts, stops):
        for data in _read_metas(loaded, shard, records[group]):
            label = label_of(data)
            if label is not None:
                yield label


def _read_metas(loaded: LoadedIndex, shard: str, records: Records) -> list[bytes]:
    """Read neighbouring meta data by one request, checked."""
    first = int(records["meta_offset"].min())
    places = [(int(record["meta_offset"]) - first, int(record["meta_size"])) for record in records]
    stop = max(start + size for start, size in places)
    for _ in range(TRIES):
        try:
            data = loaded.storage.read_range(shard, first, first + stop)
        except FileNotFoundError:
            break
        metas = [data[start : start + size] for start, size in places]
        if [google_crc32c.value(meta) for meta in metas] == records["meta_crc32c"].tolist():
            return metas
    raise StorageFault(f"{loaded.storage.url}/{shard}: missing or damaged; see `ddpm data verify`")


def order_of(
    loaded: LoadedIndex,
    *,
    split: str,
    seed: int,
    window_shards: int,
    start: int,
    count: int,
    with_keys: bool = False,
) -> OrderReport:
    """Tell which pictures stand at `count` stream positions from `start` on; the index alone tells it.

    Args:
        loaded: The data set.
        split: "train" or "val".
        seed: Of the order.
        window_shards: See `Order`.
        start: First stream position.
        count: How many.
        with_keys: Name the pictures too, which stands in the shards.

    Raises:
        UserError: No such split, or an empty one.
        StorageFault: Keys are wanted, and a shard is missing or damaged.
    """
    entries = loaded.shards(split)
    order = Order([entry.samples for entry in entries], seed, window_shards)
    reader = ShardReader(loaded, split) if with_keys else None
    positions = np.arange(start, start + count, dtype=np.int64)
    shards, members = order.locate(positions)
    rows = [
        OrderRow(
            position=position,
            epoch=position // order.epoch_size,
            shard=entries[shard].name,
            member=member,
            key=None if reader is None else reader.key(shard, member),
        )
        for position, shard, member in zip(positions.tolist(), shards.tolist(), members.tolist(), strict=True)
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
