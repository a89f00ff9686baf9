"""Loading a checkpoint into any layout: by overlap, each byte read once, all of it verified.

A rank reads the blocks that hold what it needs. Blocks that nobody needs (averages as whole tensors, at
ZeRO 0 the masters) are divided over the ranks and only verified, so that no damage goes unnoticed until the
day the file is wanted.
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, TypeVar

import google_crc32c
import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from torch import Tensor

from data_pipeline.documents import sha256_hex
from data_pipeline.storage import Storage
from trainer.checkpoint import Slice, folder_of
from trainer.distributed import Ranks
from trainer.manifest import DamagedCheckpointError, FileEntry, Manifest
from trainer.parts import DTYPES, READS, read_verified
from trainer.run import Run

log = logging.getLogger(__name__)
T = TypeVar("T")

_READ_BYTES: Final = 8 << 20
"""Most bytes of one read."""
_REQUESTS: Final = 8
"""Reads at the same time; with `_READ_BYTES` the memory that loading takes beside the state itself."""
Mask = npt.NDArray[np.bool_]
"""Which blocks of a file."""


def read_weights(run: Run, manifest: Manifest, ranks: Ranks) -> dict[str, Tensor]:
    """Return the whole weights on every rank; each reads its share of the file. All ranks call this together.

    Raises:
        DamagedCheckpointError: On all ranks, if the file is not what was published.
    """
    (blocks,) = (part for part in _open_parts(run, manifest, ranks) if part.entry.role == "weights")
    wanted = np.zeros(blocks.count, dtype=np.bool_)
    wanted[_share(blocks.count, ranks)] = True
    mine = _together(ranks, lambda: [blocks.read(*run) for run in _runs(wanted, blocks.block_bytes)])
    whole = ranks.concatenate(torch.from_numpy(np.frombuffer(b"".join(mine), dtype=np.uint8).copy()))
    return safetensors.torch.load(whole.numpy().tobytes())


def load_state(run: Run, manifest: Manifest, slices: Sequence[Slice], ranks: Ranks) -> int:
    """Fill the slices' tensors in place, and verify all parts but the weights. All ranks call this together.

    Args:
        run: The run.
        manifest: The checkpoint's.
        slices: What this rank needs.
        ranks: The processes of the job, as many as there are now.

    Returns:
        Bytes that this rank read.

    Raises:
        DamagedCheckpointError: On all ranks, if a part is damaged, or the parts together do not cover the
            slices.
    """
    parts = [part for part in _open_parts(run, manifest, ranks) if part.entry.role != "weights"]

    def find() -> list[_Found]:
        found = [_find(part, slices) for part in parts]
        _check_coverage(run, manifest, slices, found)
        return found

    found = _together(ranks, find)
    reads = [
        (part, each.overlaps, first, last)
        for part, each, wanted in zip(parts, found, _divide(found, ranks), strict=True)
        for first, last in _runs(wanted, part.block_bytes)
    ]
    with ThreadPoolExecutor(_REQUESTS) as pool:
        _together(ranks, lambda: list(pool.map(lambda read: _read(*read), reads)))
    headers = sum(part.span(0, each.header_blocks) for part, each in zip(parts, found, strict=True))
    return headers + sum(part.span(first, last) for part, _, first, last in reads)


@dataclass(frozen=True)
class _Part:
    """A part, readable block by block.

    Attributes:
        folder: Where it is.
        entry: What the manifest says of it.
        block_bytes: Length of a block; that of the whole part, where blocks have no checksums.
        crcs: CRC32C by block; None where there are none.
    """

    folder: Storage
    entry: FileEntry
    block_bytes: int
    crcs: npt.NDArray[np.uint32] | None

    @property
    def count(self) -> int:
        """Number of blocks."""
        return -(-self.entry.bytes // self.block_bytes)

    def span(self, first: int, last: int) -> int:
        """Bytes of the blocks [first, last)."""
        return min(last * self.block_bytes, self.entry.bytes) - min(
            first * self.block_bytes, self.entry.bytes
        )

    def read(self, first: int, last: int) -> bytes:
        """Read the blocks [first, last), verified."""
        begin = first * self.block_bytes
        end = begin + self.span(first, last)
        where = f"{self.folder.url}/{self.entry.path}"
        for _ in range(READS):
            try:
                data = self.folder.read_range(self.entry.path, begin, end)
            except FileNotFoundError as error:
                raise DamagedCheckpointError(f"{where}: the file is missing") from error
            if self._is_intact(data, first):
                return data
            log.warning("%s: bytes %d to %d differ from what was published", where, begin, end)
        raise DamagedCheckpointError(
            f"{where}: bytes {begin} to {end} differ from what was published; the file is damaged"
        )

    def _is_intact(self, data: bytes, first: int) -> bool:
        if self.crcs is None:
            return sha256_hex(data) == self.entry.sha256
        view = np.frombuffer(data, dtype=np.uint8)
        pieces = (view[at : at + self.block_bytes] for at in range(0, len(view), self.block_bytes))
        return all(google_crc32c.value(piece) == self.crcs[n] for n, piece in enumerate(pieces, start=first))


@dataclass(frozen=True)
class _Overlap:
    """The bytes [begin, end) of a part are numbers that a slice wants."""

    begin: int
    end: int
    target: Tensor
    dtype: torch.dtype
    role: str
    parameter: str

    def copy(self, data: bytes, at: int) -> None:
        """Copy what `data`, which begins at byte `at` of the part, holds of it."""
        first, last = max(self.begin, at), min(self.end, at + len(data))
        if first >= last:
            return
        size = self.dtype.itemsize
        source = np.frombuffer(data, dtype=np.uint8)[first - at : last - at].copy()
        into = self.target[(first - self.begin) // size : (last - self.begin) // size]
        with torch.no_grad():
            into.copy_(torch.from_numpy(source).view(self.dtype))


@dataclass(frozen=True)
class _Found:
    """What a rank finds in a part.

    Attributes:
        overlaps: What it needs of it.
        roles: Of which there is something in it, whoever needs it.
        needed: The blocks that hold that, and its header.
        header_blocks: How many blocks were read for the header.
    """

    overlaps: list[_Overlap]
    roles: frozenset[str]
    needed: Mask
    header_blocks: int


def _open_parts(run: Run, manifest: Manifest, ranks: Ranks) -> list[_Part]:
    """Return the parts of a checkpoint with their checksums, which rank 0 reads."""
    folder, checksums = folder_of(run, manifest), manifest.checksums
    if checksums is None:
        return [_Part(folder, entry, entry.bytes, None) for entry in manifest.files]
    table = _together(ranks, lambda: read_verified(folder, checksums) if ranks.is_main else b"")
    crcs = np.frombuffer(ranks.gather(table)[0], dtype="<u4")
    parts, begin = [], 0
    for entry in manifest.files:
        part = _Part(folder, entry, checksums.block_bytes, crcs[begin:])
        begin += part.count
        parts.append(part)
    return parts


def _find(part: _Part, slices: Sequence[Slice]) -> _Found:
    """Read a part's header and find what of it the slices want."""
    needed = np.zeros(part.count, dtype=np.bool_)
    if part.entry.role != "state":
        return _Found([], frozenset(), needed, 0)
    data, header_bytes = _read_header(part)
    by_parameter: dict[str, list[Slice]] = {}
    for piece in slices:
        by_parameter.setdefault(piece.parameter, []).append(piece)
    overlaps, roles = [], set()
    for key, value in json.loads(data[8:header_bytes]).items():
        role, parameter, start, stop = _parse_key(key)
        roles.add(role)
        dtype = DTYPES[value["dtype"]]
        for piece in by_parameter.get(parameter, []):
            first, last = max(piece.start, start), min(piece.stop, stop)
            if role in piece.tensors and first < last:
                begin = header_bytes + value["data_offsets"][0] + (first - start) * dtype.itemsize
                end = begin + (last - first) * dtype.itemsize
                target = piece.tensors[role][first - piece.start : last - piece.start]
                overlaps.append(_Overlap(begin, end, target, dtype, role, parameter))
                needed[begin // part.block_bytes : -(-end // part.block_bytes)] = True
    header_blocks = -(-header_bytes // part.block_bytes)
    needed[:header_blocks] = True
    for overlap in overlaps:
        overlap.copy(data, 0)  # the last block of the header holds tensors, too
    return _Found(overlaps, frozenset(roles), needed, header_blocks)


def _read_header(part: _Part) -> tuple[bytes, int]:
    """Return the blocks with a safetensors file's header, and where its tensors begin."""
    data = part.read(0, 1)
    header_bytes = 8 + int.from_bytes(data[:8], "little")
    blocks = -(-header_bytes // part.block_bytes)
    if blocks > 1:
        data += part.read(1, blocks)
    return data, header_bytes


def _parse_key(key: str) -> tuple[str, str, int, int]:
    role, _, rest = key.partition("/")
    parameter, start, stop = rest.rsplit(":", 2)
    return role, parameter, int(start), int(stop)


def _check_coverage(run: Run, manifest: Manifest, slices: Sequence[Slice], found: Sequence[_Found]) -> None:
    """See that all the slices want is there, but for averages that the run did not have until now."""
    known = frozenset().union(*(each.roles for each in found))
    missing: Counter[tuple[str, str]] = Counter()
    new: set[str] = set()
    for piece in slices:
        for role in piece.tensors:
            if role.startswith("ema.") and role not in known:
                new.add(role.removeprefix("ema."))
            else:
                missing[role, piece.parameter] += piece.stop - piece.start
    for overlap in (overlap for each in found for overlap in each.overlaps):
        missing[overlap.role, overlap.parameter] -= overlap.target.numel()
    for profile in sorted(new):
        log.warning("average %s is new: it begins with the weights of checkpoint %s", profile, manifest.name)
    for (role, parameter), count in missing.items():
        if count != 0:
            raise DamagedCheckpointError(
                f"{run.url}: checkpoint {manifest.name} lacks {count} numbers of {role}/{parameter}"
            )


def _divide(found: Sequence[_Found], ranks: Ranks) -> list[Mask]:
    """Return what this rank is to read of each part, without what it has read of the headers."""
    needed = ranks.gather([np.packbits(each.needed) for each in found])
    wanted = []
    for number, mine in enumerate(found):
        by_anyone = np.bitwise_or.reduce([masks[number] for masks in needed])
        (rest,) = np.nonzero(np.unpackbits(by_anyone, count=len(mine.needed)) == 0)
        mask = mine.needed.copy()
        mask[: mine.header_blocks] = False
        mask[rest[_share(len(rest), ranks)]] = True
        wanted.append(mask)
    return wanted


def _share(count: int, ranks: Ranks) -> slice:
    """This rank's part of so many things."""
    return slice(count * ranks.rank // ranks.world, count * (ranks.rank + 1) // ranks.world)


def _runs(wanted: Mask, block_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges [first, last) of wanted blocks, as far as one read goes."""
    edges = np.flatnonzero(np.diff(wanted, prepend=False, append=False)).tolist()
    longest = max(1, _READ_BYTES // block_bytes)
    for begin, end in zip(edges[::2], edges[1::2], strict=True):
        for first in range(begin, end, longest):
            yield first, min(first + longest, end)


def _read(part: _Part, overlaps: Sequence[_Overlap], first: int, last: int) -> None:
    data = part.read(first, last)
    for overlap in overlaps:
        overlap.copy(data, first * part.block_bytes)


def _together(ranks: Ranks, action: Callable[[], T]) -> T:
    """Do something on every rank; damage that one meets is raised on all."""
    damage: DamagedCheckpointError | None = None
    try:
        result = action()
    except DamagedCheckpointError as error:
        damage = error
    first = next(filter(None, ranks.gather(str(damage) if damage else "")), None)
    if first is not None:
        raise damage or DamagedCheckpointError(first)
    return result
