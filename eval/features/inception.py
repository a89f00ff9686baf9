"""What both forms of the Inception of December 2015 have in common: sizes and published files.

The TensorFlow graph `inception-2015-12-05` defines FID (Heusel et al. 2017) and the Inception Score (Salimans
et al. 2016). It exists as a TorchScript file of StyleGAN2-ADA, which clean-fid uses, and as a state dict of
pytorch-fid, which torch-fidelity uses too; both hold the same weights.
"""

from typing import Final

from torch import Tensor

from eval.features.resize import ResizeMode, resize_name
from eval.features.weights import PublishedFile
from eval.protocol import NVIDIA_INCEPTION_SHA256, STATE_INCEPTION_SHA256, FeatureIdentity

SIDE: Final = 299
"""Side of the square input in pixels."""
POOLED: Final = 2048
"""Number of pooled features."""
CLASSES: Final = 1008
"""Number of classes: ImageNet's 1000 and eight that are not used."""
SPATIAL_CHANNELS: Final = 7
"""How many channels of the spatial features sFID keeps."""
SPATIAL: Final = SPATIAL_CHANNELS * 17 * 17
"""Number of spatial features."""

TORCHSCRIPT_FILE: Final = PublishedFile(
    title="Inception weights",
    url="https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
    size=95_607_719,
    sha256=NVIDIA_INCEPTION_SHA256,
)
STATE_FILE: Final = PublishedFile(
    title="Inception weights",
    url=(
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
        "pt_inception-2015-12-05-6726825d.pth"
    ),
    size=95_628_359,
    sha256=STATE_INCEPTION_SHA256,
)

INCEPTION: Final = FeatureIdentity(
    name="inception",
    sha256=TORCHSCRIPT_FILE.sha256,
    dim=POOLED,
    classes=CLASSES,
    resize=resize_name(ResizeMode.CLEAN, SIDE),
)
"""The TorchScript Inception in clean-fid's mode `clean`."""
STATE_INCEPTION: Final = FeatureIdentity(
    name="inception-state",
    sha256=STATE_FILE.sha256,
    dim=POOLED,
    classes=CLASSES,
    spatial=SPATIAL,
    resize=resize_name(ResizeMode.CLEAN, SIDE),
)
"""The state-dict Inception in clean-fid's mode `clean`."""


def normalise(x: Tensor) -> Tensor:
    """Map pixels in 0..255 to about -1..1 as the TensorFlow graph does: (x - 128) / 128."""
    return (x - 128) / 128


def class_probabilities(pooled: Tensor, weight: Tensor) -> Tensor:
    """p(y|x) [b, k] from pooled features [b, d] and the output layer's weight [k, d], without its bias.

    So does the original code of the Inception Score: it multiplies by the weight alone.
    """
    return (pooled @ weight.T).softmax(dim=1)
