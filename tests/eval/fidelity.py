"""torch-fidelity on pictures in memory, with one small feature extractor whose output is known exactly."""

from functools import cache
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from torch_fidelity import FeatureExtractorBase, calculate_metrics, register_feature_extractor

DIM = 24
CLASSES = 10


@cache
def _weights() -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(11)
    projection = torch.from_numpy(rng.normal(size=(DIM, 3 * 8 * 8)) / 8)
    return projection, torch.from_numpy(rng.normal(size=(CLASSES, DIM)))


def features_of(pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and logits of uint8 [b, 3, 8, 8]: float64 numbers that float32 holds without rounding."""
    projection, head = _weights()
    x = pictures.double().flatten(1) / 255 - 0.5
    pooled = (x @ projection.T).relu().float().double()
    return pooled, (pooled @ head.T).float().double()


class ProjectionFeatures(FeatureExtractorBase):
    """A fixed random projection behind torch-fidelity's interface."""

    def __init__(self, name: str, features_list: list[str], **_: Any) -> None:
        super().__init__(name, features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ("pooled", "logits")

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "pooled"

    def forward(self, input: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = dict(zip(("pooled", "logits"), features_of(input), strict=True))
        return tuple(found[name] for name in self.features_list)


register_feature_extractor("projection-of-tests", ProjectionFeatures)


class Pictures(Dataset[torch.Tensor]):
    """uint8 [n, 3, 8, 8] in memory, smooth enough that sets of two seeds and tints differ."""

    def __init__(self, count: int, seed: int, tint: float) -> None:
        rng = np.random.default_rng(seed)
        coarse = rng.normal(128 + tint, 50, size=(count, 3, 4, 4)).repeat(2, axis=2).repeat(2, axis=3)
        noisy = coarse + rng.normal(0, 20, size=(count, 3, 8, 8))
        self.images = torch.from_numpy(noisy.clip(0, 255).astype(np.uint8))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.images[index]

    @property
    def pooled(self) -> np.ndarray:
        """[n, DIM] float32: our own features of the same pictures."""
        return features_of(self.images)[0].float().numpy()

    @property
    def probabilities(self) -> torch.Tensor:
        """[n, CLASSES] float64."""
        return features_of(self.images)[1].softmax(dim=1)


def fidelity(samples: Pictures, reference: Pictures, **settings: Any) -> dict[str, float]:
    """torch-fidelity's own path, from uint8 pictures to metrics."""
    found: dict[str, float] = calculate_metrics(
        input1=samples,
        input2=reference,
        feature_extractor="projection-of-tests",
        cuda=False,
        cache=False,
        verbose=False,
        samples_shuffle=False,
        save_cpu_ram=True,  # no worker processes
        **settings,
    )
    return found
