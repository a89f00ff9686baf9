"""The state-dict Inception: pytorch-fid's `pt_inception-2015-12-05-6726825d.pth` and files of its keys."""

import io
import pickle
from typing import Any

import numpy as np
import safetensors.torch
import torch
from cleanfid.inception_pytorch import FIDInceptionA, FIDInceptionC, FIDInceptionE_1, FIDInceptionE_2
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.inception import BasicConv2d, inception_v3

from data_pipeline.errors import UserError
from eval.features.inception import (
    CLASSES,
    SIDE,
    SPATIAL_CHANNELS,
    STATE_FILE,
    class_probabilities,
    normalise,
)
from eval.features.network import Features
from eval.features.resize import ResizeMode, resize_clean, resize_legacy_pytorch, resize_legacy_tensorflow
from eval.features.weights import read_weights
from eval.protocol import FeatureIdentity

_RESIZE = {
    ResizeMode.CLEAN: resize_clean,
    ResizeMode.LEGACY_PYTORCH: resize_legacy_pytorch,
    ResizeMode.LEGACY_TENSORFLOW: resize_legacy_tensorflow,
}


class StateInception:
    """The state-dict Inception: pooled features, probabilities without the output bias, and sFID's features.

    `legacy_pytorch` scales pixels by 2 (x / 255) - 1 as clean-fid and pytorch-fid do; the other modes by
    (x - 128) / 128 as the TensorFlow graph, the TorchScript file and torch-fidelity do.

    Spatial features are those of ADM's evaluator (Dhariwal and Nichol 2021; the idea: Nash et al. 2021): the
    first 7 channels of the tensor `mixed_6/conv` of the TensorFlow graph, 17 x 17 places of each. The graph
    counts its blocks mixed, mixed_1, ..., mixed_10, so this is the 1x1 branch of the block that PyTorch calls
    `Mixed_6d`, after batch norm and ReLU; not of `Mixed_6a`, the first block of that size. The order is the
    graph's (row, column, channel), so that published means of these features fit. ADM resizes as
    `legacy_tensorflow` does; with another mode the number is comparable only with itself.

    Args:
        location: Path or fsspec URL of a file of `torch.save` (only tensors are unpickled) or safetensors.
        identity: Carries the SHA-256 the file must have.
        mode: How pictures come to 299 x 299.
        device: Where to run.

    Raises:
        UserError: File missing, wrong hash, or not the state dict of that Inception.
    """

    def __init__(
        self, location: str, identity: FeatureIdentity, mode: ResizeMode, device: torch.device
    ) -> None:
        self._identity, self._mode, self._device = identity, mode, device
        network = _load(location, read_weights(location, identity.sha256, STATE_FILE))
        self._weight: Tensor = network.fc.weight.to(device)
        network.fc = nn.Identity()  # so that the network's output is what the output layer would get
        self._network: nn.Module = network.to(device=device, memory_format=torch.channels_last)
        self._spatial: list[Tensor] = []
        network.Mixed_6d.branch1x1.register_forward_hook(lambda _module, _x, y: self._spatial.append(y))

    @property
    def identity(self) -> FeatureIdentity:
        """Name, weights' hash, sizes and resize."""
        return self._identity

    def __call__(self, images: NDArray[np.uint8]) -> Features:
        """Compute features of [b, H, W, C] uint8 pictures."""
        x = _RESIZE[self._mode](images, SIDE).to(self._device)
        x = 2 * (x / 255) - 1 if self._mode is ResizeMode.LEGACY_PYTORCH else normalise(x)
        with torch.inference_mode():
            pooled = self._network(x.contiguous(memory_format=torch.channels_last))
            probabilities = class_probabilities(pooled, self._weight)
            spatial = self._spatial.pop()[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return Features(pooled.cpu(), probabilities.cpu(), spatial.cpu())


def build() -> Any:
    """Make torchvision's InceptionV3 with clean-fid's blocks, which are those of the TensorFlow graph.

    clean-fid's own builder does the same and then downloads the weights, so it cannot be called here.

    Returns:
        The network in inference form, its weights unset (on the device `meta`).
    """
    with torch.device("meta"):
        network: Any = inception_v3(weights=None, num_classes=CLASSES, aux_logits=False, init_weights=False)
        for name, inputs, pool in (("5b", 192, 32), ("5c", 256, 64), ("5d", 288, 64)):
            setattr(network, f"Mixed_{name}", FIDInceptionA(inputs, pool_features=pool))
        for name, channels in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
            setattr(network, f"Mixed_{name}", FIDInceptionC(768, channels_7x7=channels))
        network.Mixed_7b = FIDInceptionE_1(1280)
        network.Mixed_7c = FIDInceptionE_2(2048)
    return network.eval().requires_grad_(False)


def _load(location: str, data: bytes) -> Any:
    """Build the network with the file's weights, every batch norm multiplied into its convolution."""
    network = build()
    try:
        if data[8:9] == b"{":  # safetensors: eight bytes of length, then JSON
            state = safetensors.torch.load(data)
        else:
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        network.load_state_dict({key: value.float() for key, value in state.items()}, assign=True)
    except (pickle.UnpicklingError, EOFError, SafetensorError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"{location}: no state dict of the Inception with 1008 classes ({reason}); "
            f"use the file of {STATE_FILE.url}"
        ) from error
    for module in network.modules():
        if isinstance(module, BasicConv2d):
            module.conv = fuse_conv_bn_eval(module.conv, module.bn)
            module.bn = nn.Identity()
    return network.requires_grad_(False)
