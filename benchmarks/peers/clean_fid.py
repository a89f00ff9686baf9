"""clean-fid: features by its folder and generator modes, moments and distance by its own functions.

Its README gives it a custom network (`custom_feat_extractor`), a custom resize, a number of worker processes
that resize, and a batch size; a folder of picture files or a generator is what it measures. All of these are
tried, on the processor, without `DataParallel` (which is for GPUs). Moments and distance are the lines of its
`fid_folder`: `numpy.mean`, `numpy.cov`, and `scipy.linalg.sqrtm` of the product of the covariances.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.peers.distribution import LibraryPeer

CLEAN_FID = LibraryPeer(
    name="clean-fid",
    distribution="clean-fid",
    source="https://github.com/GaParmar/clean-fid",
)

Network = Callable[[Tensor], Tensor]
"""Resized pictures [B, 3, S, S] float32 in 0..255 -> features [B, d]."""
Resize = Callable[[NDArray[Any]], NDArray[np.float32]]
"""A picture [H, W, 3] -> [S, S, 3] float32 in 0..255."""
_CPU = torch.device("cpu")


def folder_features(
    folder: Path, network: Network, resize: Resize, *, workers: int, batch: int
) -> NDArray[np.float32]:
    """Features [N, d] of the picture files in a folder, in the order of their names."""
    from cleanfid import fid

    features: NDArray[np.float32] = fid.get_folder_features(
        str(folder),
        network,
        num_workers=workers,
        batch_size=batch,
        device=_CPU,
        custom_fn_resize=resize,
        verbose=False,
    )
    return features


def generator_features(
    images: NDArray[np.uint8], network: Network, resize: Resize, *, batch: int
) -> NDArray[np.float32]:
    """Features [N, d] of [N, H, W, 3] pictures that a generator hands out batch by batch."""
    from cleanfid import fid

    features: NDArray[np.float32] = fid.get_model_features(
        _generator(images, batch),
        network,
        z_dim=1,
        num_gen=len(images),
        batch_size=batch,
        device=_CPU,
        custom_fn_resize=resize,
        verbose=False,
    )
    return features


def moments(features: NDArray[np.float32]) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Mean [d] and covariance [d, d] as `fid_folder` takes them."""
    return np.mean(features, axis=0), np.cov(features, rowvar=False)


def distance(
    first: tuple[NDArray[Any], NDArray[np.float64]], second: tuple[NDArray[Any], NDArray[np.float64]]
) -> float:
    """Its Fréchet distance of two sets' moments: `scipy.linalg.sqrtm`, as in pytorch-fid."""
    from cleanfid import fid

    return float(fid.frechet_distance(*first, *second))


def whole_call(
    first: Path, second: Path, network: Network, resize: Resize, *, workers: int, batch: int
) -> float:
    """The distance of two folders as its documentation asks for it."""
    from cleanfid import fid

    return float(
        fid.compute_fid(
            str(first),
            str(second),
            mode="clean",
            num_workers=workers,
            batch_size=batch,
            device=_CPU,
            custom_feat_extractor=network,
            custom_fn_resize=resize,
            verbose=False,
            use_dataparallel=False,
        )
    )


def _generator(images: NDArray[np.uint8], batch: int) -> Callable[[Tensor], Tensor]:
    """Hand out the pictures in order, whatever the noise; a generator must fill every batch."""
    channels_first = torch.from_numpy(images).permute(0, 3, 1, 2)
    starts = iter(range(0, len(images), batch))

    def generate(noise: Tensor) -> Tensor:
        start = next(starts)
        part = channels_first[start : start + batch]
        return part if len(part) == len(noise) else part[torch.arange(len(noise)) % len(part)]

    return generate
