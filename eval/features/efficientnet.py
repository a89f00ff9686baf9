"""EfficientNet-Lite0, the embedded feature network: 1280 pooled features and 1000 ImageNet classes.

Own implementation of the published architecture: EfficientNet-B0 (Tan and Le 2019, table 1) in its "Lite"
form, that is without squeeze-and-excitation and with ReLU6 for swish, stem and head unscaled. As the
weights come from TensorFlow, padding is TensorFlow's "SAME" (the odd pixel goes to the right and bottom).
"""

import io
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

INPUT_SIZE: Final = 224
"""Side of the square input in pixels."""
FEATURES: Final = 1280
"""Number of pooled features."""
CLASSES: Final = 1000
"""Number of ImageNet classes."""

_BN_EPS: Final = 1e-3
# (blocks, kernel, stride of the first, expansion, output channels): the paper's table 1, stages 2 to 8.
_STAGES: Final = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


def _batch_norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=_BN_EPS)


class SameConv(nn.Conv2d):
    """Convolution without bias and with TensorFlow's "SAME" padding: output side = ceil(input / stride)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride=stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] to [B, C', ceil(H / stride), ceil(W / stride)]."""
        pads: list[int] = []
        for axis in (1, 0):  # F.pad counts from the last axis
            side, kernel, stride = x.shape[2 + axis], self.kernel_size[axis], self.stride[axis]
            total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
            pads += [total // 2, total - total // 2]
        if pads[0] == pads[1] and pads[2] == pads[3]:  # the convolution pads without a copy
            around = (pads[2], pads[0])
            return F.conv2d(x, self.weight, self.bias, self.stride, around, self.dilation, self.groups)
        return super().forward(F.pad(x, pads))


class InvertedResidual(nn.Module):
    """Expand (1x1), filter per channel (depthwise), project (1x1), plus the input where the shapes agree."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.expands = expansion != 1
        if self.expands:
            self.expand_conv = SameConv(inputs, hidden, 1)
            self.bn0 = _batch_norm(hidden)
        self.depthwise_conv = SameConv(hidden, hidden, kernel, stride, groups=hidden)
        self.bn1 = _batch_norm(hidden)
        self.project_conv = SameConv(hidden, outputs, 1)
        self.bn2 = _batch_norm(outputs)
        self.adds_input = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] to [B, C', H / stride, W / stride]."""
        h: Tensor = F.relu6(self.bn0(self.expand_conv(x)), inplace=True) if self.expands else x
        h = F.relu6(self.bn1(self.depthwise_conv(h)), inplace=True)
        h = self.bn2(self.project_conv(h))
        return h.add_(x) if self.adds_input else h


class EfficientNetLite0(nn.Module):
    """The network, in inference form; module names match the published weights (see `rename_keys`)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem = SameConv(3, 32, 3, stride=2)
        self.bn0 = _batch_norm(32)
        blocks: list[nn.Module] = []
        channels = 32
        for count, kernel, stride, expansion, outputs in _STAGES:
            for index in range(count):
                step = stride if index == 0 else 1
                blocks.append(InvertedResidual(channels, outputs, kernel, step, expansion))
                channels = outputs
        self.blocks = nn.ModuleList(blocks)
        self.conv_head = SameConv(channels, FEATURES, 1)
        self.bn1 = _batch_norm(FEATURES)
        self.fc = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Run the network.

        Args:
            x: [B, 3, 224, 224] float32 RGB pixels in 0..255 (normalised inside to (x - 127) / 128).

        Returns:
            Pooled features [B, 1280] and class logits [B, 1000], float32.
        """
        # One new tensor only: fresh memory for large ones costs as much as the arithmetic.
        normalised = torch.empty_like(x, memory_format=torch.channels_last)
        torch.sub(x, 127.0, out=normalised).div_(128.0)
        h = F.relu6(self.bn0(self.conv_stem(normalised)), inplace=True)
        for block in self.blocks:
            h = block(h)
        h = F.relu6(self.bn1(self.conv_head(h)), inplace=True)
        features = h.mean(dim=(2, 3))
        return features, self.fc(features)


def rename_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give the published weights our module names: `_blocks.0._bn1.weight` -> `blocks.0.bn1.weight`."""
    return {".".join(part.lstrip("_") for part in key.split(".")): value for key, value in state.items()}


def load(data: bytes) -> EfficientNetLite0:
    """Build the network for inference from the published weight file (tensors only, every key used)."""
    network = EfficientNetLite0()
    state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    network.load_state_dict(rename_keys(state), strict=True)
    network.eval()
    _fold_batch_norms(network)
    return network.to(memory_format=torch.channels_last).requires_grad_(False)


def _fold_batch_norms(network: EfficientNetLite0) -> None:
    """Multiply each batch norm's fixed scale and shift into its convolution: the same function, faster."""
    pairs = {
        "conv_stem": "bn0",
        "conv_head": "bn1",
        "expand_conv": "bn0",
        "depthwise_conv": "bn1",
        "project_conv": "bn2",
    }
    for owner in (network, *network.blocks):
        for conv, norm in pairs.items():
            if hasattr(owner, conv):
                setattr(owner, conv, fuse_conv_bn_eval(getattr(owner, conv), getattr(owner, norm)))
                setattr(owner, norm, nn.Identity())
