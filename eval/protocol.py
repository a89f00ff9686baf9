"""What a metric's name means: everything that moves the number, hashed.

Results of different protocols never share a curve, so each lives in a folder of its own,
`RUN/eval/<spec>-<hash12>/`, with the protocol beside it.
"""

from typing import ClassVar, Final, Literal

from pydantic import BaseModel, ConfigDict

from data_pipeline.documents import Document, canonical_json, sha256_hex
from trainer.recipe_evaluation import BitsSpec, MetricName, SamplerName

NVIDIA_INCEPTION_SHA256: Final = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
"""The file that defines FID and IS: `inception-2015-12-05.pt`, 95,607,719 bytes."""
STATE_INCEPTION_SHA256: Final = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""The same weights as a state dict: `pt_inception-2015-12-05-6726825d.pth`, 95,628,359 bytes."""


class FeatureIdentity(BaseModel):
    """A feature network as far as it moves a number.

    Attributes:
        name: `effnetlite0`, `inception` (TorchScript), `inception-state`, or a name that the user gave.
        sha256: Hash of the weight file.
        dim: Number of pooled features d.
        classes: Number of classes k of its probabilities; 0 if it has none.
        resize: How pictures come to its input size.
        spatial: Number of spatial features, for sFID; None if the network gives none.
        function: Which function of a Python file makes it; None for other files.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    sha256: str
    dim: int
    classes: int
    resize: str
    spatial: int | None = None
    function: str | None = None

    @property
    def distance_name(self) -> str:
        """Name of the Fréchet distance: FID for the original Inception weights only."""
        return "FID" if self._is_original else f"FD-{self._label}"

    @property
    def score_name(self) -> str:
        """Name of the classifier score: IS for the original Inception weights only."""
        return "IS" if self._is_original else f"CS-{self._label}"

    @property
    def spatial_name(self) -> str:
        """Name of the Fréchet distance of spatial features: sFID for the original Inception weights only."""
        return "sFID" if self._is_original else f"sFD-{self._label}"

    @property
    def _is_original(self) -> bool:
        files = {"inception": NVIDIA_INCEPTION_SHA256, "inception-state": STATE_INCEPTION_SHA256}
        return files.get(self.name) == self.sha256

    @property
    def _label(self) -> str:
        return self.name if self.name == "effnetlite0" else f"{self.name}-{self.sha256[:8]}"


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


class ImportedFile(BaseModel):
    """Reference statistics that others computed: their file in the place of a data set's pictures.

    Attributes:
        kind: Who wrote it; see `eval.imported`.
        sha256: Hash of the file.
    """

    model_config = ConfigDict(frozen=True)

    kind: str
    sha256: str


BASIC_METRICS: Final = (MetricName.DISTANCE, MetricName.SCORE)
"""What every protocol had when its hash became a format; such protocols do not name their metrics."""


_OF_REFERENCE_FEATURES: Final = (MetricName.KERNEL, MetricName.MANIFOLD, MetricName.NEIGHBOURS)
_OF_FEATURES: Final = (*_OF_REFERENCE_FEATURES, MetricName.INFINITY, MetricName.INTERVAL)


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
        metrics: What is measured; None for distance and score.
        constants: Of the metrics that have any, by metric.
        bits: Whose bits per dimension, and how exactly; None without that metric.
        reference_file: Published statistics that stand for the reference pictures, if any.
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
    metrics: tuple[MetricName, ...] | None = None
    constants: dict[MetricName, dict[str, int | float]] | None = None
    bits: BitsSpec | None = None
    reference_file: ImportedFile | None = None

    def measures(self, metric: MetricName) -> bool:
        """Whether this metric belongs to the protocol."""
        return metric in (self.metrics or BASIC_METRICS)

    @property
    def stores_features(self) -> bool:
        """Whether a metric needs each sample's features, and not only their moments."""
        return any(self.measures(metric) for metric in _OF_FEATURES)

    @property
    def stores_reference(self) -> bool:
        """Whether a metric needs each reference picture's features."""
        return any(self.measures(metric) for metric in _OF_REFERENCE_FEATURES)

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
