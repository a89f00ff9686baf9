"""What the index of millions of samples costs: bytes, reading it, and finding samples by it."""

import time
from pathlib import Path

import numpy as np

from benchmarks.data_build.running import emptied
from benchmarks.harness import Record
from data_pipeline.build import BuildOptions
from data_pipeline.build.tar_members import BLOCK, capacity, padding
from data_pipeline.documents import sha256_hex
from data_pipeline.index import INDEX_FILE, RECORD, BuildRecord, GeometryRecord, Index, ShardEntry, load_index
from data_pipeline.order import Order

_SAMPLE_BYTES = 15_000
_VAL_FRACTION = 0.01
_WINDOW_SHARDS = 16  # the stream's default


class IndexCosts(Record):
    """An index, and what it costs.

    Attributes:
        samples: How many there are.
        shards: How many shards, of the default size.
        json_bytes: Size of `index.json`.
        idx_bytes: Size of all `.idx` together; they are read with their shards, never all at once.
        load_seconds: Reading and checking `index.json`.
        positions: How many were looked up.
        locate_seconds: Making the order of the training split and looking them up.
    """

    samples: int
    shards: int
    json_bytes: int
    idx_bytes: int
    load_seconds: float
    positions: int
    locate_seconds: float

    def line(self) -> str:
        """For the reader."""
        return (
            f"an index of {self.samples:,} samples in {self.shards:,} shards: index.json "
            f"{self.json_bytes:,} bytes, loaded in {self.load_seconds:.3f} s; order made and "
            f"{self.positions:,} positions located in {self.locate_seconds:.3f} s; "
            f"all .idx together {self.idx_bytes:,} bytes"
        )


def index_costs(samples: int, positions: int, folder: Path) -> IndexCosts:
    """Write the index of so many samples of 15 kB, and use it.

    Args:
        samples: How many.
        positions: How many to locate; the first ones of the stream.
        folder: Made for it, and removed.
    """
    index = _index(samples)
    entries = [entry for shards in index.splits.values() for entry in shards]
    with emptied(folder):
        data = index.to_json()
        (folder / INDEX_FILE).write_bytes(data)
        began = time.perf_counter()
        loaded = load_index(str(folder))
        load_seconds = time.perf_counter() - began
    began = time.perf_counter()
    order = Order([entry.samples for entry in loaded.shards("train")], seed=0, window_shards=_WINDOW_SHARDS)
    order.locate(np.arange(positions, dtype=np.int64))
    return IndexCosts(
        samples=samples,
        shards=len(entries),
        json_bytes=len(data),
        idx_bytes=sum(entry.idx_bytes for entry in entries),
        load_seconds=load_seconds,
        positions=positions,
        locate_seconds=time.perf_counter() - began,
    )


def _index(samples: int) -> Index:
    """An index as a build of LSUN writes it."""
    options = BuildOptions()
    val = max(1, round(samples * _VAL_FRACTION))
    train = _entries(samples - val, 0, options.shard_bytes)
    return Index(
        name="bedroom_train",
        kind="lsun",
        source_sha256=sha256_hex(b""),
        geometry=GeometryRecord(name="ddpm-lsun", size=256, channels=3, versions={"pillow": "0"}),
        encoding="source",
        build=BuildRecord(val_fraction=_VAL_FRACTION, shard_bytes=options.shard_bytes),
        splits={"train": train, "val": _entries(val, len(train), options.shard_bytes)},
        rejected=0,
        kept=samples,
    )


def _entries(samples: int, first: int, shard_bytes: int) -> list[ShardEntry]:
    """Full shards of so many samples, numbered from `first` on."""
    length = BLOCK + _SAMPLE_BYTES + len(padding(_SAMPLE_BYTES))
    full = capacity(shard_bytes) // length
    entries = []
    for number, start in enumerate(range(0, samples, full), first):
        held = min(full, samples - start)
        entries.append(
            ShardEntry(
                name=f"shard-{number:06d}.tar",
                bytes=held * length + 2 * BLOCK,
                sha256=sha256_hex(b"%d" % number),
                samples=held,
                idx_bytes=held * RECORD.itemsize,
                idx_sha256=sha256_hex(b"%d.idx" % number),
            )
        )
    return entries
