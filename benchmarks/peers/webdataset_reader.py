"""WebDataset's reader, as its README trains from a bucket: shards over HTTP by way of `curl`.

`shardshuffle=100`, `shuffle(1000)`, `decode("rgb8")` (Pillow), `to_tuple`, `batched` inside the workers, then
`WebLoader(batch_size=None)`. It has no scheme `s3:`, so the shards come by presigned URLs; a plain `http:`
URL starts `curl` without the shell that `pipe:` takes. `select_files` spares it the samples' JSON, which
nobody asks for here. Shuffling once more between the workers (`unbatched().shuffle().batched()`) is left out:
it would only cost.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data_stream.job import BATCH, SIZE, Epoch, Job
from benchmarks.peers.distribution import LibraryPeer
from data_pipeline.decode import UInt8Array, decode_into

WEBDATASET = LibraryPeer(
    name="webdataset",
    distribution="webdataset",
    source="https://github.com/webdataset/webdataset#readme",
)


def open_stock(job: Job) -> Epoch:
    """Read as shipped: Pillow decodes."""
    _samples(job)  # imports it
    return lambda cache: _batches(_samples(job).decode("rgb8").to_tuple("jpg"), job.workers)


def open_with_our_decoder(job: Job) -> Epoch:
    """Read with `decode_into` in place of Pillow."""
    _samples(job)  # imports it
    return lambda cache: _batches(_samples(job).to_tuple("jpg").map_tuple(_decode), job.workers)


def skip_to(job: Job, position: int) -> int:
    """Read over `position` samples without decoding them, then one batch; return that batch's pictures.

    It has nothing else to resume with.
    """
    return len(list(itertools.islice(_samples(job), position, position + job.batch)))


def _samples(job: Job) -> Any:
    from webdataset import WebDataset

    return WebDataset(job.http, shardshuffle=100, empty_check=False, select_files=_is_picture).shuffle(1000)


def _batches(pipeline: Any, workers: int) -> Iterator[Any]:
    from webdataset import WebLoader

    for (images,) in WebLoader(pipeline.batched(BATCH), batch_size=None, num_workers=workers):
        yield images


def _is_picture(name: str) -> bool:
    return Path(name).suffix == ".jpg"


def _decode(data: bytes) -> UInt8Array:
    out = np.empty((SIZE, SIZE, 3), dtype=np.uint8)
    decode_into(np.frombuffer(data, np.uint8), out)
    return out
