"""Resident memory over many epochs of a small data set."""

from typing import Final

from benchmarks.data_stream.bars import at_most
from benchmarks.data_stream.contenders import OURS, STOCK
from benchmarks.data_stream.site import Site
from benchmarks.harness import Record
from benchmarks.report import Bar, table

EPOCHS: Final = 20
SETTLED: Final = 2
"""Epochs after which memory should stay as it is."""
DRIFT_TARGET: Final = 0.03
PICTURES: Final = 4000
MEMORY_HEADER: Final = ("contender", f"MiB after epoch {SETTLED}", f"after {EPOCHS}", "largest", "drift %")
_SHARD_BYTES: Final = 4 << 20
_WINDOW_SHARDS: Final = 4
_PREFETCH_BYTES: Final = 2 * _WINDOW_SHARDS * _SHARD_BYTES  # as the stream's documentation advises


class Memory(Record):
    """One process's resident memory.

    Attributes:
        contender: Whose.
        resident: Bytes after each epoch.
    """

    contender: str
    resident: list[int]

    @property
    def drift(self) -> float:
        """Growth from the settled state to the end, as a share of the former."""
        return self.resident[-1] / self.resident[SETTLED - 1] - 1

    def row(self) -> tuple[str, ...]:
        """The cells of `MEMORY_HEADER`."""
        found = (self.resident[SETTLED - 1], self.resident[-1], max(self.resident))
        return self.contender, *(f"{value / 2**20:.1f}" for value in found), f"{100 * self.drift:.2f}"


def measure_memory(site: Site) -> list[Memory]:
    """Read the epochs, ours in one stream, WebDataset in its own process without workers."""
    source = site.part_of_source("small-source", PICTURES)
    data = site.build("small-shards", source, _SHARD_BYTES)
    found = []
    for name in (OURS, STOCK):
        job = site.job(name, data, window_shards=_WINDOW_SHARDS, prefetch_bytes=_PREFETCH_BYTES)
        with site.start(job) as process:
            found.append(Memory(contender=name, resident=process.ask("memory", epochs=EPOCHS)))
    print(table(MEMORY_HEADER, [memory.row() for memory in found]))
    return found


def memory_bars(found: list[Memory]) -> list[Bar]:
    """Judge ours; WebDataset's is there to look at."""
    return [
        at_most(
            "stream-memory-drift",
            DRIFT_TARGET,
            memory.drift,
            f"growth from epoch {SETTLED} to epoch {EPOCHS}: "
            + ", ".join(f"{one.contender} {100 * one.drift:.2f} %" for one in found),
        )
        for memory in found
        if memory.contender == OURS
    ]
