"""Statistics of real pictures by content key: what was computed once is not computed again.

A key names all that moves the statistics: the data set's hash and split, the feature network, the resize,
the grouping of pictures. `CACHE/<split>-<hash16>/` holds `<digest>-moments.safetensors`, where each picture's
features are kept `<digest>-features.f32`, and `facts.json`, published last: without it the folder counts as
absent. Two processes that compute the same write files of other names, and the first one's facts stand.
"""

import os
import tempfile
from pathlib import Path
from typing import ClassVar, Final

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from data_pipeline.documents import Document, canonical_json, sha256_hex
from data_pipeline.errors import UserError
from data_pipeline.storage import Storage
from eval.metrics.classifier_score import Score
from eval.moments_file import dump_moments, load_moments
from eval.protocol import FeatureIdentity, ImageShape, PictureSet
from eval.spill import FeatureSpill, Float32Array
from eval.statistics import Statistics

PLACE_VARIABLE: Final = "DDPM_REFERENCES"
"""Environment variable: folder or URL of the cache."""
_FACTS: Final = "facts.json"
_READ_BYTES: Final = 2**24


class ReferenceKey(BaseModel):
    """All that moves the statistics of real pictures.

    Attributes:
        features: The feature network.
        pictures: Data set and split.
        image: Shape of the pictures.
        count: How many, the first of the index.
        splits: Parts of the classifier score.
        chunk: Pictures that are added at once.
        feature_batch: Pictures per feature call.
        spatial: Whether there are moments of spatial features.
        store: Whether each picture's features are kept.
        version: Counts changes of this code that move numbers at equal settings.
    """

    model_config = ConfigDict(frozen=True)

    features: FeatureIdentity
    pictures: PictureSet
    image: ImageShape
    count: int
    splits: int
    chunk: int
    feature_batch: int
    spatial: bool
    store: bool
    version: int = 1

    @property
    def directory(self) -> str:
        """Folder of these statistics within the cache."""
        digest = sha256_hex(canonical_json(self.model_dump(mode="json", exclude_none=True)))
        return f"{self.pictures.split}-{digest[:16]}"


class CachedReference(Document):
    """`facts.json`: what lies beside it.

    Attributes:
        key: What the statistics are of.
        score: Mean and standard deviation of the classifier score; None without one.
        constant: How many pictures have one colour.
        moments_sha256: Hash of the moments' file.
        features_bytes: Size of the features' file, 0 without one.
    """

    SCHEMA: ClassVar[str] = "reference-cache/1"

    key: ReferenceKey
    score: tuple[float, float] | None
    constant: int
    moments_sha256: str
    features_bytes: int

    @property
    def moments_file(self) -> str:
        """Name of the moments' file."""
        return f"{self.moments_sha256[:12]}-moments.safetensors"

    @property
    def features_file(self) -> str:
        """Name of the features' file: [N, d] float32, little-endian, row by row."""
        return f"{self.moments_sha256[:12]}-features.f32"


class ReferenceCache:
    """Statistics of real pictures that were taken before.

    Args:
        url: Folder or URL; None for the one of DDPM_REFERENCES, or ddpm-foundry/references in the user's
            cache folder.
    """

    def __init__(self, url: str | None = None) -> None:
        self._storage = Storage(url or os.environ.get(PLACE_VARIABLE) or str(_user_folder()))

    @property
    def url(self) -> str:
        """Where it lies."""
        return self._storage.url

    def find(self, key: ReferenceKey) -> ReferenceKey | None:
        """Return the key of stored statistics that hold what is wanted, or more of the same pictures."""
        for spatial in (False, True):
            for store in (False, True):
                wider = key.model_copy(update={"spatial": spatial, "store": store})
                enough = spatial >= key.spatial and store >= key.store
                if enough and self._storage.exists(f"{wider.directory}/{_FACTS}"):
                    return wider
        return None

    def load(self, key: ReferenceKey, *, features: bool) -> Statistics:
        """Read statistics.

        Args:
            key: What is wanted; the cache must hold it.
            features: Whether each picture's features are wanted here, if the key has them.

        Raises:
            UserError: The files are damaged.
            StorageFault: Storage kept failing.
        """
        place = self._storage.child(key.directory)
        facts = CachedReference.from_json(place.read(_FACTS), f"{place.url}/{_FACTS}")
        where = f"{place.url}/{facts.moments_file}"
        data = place.read(facts.moments_file) if place.exists(facts.moments_file) else b""
        if sha256_hex(data) != facts.moments_sha256:
            raise UserError(f"{where}: damaged; delete its folder, it will be computed again")
        moments, spatial = load_moments(data, where)
        stored = None
        if key.store and features:
            stored = _read_features(place, facts)
        return Statistics(
            moments=moments,
            score=Score(*facts.score, key.splits) if facts.score else None,
            spatial=spatial,
            features=stored,
            first=np.empty((0, key.image.size, key.image.size, key.image.channels), dtype=np.uint8),
            not_finite=0,
            constant=facts.constant,
        )

    def store(self, key: ReferenceKey, statistics: Statistics) -> None:
        """Publish statistics; what another process published earlier stands. Main process only."""
        place = self._storage.child(key.directory)
        origin = {
            "index": key.pictures.index_sha256,
            "split": key.pictures.split,
            "features": key.features.sha256,
        }
        data = dump_moments(statistics.moments, statistics.spatial, origin)
        score, features = statistics.score, statistics.features
        assert (features is not None) == key.store, "the main process has the features of such a key"
        facts = CachedReference(
            key=key,
            score=(score.mean, score.sd) if score else None,
            constant=statistics.constant,
            moments_sha256=sha256_hex(data),
            features_bytes=0 if features is None else features.nbytes,
        )
        if features is not None:
            with tempfile.NamedTemporaryFile(prefix="ddpm-features-") as file:
                features.tofile(file)
                file.flush()
                place.upload(facts.features_file, Path(file.name))
        place.create(facts.moments_file, data)
        place.create(_FACTS, facts.to_json())


def _read_features(place: Storage, facts: CachedReference) -> Float32Array:
    """Read features block by block into a temporary file of our own."""
    file, size, dim = facts.features_file, facts.features_bytes, facts.key.features.dim
    if not place.exists(file) or place.size(file) != size or size != 4 * dim * facts.key.count:
        raise UserError(f"{place.url}/{file}: damaged; delete its folder, it will be computed again")
    spill, step = FeatureSpill(dim), max(1, _READ_BYTES // (4 * dim)) * 4 * dim
    for start in range(0, size, step):
        data = place.read_range(file, start, min(start + step, size))
        rows = np.frombuffer(data, dtype=np.float32).reshape(-1, dim)
        spill.add(torch.from_numpy(rows.copy()))
    return spill.array()


def _user_folder() -> Path:
    home = Path("~").expanduser() if "HOME" in os.environ else Path(tempfile.gettempdir())
    caches = os.environ.get("XDG_CACHE_HOME") or home / ".cache"
    return Path(caches) / "ddpm-foundry" / "references"
