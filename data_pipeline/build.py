"""`ddpm data build`: a source of pictures -> shards, records and, last of all, the index.

source -> encode (pure, one item at a time) -> shard writers -> `index.json`. Memory does not grow with
the data set. Until `index.json` exists the folder is no data set: the marker `unfinished.json` says so,
and a repeated build overwrites what the earlier one left.
"""

import hashlib
import itertools
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Final

from data_pipeline import geometry
from data_pipeline.decode import DecodeError, open_image, to_channels
from data_pipeline.documents import Document, canonical_json
from data_pipeline.encoding import Encoding, kept_extension, png
from data_pipeline.errors import UserError
from data_pipeline.geometry import Geometry, GeometryError
from data_pipeline.index import INDEX_FILE, BuildRecord, GeometryRecord, Index, load_index_from
from data_pipeline.progress import Progress
from data_pipeline.shards import ShardWriter, refuse_if_published
from data_pipeline.sources import Item, Source
from data_pipeline.storage import Storage

REJECTED_FILE: Final = "rejected.jsonl"
UNFINISHED_FILE: Final = "unfinished.json"
_SHARD_FILE: Final = re.compile(r"shard-\d{6,}\.(tar|idx)")


@dataclass(frozen=True)
class BuildOptions:
    """The choices of a build; None leaves one to the source.

    Attributes:
        size: Side of the pictures in pixels. None: the source's own, which must be one for all.
        geometry: How they get there. None: `none` at the source's own size, else `ddpm-lsun`.
        encoding: See `Encoding`.
        channels: 1 (grey) or 3 (RGB).
        val_fraction: Share of pictures that go to the validation split, by content hash.
        shard_bytes: Largest size of a shard.
        max_rejected: Share of unreadable pictures that is tolerated; one always is.
        name: Name of the data set; None: the source's.
    """

    size: int | None = None
    geometry: Geometry | None = None
    encoding: Encoding = Encoding.PNG
    channels: int | None = None
    val_fraction: float | None = None
    shard_bytes: int = 8 << 20
    max_rejected: float = 0.001
    name: str | None = None


@dataclass(frozen=True)
class _Plan:
    """The options with every default decided; `size` is None until the first picture was seen."""

    name: str
    size: int | None
    geometry: Geometry
    encoding: Encoding
    channels: int
    build: BuildRecord
    max_rejected: float


@dataclass(frozen=True)
class _Encoded:
    key: str
    extension: str
    payload: bytes
    meta: bytes | None
    is_val: bool


@dataclass(frozen=True)
class _Rejected:
    path: str
    reason: str


class _Unfinished(Document):
    """`unfinished.json`: a build of ours is under way here or was broken off."""

    SCHEMA: ClassVar[str] = "unfinished/1"

    name: str
    kind: str


class SourceHash:
    """SHA-256 over keys, contents and meta data of a source's items, in order."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, item: Item) -> None:
        """Take in the next item."""
        content = hashlib.sha256(item.data).hexdigest()
        self._hash.update(canonical_json([item.key, content, item.meta]) + b"\n")

    def hexdigest(self) -> str:
        """Return the hash of all items so far."""
        return self._hash.hexdigest()


def find_built(source: Source, out_url: str, options: BuildOptions) -> Index | None:
    """Return the index if exactly this build is finished at `out_url`; None if no data set is there.

    Raises:
        UserError: Another data set is there.
    """
    plan, storage = _plan(source, options), Storage(out_url)
    if not storage.exists(INDEX_FILE):
        return None
    index = load_index_from(storage).index
    found = index.geometry
    wanted_and_found = {
        "kind": (source.kind, index.kind),
        "name": (plan.name, index.name),
        "size": (plan.size or found.size, found.size),
        "channels": (plan.channels, found.channels),
        "geometry": (plan.geometry.value, found.name),
        "encoding": (plan.encoding.value, index.encoding),
        "build": (plan.build, index.build),
    }
    different = [key for key, (wanted, there) in wanted_and_found.items() if wanted != there]
    if not different:
        fingerprint = SourceHash()
        for item in source:
            fingerprint.add(item)
        if fingerprint.hexdigest() == index.source_sha256:
            return index
        different = ["the source's pictures"]
    raise UserError(
        f"{storage.url}: already holds the data set {index.name!r} built from something else "
        f"(different: {', '.join(different)}); choose another --out or delete that one"
    )


def build(source: Source, out_url: str, options: BuildOptions | None = None) -> Index:
    """Build a data set; if the very same one is already there, leave it and return its index.

    Args:
        source: The pictures.
        out_url: Folder or URL for the shards.
        options: The choices.

    Returns:
        The published index.

    Raises:
        UserError: Bad options, no or too many unreadable pictures, an empty split, another data set or
            foreign shards at `out_url`, or no space.
    """
    options = options or BuildOptions()
    built = find_built(source, out_url, options)
    if built is not None:
        return built
    plan, storage = _plan(source, options), Storage(out_url)
    total = source.count()
    if total == 0:
        raise UserError(f"{source.name}: no pictures in it; name a folder that holds some")
    if plan.size is None:
        plan = _with_first_size(plan, source)
    _claim(storage, source, plan)
    return _Build(source, storage, plan, total).run()


def _encode(item: Item, plan: _Plan) -> _Encoded | _Rejected:
    """Bring one item into the form the shards hold. Pure, so that items may be encoded in parallel.

    Raises:
        UserError: The picture is sound but does not fit the options.
    """
    if item.problem:
        return _Rejected(item.where, item.problem)
    assert plan.size is not None
    try:
        image = open_image(item.data, upright=plan.encoding is Encoding.PNG)
        flat = geometry.apply(plan.geometry, to_channels(image, plan.channels), plan.size)
    except DecodeError as error:
        return _Rejected(item.where, str(error))
    except GeometryError as error:
        raise UserError(
            f"{item.where}: {error}; give --size N --geometry ddpm-lsun to crop and resize all pictures"
        ) from error
    if plan.encoding is Encoding.SOURCE:
        extension, payload = kept_extension(item.data, image, item.where), item.data
    else:
        extension, payload = "png", png(flat)
    share = int.from_bytes(hashlib.sha256(item.data).digest()[:8], "big") / 2**64
    meta = canonical_json(item.meta) if item.meta else None
    return _Encoded(item.key, extension, payload, meta, share < plan.build.val_fraction)


class _Build:
    """One build under way."""

    def __init__(self, source: Source, storage: Storage, plan: _Plan, total: int) -> None:
        self._source, self._storage, self._plan, self._total = source, storage, plan, total
        self._fingerprint = SourceHash()
        self._rejected: list[_Rejected] = []

    def run(self) -> Index:
        """Write everything; the index last."""
        numbers = itertools.count()
        with tempfile.TemporaryDirectory(prefix="ddpm-build-") as scratch:
            train, val = (
                ShardWriter(self._storage, Path(scratch), self._plan.build.shard_bytes, numbers) for _ in "tv"
            )
            try:
                for sample in self._samples():
                    writer = val if sample.is_val else train
                    writer.add(sample.key, sample.extension, sample.payload, sample.meta)
                splits = {"train": train.close(), "val": val.close()}
            finally:
                train.abandon()
                val.abandon()
        self._report_rejected()
        index = Index(
            name=self._plan.name,
            kind=self._source.kind,
            source_sha256=self._fingerprint.hexdigest(),
            geometry=self._geometry_record(),
            encoding=self._plan.encoding.value,
            build=self._plan.build,
            splits=splits,
            rejected=len(self._rejected),
        )
        for split in splits:
            if index.samples(split) == 0:
                raise UserError(
                    f"{self._source.name}: of {self._total} pictures none fell to the split {split!r}; "
                    "change --val-fraction or add pictures"
                )
        self._publish(index)
        return index

    def _samples(self) -> Iterator[_Encoded]:
        """Encode all items; count and list the unreadable ones and stop when they are too many."""
        allowed = max(1, int(self._plan.max_rejected * self._total))
        with Progress("build", self._total, "img") as progress:
            for done, item in enumerate(self._source, start=1):
                self._fingerprint.add(item)
                result = _encode(item, self._plan)
                if isinstance(result, _Encoded):
                    yield result
                else:
                    self._rejected.append(result)
                    if len(self._rejected) > allowed:
                        self._report_rejected()
                        raise UserError(
                            f"{result.path}: {result.reason}; it is unreadable picture number "
                            f"{len(self._rejected)} and at most {allowed} of {self._total} may be "
                            f"(all in {self._storage.url}/{REJECTED_FILE}); mend or remove them"
                        )
                progress.update(done, rejected=str(len(self._rejected)))

    def _report_rejected(self) -> None:
        if not self._rejected:
            self._storage.delete(REJECTED_FILE)  # an earlier, broken-off build may have left one
            return
        rows = ({"schema": "rejected/1", "path": r.path, "reason": r.reason} for r in self._rejected)
        self._storage.write(REJECTED_FILE, b"".join(canonical_json(row) + b"\n" for row in rows))

    def _geometry_record(self) -> GeometryRecord:
        assert self._plan.size is not None
        return GeometryRecord(
            name=self._plan.geometry.value,
            size=self._plan.size,
            channels=self._plan.channels,
            versions=geometry.library_versions(),
        )

    def _publish(self, index: Index) -> None:
        refuse_if_published(self._storage)
        entries = [entry for shards in index.splits.values() for entry in shards]
        ours = {name for entry in entries for name in (entry.name, entry.idx_name)}
        for name in self._storage.list():
            if _SHARD_FILE.fullmatch(name) and name not in ours:
                self._storage.delete(name)  # of a broken-off build with more shards
        if not self._storage.create(INDEX_FILE, index.to_json()):
            raise UserError(f"{self._storage.url}: another build finished here first; choose another --out")
        self._storage.delete(UNFINISHED_FILE)


def _plan(source: Source, options: BuildOptions) -> _Plan:
    """Decide every default and refuse impossible choices."""
    size = options.size if options.size is not None else source.native_size
    channels = options.channels if options.channels is not None else source.default_channels
    fraction = options.val_fraction if options.val_fraction is not None else source.default_val_fraction
    as_it_is = size is None or size == source.native_size or options.encoding is Encoding.SOURCE
    chosen = options.geometry or (Geometry.NONE if as_it_is else Geometry.DDPM_LSUN)
    if size is not None and size < 1:
        raise UserError(f"--size {size}: not a positive number of pixels")
    if channels not in (1, 3):
        raise UserError(f"--channels {channels}: only 1 (grey) and 3 (RGB)")
    if not 0.0 < fraction < 1.0:
        raise UserError(f"--val-fraction {fraction}: must lie between 0 and 1, e.g. 0.05")
    if options.shard_bytes < 1:
        raise UserError(f"--shard-bytes {options.shard_bytes}: not a positive number of bytes")
    if not 0.0 <= options.max_rejected <= 1.0:
        raise UserError(f"--max-rejected {options.max_rejected}: must lie between 0 and 1")
    if size is None and chosen is not Geometry.NONE:
        raise UserError(f"--geometry {chosen}: needs --size")
    if options.encoding is Encoding.SOURCE and chosen is not Geometry.NONE:
        raise UserError(f"--encoding source: keeps the bytes, so --geometry {chosen} cannot apply; use png")
    name = options.name or source.name
    record = BuildRecord(val_fraction=fraction, shard_bytes=options.shard_bytes)
    return _Plan(name, size, chosen, options.encoding, channels, record, options.max_rejected)


def _with_first_size(plan: _Plan, source: Source) -> _Plan:
    """Take the size of the source's first readable picture."""
    for item in source:
        try:
            image = open_image(item.data, upright=plan.encoding is Encoding.PNG)
        except DecodeError:
            continue  # the build itself will count and report it
        if image.width != image.height:
            raise UserError(
                f"{item.where}: {image.width} x {image.height} pixels is no square; "
                "give --size N to crop and resize all pictures"
            )
        return replace(plan, size=image.width)
    raise UserError(f"{source.name}: none of its pictures can be read; are they pictures?")


def _claim(storage: Storage, source: Source, plan: _Plan) -> None:
    """Mark the place as ours before the first shard, and refuse one that holds foreign shards."""
    storage.prove_create_only()
    names = storage.list()
    if UNFINISHED_FILE not in names and any(_SHARD_FILE.fullmatch(name) for name in names):
        raise UserError(
            f"{storage.url}: holds shards without {INDEX_FILE} that this command did not write; "
            "choose an empty place for --out"
        )
    storage.write(UNFINISHED_FILE, _Unfinished(name=plan.name, kind=source.kind).to_json())
