"""Any other feature network, by file and hash: a TorchScript file, or a function in a Python file.

The network gets float32 [b, 3, side, side], pixels in 0..255 or, where `mean` and `std` are given, (x / 255 -
mean) / std; clean-fid's resizer made the size. It returns [b, dim] features, or the pair of [b, dim] features
and [b, classes] probabilities (rows that add up to one).
"""

import io
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.errors import UserError
from eval.features.network import Features
from eval.features.resize import resize_clean
from eval.features.weights import read_weights
from eval.protocol import FeatureIdentity

Network = Callable[[Tensor], Tensor | tuple[Tensor, Tensor]]
"""Pictures in, features or features and probabilities out."""


@dataclass(frozen=True)
class InputConvention:
    """What such a network wants to be shown.

    Attributes:
        side: Side of its square input in pixels.
        mean: Subtracted from each of the three channels in 0..1; None for pixels in 0..255 as they are.
        std: The divisors after that; None together with `mean`.
    """

    side: int = 224
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


class ExternalFeatures:
    """Features of a network that the user brought.

    Args:
        network: The network, on the device.
        identity: Says how many features and classes it must give.
        convention: What it wants to be shown.
        device: Where it runs.
    """

    def __init__(
        self, network: Network, identity: FeatureIdentity, convention: InputConvention, device: torch.device
    ) -> None:
        self._network, self._identity = network, identity
        self._side, self._device = convention.side, device
        self._scale: tuple[Tensor, Tensor] | None = None
        if convention.mean is not None and convention.std is not None:
            mean, std = (
                torch.tensor(x, device=device)[:, None, None] for x in (convention.mean, convention.std)
            )
            self._scale = mean, std

    @property
    def identity(self) -> FeatureIdentity:
        """Name, file's hash, sizes and resize."""
        return self._identity

    def __call__(self, images: NDArray[np.uint8]) -> Features:
        """Compute features of [b, H, W, C] uint8 pictures.

        Raises:
            UserError: The network returns other sizes than declared.
        """
        x = resize_clean(images, self._side).to(self._device).contiguous()
        if self._scale is not None:
            mean, std = self._scale
            x = (x / 255 - mean) / std
        name = self._identity.name
        try:
            with torch.inference_mode():
                found = self._network(x)
            pooled, probabilities = found if isinstance(found, tuple) else (found, None)
            classes = 0 if probabilities is None else probabilities.shape[-1]
            finite = bool(pooled.isfinite().all())
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise UserError(
                f"features: {name} fails on pictures {list(x.shape)} ({_one_line(error)}); it must return "
                "[b, dim] features, or these and [b, classes] probabilities: mend the network or #…&side="
            ) from error
        if not finite:
            raise UserError(f"features: {name} gives features that are not finite; mend the network")
        wanted = (len(images), self._identity.dim)
        if tuple(pooled.shape) != wanted or classes != self._identity.classes:
            raise UserError(
                f"features: {self._identity.name} gives features {list(pooled.shape)} and {classes} classes, "
                f"declared are {list(wanted)} and {self._identity.classes}; mend #…&dim= and &classes="
            )
        return Features(pooled.float().cpu(), None if probabilities is None else probabilities.float().cpu())


def load_torchscript(location: str, sha256: str, device: torch.device) -> Network:
    """Load a TorchScript file.

    Raises:
        UserError: File missing, wrong hash, or no TorchScript.
    """
    data = read_weights(location, sha256)
    try:
        module: Any = torch.jit.load(io.BytesIO(data), map_location=device)  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"{location}: no TorchScript ({reason}); make one with torch.jit.script") from error
    network: Network = module.eval()
    return network


def load_python(location: str, function: str, sha256: str, device: torch.device) -> Network:
    """Run a Python file whose hash was checked and call its function, which returns the network.

    The hash is that of the file alone: weights that it reads are for the file to check.

    Args:
        location: Path or fsspec URL of the file.
        function: Name of a function of the file that takes a `torch.device` and returns the network.
        sha256: The hash the file must have.
        device: Where the network shall run.

    Raises:
        UserError: File missing, wrong hash, no Python, or without that function.
    """
    source = read_weights(location, sha256)
    module = types.ModuleType("feature_network")
    try:
        code = compile(source, location, "exec")
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{location}: no Python ({error})") from error
    try:
        exec(code, module.__dict__)
        make = module.__dict__.get(function)
        network: Network | None = make(device) if callable(make) else None
    except (ImportError, OSError, RuntimeError, TypeError, ValueError, AttributeError, NameError) as error:
        raise UserError(f"{location}: makes no network ({_one_line(error)}); mend the file") from error
    if network is None:
        raise UserError(f"{location}: has no function {function}; write python=FILE.py:FUNCTION")
    return network


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
