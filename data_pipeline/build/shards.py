"""Writing a shard: prepared members -> `shard-NNNNNN.tar` + `shard-NNNNNN.idx` in the storage."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

from data_pipeline.build.packing import PackedShard, Piece
from data_pipeline.build.prepare import part_path
from data_pipeline.build.tar_members import ending
from data_pipeline.index import ShardEntry
from data_pipeline.scratch import naming_full_scratch
from data_pipeline.storage import Storage

_BLOCK: Final = 1 << 18


def write_shard(shard: PackedShard, scratch: Path, storage: Storage) -> ShardEntry:
    """Put a shard together and upload it.

    Args:
        shard: What it consists of.
        scratch: Where the files of members lie.
        storage: Where the shard goes.

    Returns:
        Its entry in the index.

    Raises:
        UserError: No space left, here or there.
    """
    name = f"shard-{shard.number:06d}.tar"
    last = ending(shard.size)
    sha256 = hashlib.sha256()

    def fill(file: BinaryIO) -> None:
        nonlocal sha256
        sha256 = hashlib.sha256()  # anew: after a fault the file is filled once more
        for piece in shard.pieces:
            for block in _blocks(part_path(scratch, shard.split, piece.run), piece):
                sha256.update(block)
                file.write(block)
        sha256.update(last)
        file.write(last)

    with naming_full_scratch(scratch):
        storage.fill(name, fill, scratch)
    records = shard.records.tobytes()
    storage.write(name.removesuffix(".tar") + ".idx", records)
    return ShardEntry(
        name=name,
        bytes=shard.size + len(last),
        sha256=sha256.hexdigest(),
        samples=len(shard.records),
        idx_bytes=len(records),
        idx_sha256=hashlib.sha256(records).hexdigest(),
    )


def _blocks(path: Path, piece: Piece) -> Iterator[memoryview]:
    """The bytes of a piece; each block is valid until the next one is asked for."""
    buffer = memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as part:
        part.seek(piece.start)
        left = piece.stop - piece.start
        while left:
            count = part.readinto(buffer[: min(left, _BLOCK)])
            assert count
            left -= count
            yield buffer[:count]
