"""How pictures come to a network's input size: clean-fid's three modes (Parmar et al. 2022, section 3).

| mode | resize | network |
|---|---|---|
| `clean` | PIL bicubic with antialiasing, per channel in float32, clipped to 0..255, not rounded | any |
| `legacy_tensorflow` | TensorFlow 1's bilinear without antialiasing, as in the first FIDs | Inception |
| `legacy_pytorch` | `torch.nn.functional.interpolate`, bilinear without antialiasing | state-dict Inception |

`legacy_tensorflow` is the protocol of the DDPM paper's CIFAR-10 numbers. The TorchScript Inception resizes
inside itself in that mode; for the state-dict Inception the same function is here.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from enum import StrEnum

import numpy as np
import torch
from cleanfid.resize import make_resizer
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F


class ResizeMode(StrEnum):
    """clean-fid's names of its modes."""

    CLEAN = "clean"
    LEGACY_TENSORFLOW = "legacy_tensorflow"
    LEGACY_PYTORCH = "legacy_pytorch"


def resize_name(mode: ResizeMode, side: int) -> str:
    """What a protocol says of the resize; the text for `clean` is older than the other modes."""
    return f"clean-fid/{'PIL-bicubic-float32' if mode is ResizeMode.CLEAN else mode}/{side}"


def to_float(images: NDArray[np.uint8]) -> Tensor:
    """Turn [b, H, W, C] uint8 (C 1 or 3) into [b, 3, H, W] float32 in 0..255, channels last in memory."""
    return torch.from_numpy(_rgb(images).astype(np.float32)).permute(0, 3, 1, 2)


def resize_clean(images: NDArray[np.uint8], side: int) -> Tensor:
    """Resize [b, H, W, C] uint8 with clean-fid's own function.

    It runs in as many threads as torch may use, for PIL lets go of the interpreter's lock.

    Returns:
        [b, 3, side, side] float32 in 0..255 on the CPU, channels last in memory; every bit that of clean-fid.
    """
    resize: Callable[[NDArray[np.uint8]], NDArray[np.float32]] = make_resizer(
        "PIL", False, "bicubic", (side, side)
    )
    rgb = _rgb(images)
    resized = np.empty((len(rgb), side, side, 3), dtype=np.float32)

    def work(row: int) -> None:
        resized[row] = resize(rgb[row])

    threads = min(torch.get_num_threads(), len(rgb))
    if threads > 1:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, range(len(rgb))))
    else:
        for row in range(len(rgb)):
            work(row)
    return torch.from_numpy(resized).permute(0, 3, 1, 2)


def resize_legacy_pytorch(images: NDArray[np.uint8], side: int) -> Tensor:
    """Resize [b, H, W, C] uint8 to [b, 3, side, side] float32 in 0..255 as clean-fid's `legacy_pytorch`."""
    x = to_float(images).contiguous()
    return F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False).clamp_(0, 255)


def resize_legacy_tensorflow(images: NDArray[np.uint8], side: int) -> Tensor:
    """Resize [b, H, W, C] uint8 as `tf.image.resize_bilinear` of TensorFlow 1 does by default.

    Output pixel i takes its value at i * length / side of the input, without an offset of half a pixel,
    between the two pixels around it; the last pixel stands for all beyond. Every bit is that of
    torch-fidelity's function.

    Returns:
        [b, 3, side, side] float32 in 0..255 on the CPU.
    """
    x = to_float(images).contiguous()
    low, high, part = _taps(x.shape[3], side)
    across = x[..., low] + (x[..., high] - x[..., low]) * part
    low, high, part = _taps(x.shape[2], side)
    return across[:, :, low] + (across[:, :, high] - across[:, :, low]) * part[:, None]


def _taps(length: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each of `side` output pixels: its two neighbours in the input, and how far it is past the first."""
    position = torch.arange(side, dtype=torch.float32) * torch.tensor(length / side, dtype=torch.float32)
    low = position.long()
    return low, (low + 1).clamp(max=length - 1), position - low


def _rgb(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.repeat(images, 3, axis=3) if images.shape[3] == 1 else images
