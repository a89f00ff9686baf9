"""The TorchScript Inception: `inception-2015-12-05.pt`, or another file of the same interface."""

import io
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.errors import UserError
from eval.features.inception import CLASSES, POOLED, SIDE, TORCHSCRIPT_FILE, class_probabilities, normalise
from eval.features.network import Features
from eval.features.resize import ResizeMode, resize_clean, to_float
from eval.features.weights import read_weights
from eval.protocol import FeatureIdentity


class ScriptedInception:
    """The TorchScript Inception in clean-fid's modes `clean` and `legacy_tensorflow`.

    In the first, features are `layers((x - 128) / 128)` of pictures resized to 299 outside; in the second,
    those of `forward(x, return_features=True)`, which resizes pictures of any size itself. Probabilities are
    those of `forward(x, no_output_bias=True)`, the convention of the original Inception Score. They come from
    the same pass through the network wherever the output layer's weight is found and reproduces that call,
    else from a second pass.

    Args:
        location: Path or fsspec URL of the file.
        identity: Carries the SHA-256 the file must have.
        mode: One of the two modes.
        device: Where to run.

    Raises:
        UserError: File missing, wrong hash, or not of that interface.
    """

    def __init__(
        self, location: str, identity: FeatureIdentity, mode: ResizeMode, device: torch.device
    ) -> None:
        assert mode is not ResizeMode.LEGACY_PYTORCH
        data = read_weights(location, identity.sha256, TORCHSCRIPT_FILE)
        self._identity, self._mode, self._device = identity, mode, device
        try:
            module: Any = torch.jit.load(io.BytesIO(data), map_location=device)  # type: ignore[no-untyped-call]
            self._network = module.eval().to(memory_format=torch.channels_last)
            self._layers = module.layers
            self._weight = self._output_weight()
        except (RuntimeError, AttributeError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise UserError(f"{location}: no TorchScript Inception with `layers` ({reason})") from error

    @property
    def identity(self) -> FeatureIdentity:
        """Name, weights' hash, sizes and resize."""
        return self._identity

    def __call__(self, images: NDArray[np.uint8]) -> Features:
        """Compute features of [b, H, W, C] uint8 pictures."""
        x = resize_clean(images, SIDE) if self._mode is ResizeMode.CLEAN else to_float(images)
        x = x.to(self._device)
        with torch.inference_mode():
            pooled = self._pooled(x)
            if self._weight is not None:
                probabilities = class_probabilities(pooled, self._weight)
            else:
                probabilities = self._network(x, no_output_bias=True)
        sizes = (pooled.shape[1], probabilities.shape[1])
        if sizes != (self._identity.dim, self._identity.classes):
            raise UserError(
                f"inception weights give {sizes[0]} features and {sizes[1]} classes, expected "
                f"{self._identity.dim} and {self._identity.classes}; use the file of {TORCHSCRIPT_FILE.url}"
            )
        return Features(pooled.float().cpu(), probabilities.float().cpu())

    def _pooled(self, x: Tensor) -> Tensor:
        """[b, d] features of pictures in 0..255, already resized in the mode `clean`."""
        found: Tensor
        if self._mode is ResizeMode.CLEAN:
            found = self._layers(normalise(x))
        else:
            found = self._network(x, return_features=True)
        return found.reshape(len(x), -1)

    def _output_weight(self) -> Tensor | None:
        """The output layer's weight [k, d], known by its shape and proved on one picture, if there is one."""
        tensors = [*self._network.parameters(), *self._network.buffers()]
        fitting = [tensor for tensor in tensors if tensor.shape == (CLASSES, POOLED)]
        if len(fitting) != 1:
            return None
        ramp = torch.linspace(0, 255, SIDE, device=self._device)
        picture = torch.stack(
            [ramp.expand(SIDE, SIDE), ramp[:, None].expand(SIDE, SIDE), ramp.flip(0).expand(SIDE, SIDE)]
        )
        with torch.inference_mode():
            weight = fitting[0].detach().float()
            expected = self._network(picture[None], no_output_bias=True)
            found = class_probabilities(self._pooled(picture[None]), weight)
        return weight if torch.allclose(found, expected, rtol=1e-3, atol=1e-6) else None
