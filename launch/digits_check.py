"""Has a model learned digits? A classifier trained on real ones judges its samples."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_digits
from sklearn.svm import SVC

UInt8Array = npt.NDArray[np.uint8]

SURE = 0.9
"""The classifier is sure of a digit when it gives one class more than this probability."""
LEAST_SHARE_OF_REAL = 0.7
LEAST_CLASS_SHARE = 0.03


@dataclass(frozen=True)
class DigitsVerdict:
    """What the classifier says.

    Attributes:
        accuracy: Its accuracy on real held-out digits.
        sure_real: Share of real held-out digits it is sure of.
        sure_samples: Share of the samples it is sure of.
        classes: Share of each class 0 to 9 among the samples.
    """

    accuracy: float
    sure_real: float
    sure_samples: float
    classes: tuple[float, ...]

    @property
    def is_sure_enough(self) -> bool:
        """The samples are nearly as clear as real digits."""
        return self.sure_samples >= LEAST_SHARE_OF_REAL * self.sure_real

    @property
    def has_every_class(self) -> bool:
        """No class is missing among the samples."""
        return min(self.classes) >= LEAST_CLASS_SHARE


def judge(samples: UInt8Array, train: UInt8Array, held_out: UInt8Array) -> DigitsVerdict:
    """Train a support-vector classifier on the real training digits and let it judge the rest.

    Args:
        samples: Generated pictures, uint8 [N, 8, 8, 1].
        train: The real pictures of the training split, likewise; labels come from scikit-learn's copy.
        held_out: The real pictures of the held-out split, likewise.
    """
    # A narrow kernel: far from every real digit all classes become equally likely. With the wider ones that
    # classify a little better, calibrated one class against the rest, noise would pass for a sure digit.
    classifier = CalibratedClassifierCV(SVC(gamma=0.005), ensemble=False)
    classifier.fit(_features(train), _labels(train))
    on_real = classifier.predict_proba(_features(held_out))
    on_samples = classifier.predict_proba(_features(samples))
    counts = np.bincount(on_samples.argmax(axis=1), minlength=10)
    return DigitsVerdict(
        accuracy=float((on_real.argmax(axis=1) == _labels(held_out)).mean()),
        sure_real=float((on_real.max(axis=1) > SURE).mean()),
        sure_samples=float((on_samples.max(axis=1) > SURE).mean()),
        classes=tuple((counts / len(samples)).tolist()),
    )


def _features(pictures: UInt8Array) -> npt.NDArray[np.float64]:
    """Flatten to scikit-learn's scale, 0 to 16."""
    return pictures.reshape(len(pictures), -1).astype(np.float64) * (16.0 / 255.0)


def _labels(pictures: UInt8Array) -> npt.NDArray[np.int64]:
    """Find the labels of real digits by their pixels."""
    digits = load_digits()
    pixels = np.rint(digits.images * (255.0 / 16.0)).astype(np.uint8)
    known = {image.tobytes(): int(label) for image, label in zip(pixels, digits.target, strict=True)}
    return np.array([known[picture.tobytes()] for picture in pictures], dtype=np.int64)
