"""LitData: chunks from S3 through a local cache, shuffled by chunk and inside chunks.

As its README streams ImageNet: `optimize` with Pillow's JPEG files (their own bytes are kept, torchvision
decodes them), chunks of 64 MB, `StreamingDataset(shuffle=True)` in a `StreamingDataLoader`. The cache is
empty before every epoch, for the epoch is to come from S3.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.data_stream.job import BATCH, SEED, Epoch, Job
from benchmarks.peers.distribution import LibraryPeer

LITDATA = LibraryPeer(
    name="litdata", distribution="litdata", source="https://github.com/Lightning-AI/litData#readme"
)


def write(pictures: Path, out: Path) -> None:
    """Write the picture files of a folder as chunks."""
    from litdata import optimize

    paths = [str(path) for path in sorted(pictures.iterdir())]
    optimize(fn=_sample, inputs=paths, output_dir=str(out), chunk_bytes="64MB", num_workers=1, verbose=False)


def open_reader(job: Job) -> Epoch:
    """Read the chunks below `job.url`."""
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming import downloader

    # Its obstore client knows no setting for a store without TLS.
    downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True

    def batches(cache: Path) -> Iterator[Any]:
        # One picture at a time, as it promises for JPEG: by default it decodes a window and drops most of it.
        dataset = StreamingDataset(
            job.url, cache_dir=str(cache), shuffle=True, drop_last=False, seed=SEED, batch_decode=1
        )
        for batch in StreamingDataLoader(dataset, batch_size=BATCH, num_workers=job.workers):
            yield batch["image"].permute(0, 2, 3, 1)

    return batches


def _sample(path: str) -> dict[str, Image.Image]:
    return {"image": Image.open(path)}
