"""One file of a checkpoint: written as a stream and hashed on its way, with a checksum of every block.

A file is in safetensors' format: 8 bytes with the header's length, a JSON header, the tensors. SHA-256 of the
whole tells whether it is what was published; CRC32C of each block tells it of a range, so that a rank which
needs a part of a file need not read the rest to trust it.
"""

import hashlib
import json
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import BinaryIO, Final, Literal

import google_crc32c
import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from torch import Tensor

from data_pipeline.documents import sha256_hex
from data_pipeline.errors import StorageFault
from data_pipeline.storage import Storage
from trainer.manifest import DamagedCheckpointError, FileEntry, FileRecord, Manifest
from trainer.run import Run

log = logging.getLogger(__name__)

BLOCK_BYTES: Final = 1 << 14
"""Bytes of a block that has a checksum: small beside what a rank needs, many times the checksum's four."""
READS: Final = 2
"""Independent reads before something counts as damaged: one transfer may go wrong."""
DTYPES: Final = {"F32": torch.float32, "F64": torch.float64, "I64": torch.int64}
"""safetensors' names of what a checkpoint may hold."""
_PIECE_BYTES: Final = 1 << 20
_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Part:
    """A part that has been written.

    Attributes:
        entry: What the manifest says of it.
        crcs: CRC32C of each block of `BLOCK_BYTES`, the last one shorter: little-endian uint32.
    """

    entry: FileEntry
    crcs: bytes


class _HashingFile:
    """Passes bytes on to a file and hashes them: whole, and block by block."""

    def __init__(self, file: BinaryIO, deadline: float) -> None:
        self._file, self._deadline = file, deadline
        self.sha256 = hashlib.sha256()
        self.bytes = 0
        self._crcs: list[int] = []

    def write(self, data: Bytes) -> None:
        for begin in range(0, len(data), _PIECE_BYTES):
            if time.monotonic() >= self._deadline:
                raise StorageFault("the store is too slow: a part was not written by its deadline")
            piece = data[begin : begin + _PIECE_BYTES]
            self.sha256.update(piece.data)
            self._file.write(piece.data)
            self._checksum(piece)

    def crcs(self) -> bytes:
        """Return the checksums of all blocks so far."""
        return np.array(self._crcs, dtype="<u4").tobytes()

    def _checksum(self, piece: Bytes) -> None:
        begin = 0
        while begin < len(piece):
            filled = self.bytes % BLOCK_BYTES
            block = piece[begin : begin + BLOCK_BYTES - filled]
            if filled:
                self._crcs[-1] = google_crc32c.extend(self._crcs[-1], block)
            else:
                self._crcs.append(google_crc32c.value(block))
            self.bytes += len(block)
            begin += len(block)


def write_part(
    run: Run,
    checkpoint: str,
    path: str,
    tensors: Mapping[str, Tensor],
    role: Literal["weights", "ema", "state", "timesteps"],
    ema: str | None = None,
    *,
    deadline: float = math.inf,
) -> Part:
    """Write one part of a checkpoint that is not yet published, its tensors in the mapping's order.

    Nothing is copied but what lies on a device or is not contiguous, one tensor at a time.

    Args:
        run: The run.
        checkpoint: Name of the checkpoint.
        path: Of the part within its folder.
        tensors: By name.
        role: What they are.
        ema: Of averages, their profile.
        deadline: Moment of `time.monotonic` after which no more is written.

    Raises:
        StorageFault: The store failed for longer than the retries last, or was too slow.
    """
    header = np.frombuffer(_header(tensors), np.uint8)
    tries: list[_HashingFile] = []

    def fill(file: BinaryIO) -> None:
        tries.append(_HashingFile(file, deadline))
        tries[-1].write(header)
        for tensor in tensors.values():
            tries[-1].write(_bytes_of(tensor))

    run.storage.stream(f"checkpoints/{checkpoint}/{path}", fill)
    written = tries[-1]
    digest = written.sha256.hexdigest()
    entry = FileEntry(path=path, bytes=written.bytes, sha256=digest, role=role, ema=ema)
    return Part(entry, written.crcs())


def read_verified(folder: Storage, record: FileRecord) -> bytes:
    """Read a file, verified by size and SHA-256.

    Raises:
        DamagedCheckpointError: It is missing or differs from what was published.
    """
    where = f"{folder.url}/{record.path}"
    for _ in range(READS):
        try:
            data = folder.read(record.path)
        except FileNotFoundError as error:
            raise DamagedCheckpointError(f"{where}: the file is missing") from error
        if len(data) == record.bytes and sha256_hex(data) == record.sha256:
            return data
        log.warning("%s: size or SHA-256 differs from the manifest's", where)
    raise DamagedCheckpointError(f"{where}: size or SHA-256 differs from the manifest's; the file is damaged")


def read_part(run: Run, manifest: Manifest, entry: FileEntry) -> dict[str, Tensor]:
    """Read one part whole, verified by size and SHA-256.

    Raises:
        DamagedCheckpointError: The part is missing or differs from what was published.
    """
    return safetensors.torch.load(read_verified(run.storage.child("checkpoints", manifest.name), entry))


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    """Return what precedes the tensors; padded, so that numbers lie aligned (safetensors' format)."""
    content: dict[str, object] = {}
    begin = 0
    for name, tensor in tensors.items():
        end = begin + tensor.numel() * tensor.element_size()
        content[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes_of(tensor: Tensor) -> Bytes:
    flat: Bytes = tensor.detach().cpu().contiguous().view(-1).numpy().view(np.uint8)
    return flat
