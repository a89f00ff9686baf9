"""A data set of a thousand million pictures on a thousand ranks: what our order, index and reading cost.

    python -m benchmarks.scale [--shards 100000] [--samples 10000] [--ranks 1024] [--json FILE]

No such data set is built and no store is asked: the index is made in memory, and what answers is the real
code. Measured are times and memory of `Order` and of `Index.from_json`, and what a rank in the middle of all
reads: `Order.locate` gives its members window after window, `reader.coalesce` the requests, and a window's
part is divided as `feed` does it. Pictures are all of one size; how long a store takes is not known here.
"""

import argparse
import gc
import multiprocessing
import tracemalloc
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Final

import numpy as np
import psutil

from benchmarks.harness import SAMPLES_HEADER, Load, Measure, Record, Samples, take_turns, timed
from benchmarks.report import Bar, Environment, environment, finish, table
from data_pipeline.build.tar_members import BLOCK, ending, padding
from data_pipeline.documents import Document, sha256_hex
from data_pipeline.index import INDEX_FILE, RECORD, GeometryRecord, Index, ShardEntry
from data_pipeline.order import Int64Array, Order, rank_slice
from data_pipeline.reader import LARGEST_RANGE, coalesce

RATES: Final = (20, 100, 500)
"""Images per second of one rank."""
IN_FLIGHT: Final = 8
"""Reads at the same time: the stream's default."""
S3_PREFIX: Final = 5500
"""GETs per second that Amazon S3 promises for one prefix of keys ("Optimizing Amazon S3 performance")."""
_CALLS: Final = 100  # of a batch's lookup, in one sample


@dataclass(frozen=True)
class Options:
    """What to look at; the command line's help tells the meanings."""

    shards: int
    samples: int
    picture_bytes: int
    ranks: int
    per_rank: int
    window_shards: int
    prefetch_bytes: int
    repeats: int
    json: Path | None

    @property
    def member_bytes(self) -> int:
        """Of a picture in the tar, with its header."""
        return BLOCK + self.picture_bytes + len(padding(self.picture_bytes))

    @property
    def idx_bytes(self) -> int:
        """Of one shard's `.idx`, which is read whole."""
        return self.samples * RECORD.itemsize

    def order(self, window_shards: int | None = None) -> Order:
        """The order, of these or of other windows."""
        return Order([self.samples] * self.shards, 0, window_shards or self.window_shards)


class Time(Samples):
    """The samples of one piece of work, done `calls` times in each of them."""

    name: str
    calls: int

    @property
    def microseconds(self) -> float:
        """Median of one call."""
        return 1e6 * self.median / self.calls


class Memory(Record):
    """Growth of a new process's resident set, and what tracemalloc says is kept and was used at most."""

    name: str
    resident: int
    kept: int
    peak: int


class Reading(Record):
    """What one rank of `world` reads, from the stream's beginning on.

    Attributes:
        world: How many ranks there are.
        windows: Windows looked at.
        parts: In how many parts the rank's pictures of them are read.
        pictures: How many these are.
        requests: Reads of ranges of shards.
        bytes: What these bring, with the gaps that they read over.
        idx_reads: Of the `.idx` files of all shards in which they lie, each whole.
    """

    world: int
    windows: int
    parts: int
    pictures: int
    requests: int
    bytes: int
    idx_reads: int

    @property
    def gets(self) -> float:
        """All reads for one picture."""
        return (self.requests + self.idx_reads) / self.pictures


class ScaleResult(Document):
    """The JSON file: settings and all raw samples; there are no bars.

    `start` is what a rank of all reads, beside `index.json`, before its first batch; each of `readings` what
    one reads to fill its reading ahead.
    """

    SCHEMA: ClassVar[str] = "scale-benchmark/1"

    settings: dict[str, int]
    environment: Environment
    index_bytes: int
    times: list[Time]
    memory: list[Memory]
    start: Reading
    readings: list[Reading]
    loads: list[Load]
    bars: list[Bar]


def make_index(options: Options) -> Index:
    """The index of the data set, as a build writes it."""
    members = options.samples * options.member_bytes
    entries = [
        ShardEntry(
            name=f"shard-{number:06d}.tar",
            bytes=members + len(ending(members)),
            sha256=sha256_hex(b"%d" % number),
            samples=options.samples,
            idx_bytes=options.idx_bytes,
            idx_sha256=sha256_hex(b"%d.idx" % number),
        )
        for number in range(options.shards)
    ]
    return Index(
        name="large",
        kind="files",
        source_sha256=sha256_hex(b""),
        geometry=GeometryRecord(name="ddpm-lsun", size=256, channels=3, versions={"pillow": "0"}),
        encoding="source",
        splits={"train": entries},
        rejected=0,
    )


def measure_times(options: Options, data: bytes) -> tuple[list[Time], Load]:
    """Time everything, in turns; `data` is `index.json`."""
    batch = np.arange(options.ranks * options.per_rank, dtype=np.int64)
    own = batch[rank_slice(len(batch), options.ranks // 2, options.ranks)]
    warm = options.order()
    warm.locate(batch[:1])

    def first_batch(window_shards: int) -> tuple[float, float]:
        return timed(partial(options.order(window_shards).locate, own))

    def later_batches(positions: Int64Array) -> None:
        for number in range(_CALLS):
            warm.locate((positions + number * len(batch)) % warm.epoch_size)

    work: dict[tuple[str, int], Measure] = {
        ("Index.from_json", 1): lambda: timed(partial(Index.from_json, data, INDEX_FILE)),
        ("Order made", 1): lambda: timed(options.order),
        (f"a rank's {len(own)} positions", _CALLS): lambda: timed(partial(later_batches, own)),
        (f"a global batch's {len(batch):,}", _CALLS): lambda: timed(partial(later_batches, batch)),
    }
    for window in sorted({1, options.window_shards, 64}):
        work[f"first batch of an epoch, window of {window}", 1] = partial(first_batch, window)
    samples, load = take_turns(list(work.values()), options.repeats)
    times = [
        Time(name=name, calls=calls, wall=each.wall, cpu=each.cpu)
        for (name, calls), each in zip(work, samples, strict=True)
    ]
    return times, load


def measure_memory(options: Options, data: bytes) -> list[Memory]:
    """Memory of the index and of the order, each in a new process: what was freed before would hide it."""
    work: dict[str, Callable[[], object]] = {INDEX_FILE: partial(Index.from_json, data, INDEX_FILE)}
    for epochs in (0, 1, 4):  # four is what it keeps
        work[f"Order with the tables of {epochs} epochs"] = partial(_located, options, epochs)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        return [pool.submit(_memory, name, make).result() for name, make in work.items()]


def own_positions(options: Options, world: int, start: int, stop: int) -> Int64Array:
    """Positions in [start, stop) that a rank in the middle of so many delivers, increasing."""
    batch = world * options.per_rank
    own = np.arange(batch, dtype=np.int64)[rank_slice(batch, world // 2, world)]
    batches = np.arange(start // batch, -(-stop // batch), dtype=np.int64)
    positions = (batches[:, None] * batch + own).reshape(-1)
    return positions[(positions >= start) & (positions < stop)]


def requests(options: Options, shards: Int64Array, members: Int64Array) -> tuple[int, int]:
    """How many ranges are read for members that are read together, and how many bytes they have."""
    largest = min(LARGEST_RANGE, options.prefetch_bytes // 4)  # as `readahead` has it
    count = read = 0
    for shard in np.unique(shards).tolist():
        starts = members[shards == shard] * options.member_bytes + BLOCK
        stops = starts + options.picture_bytes
        for group in coalesce(starts, stops, largest):
            count += 1
            read += int(stops[group].max() - starts[group].min())
    return count, read


def divided(options: Options, pictures: int) -> list[Int64Array]:
    """The parts in which a rank's pictures of a window are read, as `feed` cuts them: of half a lookahead."""
    parts = -(-pictures * options.picture_bytes // (options.prefetch_bytes // 2))
    return list(np.array_split(np.arange(pictures), max(1, parts)))


def measure_reading(options: Options, world: int) -> Reading:
    """Follow one rank of so many through as many whole windows as its reading ahead holds, at least one."""
    order, end, windows, idx, taken = options.order(), 0, 0, 0, 0
    found: list[tuple[int, int]] = []  # of each part
    while taken * options.picture_bytes < options.prefetch_bytes:
        start, end = end, order.window_end(end)
        shards, members = order.locate(own_positions(options, world, start, end))
        windows, taken, idx = windows + 1, taken + len(shards), idx + len(np.unique(shards))
        parts = divided(options, len(shards))
        found += [requests(options, shards[part], members[part]) for part in parts]
    return Reading(
        world=world,
        windows=windows,
        parts=len(found),
        pictures=taken,
        requests=sum(count for count, _ in found),
        bytes=sum(read for _, read in found),
        idx_reads=idx,
    )


def measure_start(options: Options) -> Reading:
    """What a rank of all reads before its first batch: records of all its part of a window, and the batch."""
    order, first = options.order(), options.per_rank
    shards, members = order.locate(own_positions(options, options.ranks, 0, order.window_end(0)))
    count, read = requests(options, shards[:first], members[:first])
    world, idx = options.ranks, len(np.unique(shards))
    return Reading(world=world, windows=1, parts=1, pictures=first, requests=count, bytes=read, idx_reads=idx)


def print_costs(times: Sequence[Time], memory: Sequence[Memory]) -> None:
    """Print what order and index take."""
    rows = [(time.name, f"{time.microseconds:,.1f}", str(time.calls), *time.cells()) for time in times]
    print(table(("work", "us/call", "calls", *SAMPLES_HEADER), rows))
    sizes = [(each.name, _mb(each.resident), _mb(each.kept), _mb(each.peak)) for each in memory]
    print(table(("memory of a process, MB", "resident", "kept", "peak"), sizes))


def print_readings(options: Options, readings: Sequence[Reading]) -> None:
    """Print what ranks read, and what the store meets from all of them."""
    rows, rates = [], []
    for each in readings:
        own, idx = each.pictures, each.idx_reads * options.idx_bytes
        wanted = own * options.picture_bytes
        filling = each.requests * options.prefetch_bytes / wanted
        counts = own / each.windows, each.parts / each.windows, filling
        ratios = each.requests / own, each.bytes / wanted, each.idx_reads / own, idx / wanted
        cells = (*(f"{count:,.0f}" for count in counts), *(f"{ratio:.4f}" for ratio in ratios))
        rows.append((f"{each.world:,}", *cells))
        for rate in RATES:
            gets, seconds = rate * each.gets, own / rate
            loads = gets, gets * each.world, gets * each.world / S3_PREFIX
            speeds = each.bytes / seconds / 1e6, idx / seconds / 1e6, 1e3 * IN_FLIGHT / gets
            numbers = (f"{number:,.1f}" for number in (*loads, *speeds))
            rates.append((f"{each.world:,} ranks, {rate} img/s each", *numbers))
    header = ("ranks", "pictures of a window", "parts", "GETs of a lookahead", "GET/picture", "read/wanted")
    print(table((*header, ".idx GET/picture", ".idx/wanted"), rows))
    columns = ("GET/s of a rank", "of all", f"in S3 prefixes of {S3_PREFIX}/s", "picture MB/s", ".idx MB/s")
    print(table(("load of the store", *columns, f"ms a GET may take, {IN_FLIGHT} at a time"), rates))


def conclude(options: Options, result: ScaleResult) -> list[str]:
    """Say what the numbers mean, a sentence each."""
    seconds = {time.name: time.microseconds / 1e6 for time in result.times}
    first = seconds[f"first batch of an epoch, window of {options.window_shards}"]
    later = next(taken for name, taken in seconds.items() if name.startswith("a rank's"))
    start_idx = result.start.idx_reads * options.idx_bytes
    start = result.index_bytes + start_idx + result.start.bytes
    (last,) = (each for each in result.readings if each.world == options.ranks)
    idx = last.idx_reads * options.idx_bytes / (last.pictures * options.picture_bytes)
    gets = RATES[1] * last.gets * last.world
    return [
        f"order: the first batch of an epoch waits {first:.2f} s for its table, a later one {later:.5f} s",
        f"{INDEX_FILE}: {_mb(result.index_bytes)} MB, {seconds['Index.from_json']:.2f} s to read and "
        f"{_mb(result.memory[0].resident)} MB to keep, for each of {options.ranks:,} processes",
        f"start: {_mb(start)} MB for each rank before its first batch, {_mb(result.index_bytes)} of it "
        f"{INDEX_FILE} and {_mb(start_idx)} whole .idx files; {start * options.ranks / 1e9:.1f} GB for all",
        f"reading: at {last.world:,} ranks {last.requests / last.pictures:.2f} ranged reads for a picture, "
        f"and whole .idx files bring {idx:.2f} times the bytes of the pictures",
        f"store: at {RATES[1]} img/s for each rank it answers {gets:,.0f} GET/s, "
        f"{gets / S3_PREFIX:.1f} times what S3 promises for one prefix",
    ]


def run(options: Options) -> ScaleResult:
    """Measure everything and print it."""
    data = make_index(options).to_json()
    memory = measure_memory(options, data)
    times, load = measure_times(options, data)
    result = ScaleResult(
        settings={name: value for name, value in vars(options).items() if name != "json"},
        environment=environment(("numpy", "pydantic")),
        index_bytes=len(data),
        times=times,
        memory=memory,
        start=measure_start(options),
        readings=[measure_reading(options, world) for world in sorted({1, 8, 64, options.ranks})],
        loads=[load],
        bars=[],
    )
    print(f"{options.shards:,} shards of {options.samples:,} pictures, windows of {options.window_shards}")
    print_costs(times, memory)
    print_readings(options, result.readings)
    print("\n".join(conclude(options, result)))
    finish(result, options.json)
    return result


def read(arguments: Sequence[str] | None = None) -> Options:
    """Read the command line; default: the process's."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m benchmarks.scale", description=__doc__, formatter_class=formatter
    )
    for name, default, meaning in (
        ("shards", 100_000, "of the data set"),
        ("samples", 10_000, "of each shard"),
        ("picture-bytes", 14_000, "of each picture"),
        ("ranks", 1024, "processes that train"),
        ("per-rank", 8, "pictures of one rank in one batch"),
        ("window-shards", 16, "shards that are mixed with each other"),
        ("prefetch-bytes", 256 << 20, "most bytes that a rank reads ahead"),
        ("repeats", 5, "timed calls of each"),
    ):
        parser.add_argument(
            f"--{name}", type=int, default=default, metavar="N", help=f"{meaning} ({default})"
        )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all samples here")
    found = parser.parse_args(arguments)
    if min(value for name, value in vars(found).items() if name != "json") < 1:
        parser.error("every N must be at least 1")
    return Options(**vars(found))


def main(arguments: Sequence[str] | None = None) -> ScaleResult:
    """Run the benchmark with these arguments (default: the process's) and return what was measured."""
    return run(read(arguments))


def _memory(name: str, make: Callable[[], object]) -> Memory:
    """What `make` costs in a process that has done nothing yet."""
    process = psutil.Process()
    before = process.memory_info().rss
    made = make()
    gc.collect()
    resident = process.memory_info().rss - before
    del made
    tracemalloc.start()
    made = make()
    gc.collect()
    kept, peak = tracemalloc.get_traced_memory()
    del made
    return Memory(name=name, resident=resident, kept=kept, peak=peak)


def _located(options: Options, epochs: int) -> Order:
    order = options.order()
    order.locate(np.arange(epochs) * order.epoch_size)
    return order


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f}"


if __name__ == "__main__":
    main()
