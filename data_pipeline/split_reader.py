"""One pass over a split in the order of its index, for statistics and looks."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from data_pipeline.decode import DecodeError, UInt8Array, decode_into
from data_pipeline.errors import UserError
from data_pipeline.index import LoadedIndex, load_index
from data_pipeline.reader import ShardReader

Int64Array = npt.NDArray[np.int64]


def read_split(
    url: str, split: str, *, channels: int, image_size: int, batch: int, limit: int | None = None
) -> Iterator[UInt8Array]:
    """Iterate a split once, in the order of the index.

    Args:
        url: The data set.
        split: "train" or "val".
        channels: Wanted channels; must be those of the data set.
        image_size: Wanted side; must be that of the data set.
        batch: Pictures per array; the last may hold fewer.
        limit: Stop after so many pictures.

    Yields:
        uint8 [b, H, W, C].

    Raises:
        UserError: No data set, no such split, or another size or number of channels.
        StorageFault: A shard is missing or damaged.
    """
    loaded = load_index(url)
    check_shape(loaded, channels, image_size)
    reader = ShardReader(loaded, split)
    for shards, members in index_order(loaded, split, batch, limit):
        yield _decoded(reader, shards, members, (image_size, image_size, channels))


def read_rows(url: str, split: str, rows: Int64Array, *, channels: int, image_size: int) -> UInt8Array:
    """Read single pictures of a split by their numbers in the order of the index.

    Args:
        url: The data set.
        split: "train" or "val".
        rows: [n] numbers, each below the number of the split's pictures.
        channels: Wanted channels; must be those of the data set.
        image_size: Wanted side; must be that of the data set.

    Returns:
        uint8 [n, H, W, C], in the order asked for.

    Raises:
        UserError: As `read_split`.
        StorageFault: A shard is missing or damaged.
    """
    loaded = load_index(url)
    check_shape(loaded, channels, image_size)
    shards, members = _located(loaded, split, rows)
    return _decoded(ShardReader(loaded, split), shards, members, (image_size, image_size, channels))


def _decoded(
    reader: ShardReader, shards: Int64Array, members: Int64Array, shape: tuple[int, int, int]
) -> UInt8Array:
    images = np.empty((len(shards), *shape), dtype=np.uint8)
    for place, data in enumerate(reader.fetch(shards, members)):
        try:
            decode_into(np.frombuffer(data, np.uint8), images[place])
        except DecodeError as error:
            raise unfit(reader, int(shards[place]), int(members[place]), error) from error
    return images


def index_order(
    loaded: LoadedIndex, split: str, batch: int, limit: int | None = None
) -> Iterator[tuple[Int64Array, Int64Array]]:
    """Iterate (shards int64 [b], members int64 [b]) over a split in the order of the index."""
    assert batch >= 1
    available = loaded.samples(split)
    total = available if limit is None else min(limit, available)
    for first in range(0, total, batch):
        yield _located(loaded, split, np.arange(first, min(first + batch, total), dtype=np.int64))


def _located(loaded: LoadedIndex, split: str, rows: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Find shard and member of pictures by their numbers in the order of the index."""
    starts = np.cumsum([0, *(entry.samples for entry in loaded.shards(split))], dtype=np.int64)
    shards = np.searchsorted(starts, rows, side="right") - 1
    return shards, rows - starts[shards]


def check_shape(loaded: LoadedIndex, channels: int | None, image_size: int | None) -> None:
    """Compare a data set's pictures with what is wanted; None: whatever they are.

    Raises:
        UserError: They differ.
    """
    geometry = loaded.index.geometry
    size, channels = image_size or geometry.size, channels or geometry.channels
    if (geometry.size, geometry.channels) != (size, channels):
        raise UserError(
            f"{loaded.storage.url}: holds pictures of size {geometry.size} with {geometry.channels} "
            f"channel(s), asked for are size {size} with {channels}; set image.size and "
            "image.channels of the recipe to the data set's, or build it anew with --size and --channels"
        )


def unfit(reader: ShardReader, shard: int, member: int, error: DecodeError) -> UserError:
    """Return the error that says that sound bytes give no such picture as the index promises."""
    return UserError(
        f"{reader.where(shard, member)} (key {reader.key(shard, member)!r}): {error}; "
        "build the data set anew with `ddpm data build`"
    )
