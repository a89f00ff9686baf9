"""torch-fidelity: a registered feature extractor over an in-memory data set.

Its documentation gives it a `Dataset` of uint8 pictures, a registered `FeatureExtractorBase` that resizes
inside, `batch_size`, and `save_cpu_ram`, which means no worker processes where it otherwise takes two for
each processor, at most four. Its extractor resizes as ours does, in threads; resizing in the data set
instead, so that the workers do it, is tried as well. Moments and distance are its own: `numpy.cov`, and the
eigenvalues of the product of the covariances.
"""

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from benchmarks.peers.clean_fid import Network, Resize
from benchmarks.peers.distribution import LibraryPeer

TORCH_FIDELITY = LibraryPeer(
    name="torch-fidelity",
    distribution="torch-fidelity",
    source="https://torch-fidelity.readthedocs.io/en/latest/api.html",
)
BatchResize = Callable[[NDArray[np.uint8]], Tensor]
"""Pictures [B, H, W, 3] -> [B, 3, S, S] float32 in 0..255."""
_LAYER: Final = "pooled"


class InMemory(Dataset[Tensor]):
    """Pictures in memory.

    Args:
        images: [N, H, W, 3] uint8.
        resize: Applied to each on its way out; None: it comes as it is.
    """

    def __init__(self, images: NDArray[np.uint8], resize: Resize | None = None) -> None:
        self._images, self._resize = images, resize

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, number: int) -> Tensor:
        picture = self._images[number]
        return torch.from_numpy(picture if self._resize is None else self._resize(picture)).permute(2, 0, 1)


class Fidelity:
    """Its extractor around a network, and what it does with it.

    Args:
        name: Under which the extractor is registered; each name once in a process.
        network: The network.
        in_extractor: Resizes a batch in the extractor; None: the data set does it.
        in_dataset: Resizes a picture in the data set; None: the extractor does it.
        workers: Whether it takes its worker processes.
        batch: Pictures of a batch.
    """

    def __init__(
        self,
        name: str,
        network: Network,
        *,
        in_extractor: BatchResize | None = None,
        in_dataset: Resize | None = None,
        workers: bool,
        batch: int,
    ) -> None:
        from torch_fidelity import register_feature_extractor
        from torch_fidelity.utils import create_feature_extractor

        assert (in_extractor is None) != (in_dataset is None), "one of them resizes"
        self._in_dataset = in_dataset
        register_feature_extractor(name, _extractor(network, in_extractor))
        self._options = {
            "cuda": False,
            "batch_size": batch,
            "save_cpu_ram": not workers,
            "feature_extractor": name,
            "cache": False,
            "verbose": False,
        }
        self._extractor = create_feature_extractor(name, [_LAYER], **self._options)

    def features(self, images: NDArray[np.uint8]) -> Tensor:
        """Features [N, d] float32."""
        from torch_fidelity.utils import extract_featuresdict_from_input_id

        dataset = InMemory(images, self._in_dataset)
        found = extract_featuresdict_from_input_id(1, self._extractor, input1=dataset, **self._options)
        features: Tensor = found[_LAYER]
        return features

    def whole_call(self, first: NDArray[np.uint8], second: NDArray[np.uint8]) -> float:
        """The distance of two sets of pictures as its documentation asks for it."""
        from torch_fidelity import KEY_METRIC_FID, calculate_metrics

        found = calculate_metrics(
            input1=InMemory(first, self._in_dataset),
            input2=InMemory(second, self._in_dataset),
            fid=True,
            **self._options,
        )
        return float(found[KEY_METRIC_FID])


def moments(features: Tensor) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Mean [d] and covariance [d, d]."""
    from torch_fidelity.metric_fid import fid_features_to_statistics

    found = fid_features_to_statistics(features)
    return found["mu"], found["sigma"]


def distance(
    first: tuple[NDArray[Any], NDArray[np.float64]], second: tuple[NDArray[Any], NDArray[np.float64]]
) -> float:
    """Its Fréchet distance of two sets' moments."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    both = [{"mu": mean, "sigma": covariance} for mean, covariance in (first, second)]
    return float(fid_statistics_to_metric(*both, verbose=False)[KEY_METRIC_FID])


def _extractor(network: Network, resize: BatchResize | None) -> Callable[..., Any]:
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase

    class Extractor(FeatureExtractorBase):  # type: ignore[misc, unused-ignore]
        """The network, with the resize in front of it if there is one."""

        def __init__(self, name: str, features_list: list[str], **kwargs: object) -> None:
            super().__init__(name, features_list)

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return (_LAYER,)

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return _LAYER

        @staticmethod
        def can_be_compiled() -> bool:
            return False

        def forward(self, pictures: Tensor) -> tuple[Tensor]:
            if resize is None:
                return (network(pictures),)
            return (network(resize(pictures.permute(0, 2, 3, 1).numpy())),)

    return Extractor
