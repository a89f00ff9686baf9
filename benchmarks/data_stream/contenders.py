"""Everyone who reads, by name: ours, the decoder alone, and the peers."""

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.data_stream.job import BATCH, SEED, SIZE, Epoch, Job
from benchmarks.peers import litdata_streaming, mosaic_streaming, torch_loader, webdataset_reader
from benchmarks.peers.distribution import LibraryPeer
from data_pipeline import ImageStream
from data_pipeline.decode import UInt8Array, decode_into
from data_pipeline.index import LoadedIndex, load_index
from data_pipeline.order import Order
from data_pipeline.reader import ShardReader
from data_pipeline.storage import Storage

OURS: Final = "ours"
DECODE_ONLY: Final = "decode-only"
STOCK: Final = "webdataset"
WITH_OUR_DECODER: Final = "webdataset-our-decoder"
MOSAIC: Final = mosaic_streaming.MOSAIC.name
LITDATA: Final = litdata_streaming.LITDATA.name
FOLDER: Final = torch_loader.TORCH_FOLDER.name
THREADS: Final = 2
"""That decode: ours and decode-only."""


@dataclass(frozen=True)
class Contender:
    """Somebody who reads.

    Attributes:
        open: Gets everything ready that is no part of an epoch.
        peer: Whose code it is; None: ours.
        write: Writes a folder of pictures in the format that is read; None: it reads what is there.
    """

    open: Callable[[Job], Epoch]
    peer: LibraryPeer | None = None
    write: Callable[[Path, Path], None] | None = None


def stream(job: Job, position: int = 0) -> ImageStream:
    """Open our stream as the job wants it."""
    storage = Storage(job.url, backend=job.backend, request_timeout=job.request_timeout)
    return ImageStream(
        storage,
        seed=SEED,
        global_batch=job.batch,
        position=position,
        threads=THREADS,
        prefetch_bytes=job.prefetch_bytes,
        window_shards=job.window_shards,
    )


def _open_ours(job: Job) -> Epoch:
    def batches(cache: Path) -> Iterator[Any]:
        with stream(job) as opened:
            # The last batch reaches into the next epoch: the others read up to 63 pictures less.
            for batch in itertools.islice(opened, job.batches):
                yield batch.images

    return batches


def _open_decode_only(job: Job) -> Epoch:
    """Hold the split's bytes in the stream's order; each of two threads decodes every other batch."""
    loaded = load_index(job.url)
    order = Order([entry.samples for entry in loaded.shards("train")], SEED, job.window_shards)
    held = _bytes_in_order(loaded, order)
    buffers = [np.empty((BATCH, SIZE, SIZE, 3), dtype=np.uint8) for _ in range(THREADS)]

    def decode_batch(start: int) -> UInt8Array:
        buffer = buffers[start // BATCH % THREADS]
        part = held[start : start + BATCH]
        for place, data in enumerate(part):
            decode_into(data, buffer[place])
        return buffer[: len(part)]

    def batches(cache: Path) -> Iterator[Any]:
        starts = range(0, len(held), BATCH)
        with ThreadPoolExecutor(THREADS) as pool:
            ahead = [pool.submit(decode_batch, start) for start in starts[:THREADS]]
            for start in starts[THREADS:]:
                yield ahead.pop(0).result()  # its buffer is free once the consumer comes back for more
                ahead.append(pool.submit(decode_batch, start))
            for last in ahead:
                yield last.result()

    return batches


def _bytes_in_order(loaded: LoadedIndex, order: Order) -> list[UInt8Array]:
    """Return the first epoch's pictures' bytes as the stream delivers them, each in memory of its own."""
    shards, members = order.locate(np.arange(order.epoch_size, dtype=np.int64))
    held = [np.empty(0, dtype=np.uint8)] * order.epoch_size
    reader = ShardReader(loaded, "train")
    for shard in np.unique(shards).tolist():
        places = np.flatnonzero(shards == shard)
        for place, data in zip(places.tolist(), reader.fetch(shards[places], members[places]), strict=True):
            held[place] = np.frombuffer(data, np.uint8)
    return held


CONTENDERS: Final[dict[str, Contender]] = {
    OURS: Contender(_open_ours),
    DECODE_ONLY: Contender(_open_decode_only),
    STOCK: Contender(webdataset_reader.open_stock, webdataset_reader.WEBDATASET),
    WITH_OUR_DECODER: Contender(webdataset_reader.open_with_our_decoder, webdataset_reader.WEBDATASET),
    MOSAIC: Contender(mosaic_streaming.open_reader, mosaic_streaming.MOSAIC, mosaic_streaming.write),
    LITDATA: Contender(litdata_streaming.open_reader, litdata_streaming.LITDATA, litdata_streaming.write),
    FOLDER: Contender(torch_loader.open_reader, torch_loader.TORCH_FOLDER),
}
"""By name."""
