"""`ddpm data index`, `ddpm data build webdataset`: WebDataset tars that are there already -> a data set.

Not a byte of the tars is changed; each gets its records (`.idx`) beside it, and the folder its `index.json`,
last. Where the two places differ the tars are copied first. So the pictures stay as they are coded, and since
nothing crops or resizes while training they must all be squares of one size. What belongs together in a tar
is told in `tar_samples`.

Before anything is written beside the tars all of them are read, once; what a killed adoption has copied is
recognised by its hash, and the rest is done again with the same outcome.
"""

import hashlib
import logging
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from data_pipeline.build import REJECTED_FILE
from data_pipeline.build.journal import UNFINISHED_FILE
from data_pipeline.documents import canonical_json, sha256_hex
from data_pipeline.encoding import Encoding
from data_pipeline.errors import UserError
from data_pipeline.geometry import Geometry
from data_pipeline.index import INDEX_FILE, TAR_NAME, GeometryRecord, Index, ShardEntry, load_index
from data_pipeline.progress import Progress
from data_pipeline.scratch import ScratchFolder
from data_pipeline.sources.kinds import Kind
from data_pipeline.storage import Storage
from data_pipeline.tars.scan import REMEDY, ScannedTar, one_shape, scan_tar
from data_pipeline.tars.walk import StreamedFile
from data_pipeline.team import Pending, Team

log = logging.getLogger(__name__)

_TAR: Final = ".tar"
_COMPRESSED: Final = re.compile(r".*\.(tar\.(gz|bz2|xz|zst|lz4|lzma|Z)|tgz|tbz2?|txz|tzst)")
_VAL_WORDS: Final = frozenset({"val", "valid", "validation", "test"})


@dataclass(frozen=True)
class AdoptOptions:
    """The choices of an adoption.

    Attributes:
        val_fraction: Least share of samples in the validation split, where no tar's name says that it is one.
        max_rejected: Share of samples without a usable picture that is tolerated; one always is.
        name: Name of the data set; None: that of the tars' folder.
    """

    val_fraction: float = 0.05
    max_rejected: float = 0.001
    name: str | None = None

    def __post_init__(self) -> None:
        if not 0.0 < self.val_fraction < 1.0:
            raise UserError(f"--val-fraction {self.val_fraction}: must lie between 0 and 1, e.g. 0.05")
        if not 0.0 <= self.max_rejected <= 1.0:
            raise UserError(f"--max-rejected {self.max_rejected}: must lie between 0 and 1")


@dataclass(frozen=True)
class _Worker:
    """What each process holds."""

    source: Storage
    out: Storage
    copies: bool
    scratch: Path


@dataclass(frozen=True)
class _MakeWorker:
    source_url: str
    out_url: str
    copies: bool
    scratch: Path

    def __call__(self) -> _Worker:
        return _Worker(Storage(self.source_url), Storage(self.out_url), self.copies, self.scratch)


@dataclass(frozen=True)
class _Scan:
    """Read a tar, and copy it if it is to be copied; check the records that lie there already, if any do."""

    name: str
    has_records: bool

    def __call__(self, worker: _Worker) -> ScannedTar:
        scanned = self._scan(worker)
        if self.has_records:  # early, not after all others were read
            _put_records(worker, self.name)
        return scanned

    def _scan(self, worker: _Worker) -> ScannedTar:
        records = _records_path(worker.scratch, self.name)
        if not worker.copies:
            return scan_tar(worker.source, self.name, records, None)
        there = _size(worker.out, self.name)
        if there is not None:
            scanned = scan_tar(worker.source, self.name, records, None)
            same = there == scanned.bytes
            if not same or StreamedFile(worker.out, self.name).finish() != scanned.sha256:
                raise UserError(
                    f"{worker.out.url}/{self.name}: is not the tar of that name in {worker.source.url}; "
                    "remove it or choose another --out"
                )
            return scanned
        # Always by a file of our own: what was read, and hashed, is what is uploaded.
        copy = worker.scratch / self.name
        scanned = scan_tar(worker.source, self.name, records, copy)
        worker.out.upload(self.name, copy)
        copy.unlink()
        return scanned


@dataclass(frozen=True)
class _PutRecords:
    name: str

    def __call__(self, worker: _Worker) -> None:
        _put_records(worker, self.name)


def _put_records(worker: _Worker, name: str) -> None:
    """Put the records of a tar beside it, or find them there."""
    if not worker.out.create(_idx_name(name), _records_path(worker.scratch, name).read_bytes()):
        raise UserError(
            f"{worker.out.url}/{_idx_name(name)}: is there already and is something else (DALI's index files "
            "are called so too); remove it, or copy the tars elsewhere with `ddpm data build webdataset`"
        )


def adopt(source_url: str, out_url: str, options: AdoptOptions, *, workers: int = 1) -> Index:
    """Make a data set of WebDataset tars; a finished one is left as it is.

    Args:
        source_url: Folder or URL with the tars, all directly in it.
        out_url: Where the data set is to be; the same: the tars stay where they are.
        options: The choices.
        workers: Processes, each at a tar of its own; with more than 1 a script that calls this needs the
            guard `if __name__ == "__main__"`.

    Returns:
        The published index. Its `source_sha256` is the SHA-256 over the tars' own SHA-256 (32 bytes each), in
        the order of their names. Equal pictures are not looked for, `duplicates` is 0.

    Raises:
        UserError: No tars, damaged ones, pictures that are no squares of one size, too many samples without a
            picture, no way to divide them, or something else at `out_url`.
        StorageFault: The storage kept failing, or a process died: the same call goes on from there.
    """
    source, out = Storage(source_url), Storage(out_url)
    names = _tar_names(source)
    name = options.name or source.url.rsplit("/", 1)[-1]
    built = load_index(out).index if out.exists(INDEX_FILE) else None
    recorded: set[str] = set()
    if built is not None:
        _refuse_other(out, built, {"kind": built.kind == Kind.WEBDATASET, "name": built.name == name})
    else:
        found = set(out.list())
        recorded.update(each for each in names if _idx_name(each) in found)
        _refuse_occupied(source, out, names, found)
    copies = built is None and source.url != out.url
    with (
        ScratchFolder("adopt", out.url) as scratch,
        Team(_MakeWorker(source.url, out.url, copies, scratch.path), workers) as team,
    ):
        scans = [team.start(_Scan(each, each in recorded)) for each in names]
        tars = _scanned(scans, source.url)
        index = _index(tars, name, options, source.url, scratch.path)
        if built is not None:
            same = {key: getattr(built, key) == getattr(index, key) for key in Index.model_fields}
            _refuse_other(out, built, same)
            return built
        _report_rejected(out, tars, options.max_rejected)
        for pending in [team.start(_PutRecords(each)) for each in names]:
            pending.result()
    if not out.create(INDEX_FILE, index.to_json()):
        raise UserError(f"{out.url}: another data set was finished here first; choose another --out")
    return index


def _tar_names(source: Storage) -> list[str]:
    """The tars of a folder, in the order of their names."""
    if source.url.endswith(_TAR):
        raise UserError(f"{source.url}: is a single tar; name the folder that holds the tars")
    files = source.list()
    names = sorted(name for name in files if name.endswith(_TAR) and not name.startswith("."))
    compressed = [name for name in files if _COMPRESSED.fullmatch(name)]
    if not names:
        what = f"only compressed ones ({compressed[0]} …), unpack them" if compressed else "name their folder"
        raise UserError(f"{source.url}: no WebDataset tars (*.tar) directly in it; {what}")
    for name in names:
        if not TAR_NAME.fullmatch(name):
            raise UserError(
                f"{source.url}/{name}: cannot be a shard's name; rename it, with A-Z a-z 0-9 _.-+=@, only"
            )
    if compressed:
        log.warning(
            "%s: %d compressed tars are left out, such as %s", source.url, len(compressed), compressed[0]
        )
    if UNFINISHED_FILE in files:
        raise UserError(f"{source.url}: holds an unfinished build; finish it by `ddpm data build` first")
    return names


def _refuse_occupied(source: Storage, out: Storage, names: Sequence[str], found: set[str]) -> None:
    """Raise unless the output, in which so much was found, is free for these tars."""
    foreign = sorted(
        name for name in found.difference(names) if name.endswith(_TAR) and not name.startswith(".")
    )
    if UNFINISHED_FILE in found:
        raise UserError(f"{out.url}: holds an unfinished build; choose another --out")
    if foreign:
        raise UserError(f"{out.url}: holds {foreign[0]}, which is not in {source.url}; choose another --out")
    if REJECTED_FILE in found and b'"schema":"rejected/1"' not in out.read(REJECTED_FILE).partition(b"\n")[0]:
        raise UserError(
            f"{out.url}/{REJECTED_FILE}: is something else than this command writes; move it away"
        )
    out.prove_create_only()


def _refuse_other(out: Storage, built: Index, same: dict[str, bool]) -> None:
    """Raise unless the data set that is there is the one wanted."""
    different = [key for key, is_same in same.items() if not is_same]
    if different:
        raise UserError(
            f"{out.url}: already holds the data set {built.name!r}, which is another (different: "
            f"{', '.join(different)}); choose another --out, or remove {INDEX_FILE} and the .idx files"
        )


def _scanned(scans: Sequence[Pending[ScannedTar]], where: str) -> list[ScannedTar]:
    """Wait for all tars to be read; stop at the first that does not fit."""
    tars: list[ScannedTar] = []
    first: ScannedTar | None = None
    began, pictures, read = time.monotonic(), 0, 0
    with Progress("adopt", len(scans), "tar") as progress:
        for scan in scans:
            tar = scan.result()
            tars.append(tar)
            if tar.samples:
                first = first or tar
                one_shape((first, tar), where)
            pictures, read = pictures + tar.samples, read + tar.bytes
            seconds = max(time.monotonic() - began, 1e-9)
            rate = f"{pictures / seconds:.4g} img/s, {read / seconds / 1e6:.4g} MB/s"
            progress.update(len(tars), pictures=f"{pictures} ({rate})")
    return tars


def _index(tars: Sequence[ScannedTar], name: str, options: AdoptOptions, where: str, scratch: Path) -> Index:
    """Sum up what was found."""
    if not any(tar.samples for tar in tars):
        row = next((row for tar in tars for row in tar.rejected), None)
        first = f", first {row.path}: {row.reason}" if row else ""
        raise UserError(f"{where}: no pictures in its tars{first}; are these WebDataset tars?")
    side, channels = one_shape(tars, where)
    for what, count in (
        ("samples have several pictures, of which the first counts", sum(tar.several for tar in tars)),
        ("pictures are to be turned by their EXIF and will not be", sum(tar.turned for tar in tars)),
    ):
        if count:
            log.warning("%s: %d %s", where, count, what)
    digests = b"".join(bytes.fromhex(tar.sha256) for tar in tars)
    return Index(
        name=name,
        kind=Kind.WEBDATASET.value,
        source_sha256=hashlib.sha256(digests).hexdigest(),
        geometry=GeometryRecord(name=Geometry.NONE.value, size=side, channels=channels, versions={}),
        encoding=str(Encoding.SOURCE),
        splits=_splits(tars, options.val_fraction, where, scratch),
        rejected=sum(len(tar.rejected) for tar in tars),
        kept=sum(tar.samples for tar in tars),
    )


def _splits(
    tars: Sequence[ScannedTar], val_fraction: float, where: str, scratch: Path
) -> dict[str, list[ShardEntry]]:
    """Divide whole tars, by their names or else by their hashes."""
    val = {tar.name for tar in tars if _is_called_val(tar.name)}
    if not val:
        val = set(_by_hash(tars, val_fraction, where))
    splits: dict[str, list[ShardEntry]] = {"train": [], "val": []}
    for tar in tars:
        splits["val" if tar.name in val else "train"].append(_entry(tar, scratch))
    for split, entries in splits.items():
        if not any(entry.samples for entry in entries):
            raise UserError(
                f"{where}: by the names of its tars none of the pictures is for {split!r}; name only those "
                f"tars val, validation or test that are held out of training, or {REMEDY}"
            )
    return splits


def _is_called_val(name: str) -> bool:
    """Tell whether a tar's name says that it is held out of training."""
    words = set(re.findall("[a-z]+", name.removesuffix(_TAR).lower()))
    return not words.isdisjoint(_VAL_WORDS) and "train" not in words


def _by_hash(tars: Sequence[ScannedTar], val_fraction: float, where: str) -> Iterator[str]:
    """The tars with the smallest hashes that hold the wanted share; never all of those that hold any."""
    filled = sorted((tar for tar in tars if tar.samples), key=lambda tar: (tar.sha256, tar.name))
    if len(filled) < 2:
        raise UserError(
            f"{where}: a single tar cannot be divided into training and validation; add one whose name says "
            f"val, or {REMEDY}"
        )
    missing = val_fraction * sum(tar.samples for tar in filled)
    for tar in filled[:-1]:
        yield tar.name
        missing -= tar.samples
        if missing <= 0:
            return


def _entry(tar: ScannedTar, scratch: Path) -> ShardEntry:
    records = _records_path(scratch, tar.name).read_bytes()
    return ShardEntry(
        name=tar.name,
        bytes=tar.bytes,
        sha256=tar.sha256,
        samples=tar.samples,
        idx_bytes=len(records),
        idx_sha256=sha256_hex(records),
    )


def _report_rejected(out: Storage, tars: Sequence[ScannedTar], max_rejected: float) -> None:
    """List the samples that are left out; raise if they are too many."""
    rows = [row for tar in tars for row in tar.rejected]
    if not rows:
        out.delete(REJECTED_FILE)  # of an adoption that was broken off
        return
    lines = (canonical_json({"schema": "rejected/1", "path": row.path, "reason": row.reason}) for row in rows)
    out.write(REJECTED_FILE, b"".join(line + b"\n" for line in lines))
    samples = len(rows) + sum(tar.samples for tar in tars)
    allowed = max(1, int(max_rejected * samples))
    if len(rows) > allowed:
        raise UserError(
            f"{len(rows)} of {samples} samples have no usable picture and at most {allowed} may be so, first "
            f"{rows[0].path}: {rows[0].reason} (all in {out.url}/{REJECTED_FILE}); mend the tars or allow "
            "more by --max-rejected"
        )


def _idx_name(tar_name: str) -> str:
    return tar_name.removesuffix(_TAR) + ".idx"


def _records_path(scratch: Path, tar_name: str) -> Path:
    return scratch / f"{tar_name}.idx"


def _size(storage: Storage, name: str) -> int | None:
    try:
        return storage.size(name)
    except FileNotFoundError:
        return None
