"""Batches on the device that trains, copied there while it works on the batch before."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data_pipeline.stream import Batch, ImageStream


class DeviceBatch(NamedTuple):
    """A `stream.Batch` on a device.

    Attributes:
        positions: int64 [b].
        images: uint8 [b, H, W, C].
        labels: int64 [b], or empty.
    """

    positions: Tensor
    images: Tensor
    labels: Tensor


class DeviceStream:
    """An `ImageStream` whose batches come as tensors on a device, one of them on its way ahead of time.

    On CUDA the copies run on a stream of their own, out of page-locked memory, and the consumer's stream
    waits for them: the host never does. On the CPU tensors share the batch's memory.

    Args:
        stream: Where the batches come from.
        device: Where they go.
    """

    def __init__(self, stream: ImageStream, device: torch.device) -> None:
        self._stream, self._device = stream, device
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._ahead: tuple[DeviceBatch, Batch, int] | None = None
        self._position = stream.position

    @property
    def position(self) -> int:
        """First position of the next global batch to be delivered."""
        return self._position

    def state_dict(self) -> dict[str, Any]:
        """As `ImageStream.state_dict`, of what this iterator has delivered."""
        return self._stream.state_dict() | {"position": self._position}

    def __iter__(self) -> Iterator[DeviceBatch]:
        while True:
            if self._ahead is None:
                self._ahead = self._copy()
            if self._ahead is None:
                return
            batch, host, self._position = self._ahead
            if self._side is not None:
                current = torch.cuda.current_stream(self._device)
                current.wait_stream(self._side)
                for tensor in batch:
                    tensor.record_stream(current)
                # Only now may what was copied from be given back: its copy is over when the next one starts.
                self._ahead = self._copy()
                del host
            else:
                self._ahead = None
            yield batch

    def _copy(self) -> tuple[DeviceBatch, Batch, int] | None:
        host = next(self._stream, None)
        if host is None:
            return None
        tensors = [torch.from_numpy(array) for array in (host.positions, host.images, host.labels)]
        if self._side is not None:
            with torch.cuda.stream(self._side):
                tensors = [tensor.to(self._device, non_blocking=True) for tensor in tensors]
        return DeviceBatch(*tensors), host, self._stream.position
