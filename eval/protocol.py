"""What a metric's name means: everything that moves the number, hashed.

Results of different protocols never share a curve, so each lives in a folder of its own,
`RUN/eval/<spec>-<hash12>/`, with the protocol beside it.
"""

from typing import ClassVar, Final, Literal

from pydantic import BaseModel, ConfigDict

from data_pipeline.documents import Document, canonical_json, sha256_hex
from trainer.recipe_sections import SamplerName

NVIDIA_INCEPTION_SHA256: Final = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
"""The file that defines FID and IS: `inception-2015-12-05.pt`, 95,607,719 bytes."""


class FeatureIdentity(BaseModel):
    """A feature network as far as it moves a number.

    Attributes:
        name: `effnetlite0` or `inception`.
        sha256: Hash of the weight file.
        dim: Number of pooled features d.
        classes: Number of classes k of its probabilities.
        resize: How pictures come to its input size.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    sha256: str
    dim: int
    classes: int
    resize: str

    @property
    def distance_name(self) -> str:
        """Name of the Fréchet distance: FID for the original Inception weights only."""
        return "FID" if self._is_original else f"FD-{self._label}"

    @property
    def score_name(self) -> str:
        """Name of the classifier score: IS for the original Inception weights only."""
        return "IS" if self._is_original else f"CS-{self._label}"

    @property
    def _is_original(self) -> bool:
        return self.name == "inception" and self.sha256 == NVIDIA_INCEPTION_SHA256

    @property
    def _label(self) -> str:
        return f"{self.name}-{self.sha256[:8]}" if self.name == "inception" else self.name


class ImageShape(BaseModel):
    """Side in pixels and number of channels of the pictures."""

    model_config = ConfigDict(frozen=True)

    size: int
    channels: int


class PictureSet(BaseModel):
    """One split of a shard index, by the hash of its `index.json`."""

    model_config = ConfigDict(frozen=True)

    index_sha256: str
    split: str


class Protocol(Document):
    """Everything that moves a metric's value, checkpoint and training recipe apart.

    Attributes:
        spec: Name of the specification in the recipe's `evaluation` section.
        features: The feature network.
        reference: The real pictures compared against.
        held_out: The real pictures of the comparison row.
        samples: N, number of generated pictures, ids 0..N-1.
        sampler: Name of the sampler.
        steps: Network evaluations per picture, on evenly spaced timesteps.
        eta: Stochasticity of DDIM.
        ema: Weights: an EMA profile of the recipe, or `raw`.
        ema_profile: That profile's own numbers; empty for `raw`.
        seed: Seed of the generated pictures' noise (common over all checkpoints).
        image: Shape of the pictures.
        chunk: Pictures per sampling call, aligned to multiples of itself.
        feature_batch: Pictures per feature call.
        splits: Parts of the classifier score.
        precision: Arithmetic of the sampling network.
        quantisation: How network output becomes uint8.
        version: Counts changes of this code that move numbers at equal settings.
    """

    SCHEMA: ClassVar[str] = "protocol/1"

    spec: str
    features: FeatureIdentity
    reference: PictureSet
    held_out: PictureSet
    samples: int
    sampler: SamplerName
    steps: int
    eta: float
    ema: str
    ema_profile: dict[str, float | int | None]
    seed: int
    image: ImageShape
    chunk: int
    feature_batch: int
    splits: int
    precision: Literal["float32"] = "float32"
    quantisation: Literal["clip-truncate"] = "clip-truncate"
    version: int = 1

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of a picture."""
        return self.image.size, self.image.size, self.image.channels

    @property
    def sha256(self) -> str:
        """SHA-256 of the canonical JSON of all fields that are not None.

        So a field may be added later, None by default, without another name for old protocols.
        """
        content = self.model_dump(mode="json", exclude_none=True)
        return sha256_hex(canonical_json({"schema": self.SCHEMA, **content}))

    @property
    def directory(self) -> str:
        """Folder of its results under `RUN/eval/`: `<spec>-<first 12 hex digits of the hash>`."""
        return f"{self.spec}-{self.sha256[:12]}"
