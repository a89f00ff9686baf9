"""PyTorch's `DataLoader` over a folder of picture files, which Pillow opens as in `ImageFolder`.

The folder lies on the local disk: no store is asked.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from benchmarks.data_stream.job import BATCH, Epoch, Job
from benchmarks.peers.distribution import LibraryPeer

TORCH_FOLDER = LibraryPeer(
    name="torch-folder",
    distribution="torch",
    source="https://docs.pytorch.org/vision/stable/generated/torchvision.datasets.ImageFolder.html",
)


class PictureFolder(Dataset[torch.Tensor]):
    """Picture files below a folder.

    Args:
        folder: Holds them, without sub-folders.
    """

    def __init__(self, folder: Path) -> None:
        self._paths = sorted(folder.iterdir())

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, number: int) -> torch.Tensor:
        with self._paths[number].open("rb") as file:
            return torch.from_numpy(np.array(Image.open(file).convert("RGB")))


def open_reader(job: Job) -> Epoch:
    """Read the files below `job.url`."""
    dataset = PictureFolder(Path(job.url))

    def batches(cache: Path) -> Iterator[Any]:
        yield from DataLoader(dataset, batch_size=BATCH, shuffle=True, num_workers=job.workers)

    return batches
