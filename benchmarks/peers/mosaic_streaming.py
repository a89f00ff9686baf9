"""MosaicML Streaming: MDS shards from S3 through a local cache, shuffled by its default algorithm `py1e`.

As its documentation does it: pictures written with the column type `jpeg` (the files' own bytes; Pillow opens
them), `StreamingDataset(remote, local, shuffle, batch_size)` in a `DataLoader`. The cache is empty before
every epoch, for the epoch is to come from S3. It wants other versions of libraries than we do, so it stands
in a folder of its own (see `--mosaic`) and runs in a process of its own.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from benchmarks.data_stream.job import BATCH, SEED, Epoch, Job
from benchmarks.peers.distribution import LibraryPeer

MOSAIC = LibraryPeer(
    name="mosaicml-streaming",
    distribution="mosaicml-streaming",
    source="https://docs.mosaicml.com/projects/streaming/en/latest/getting_started/main_concepts.html",
)


def write(pictures: Path, out: Path) -> None:
    """Write the picture files of a folder as MDS shards of the default size."""
    from streaming import MDSWriter

    with MDSWriter(out=str(out), columns={"image": "jpeg"}) as writer:
        for path in sorted(pictures.iterdir()):
            with Image.open(path) as picture:
                writer.write({"image": picture})


def open_reader(job: Job) -> Epoch:
    """Read the MDS shards below `job.url`."""
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    def batches(cache: Path) -> Iterator[Any]:
        clean_stale_shared_memory()
        dataset = StreamingDataset(
            remote=job.url, local=str(cache), shuffle=True, shuffle_seed=SEED, batch_size=BATCH
        )
        yield from DataLoader(dataset, batch_size=BATCH, num_workers=job.workers, collate_fn=_collate)

    return batches


def _collate(samples: list[dict[str, Image.Image]]) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(sample["image"]) for sample in samples]))
