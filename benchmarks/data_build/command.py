"""Building shards beside WebDataset's writer and beside the bare coding; what a large index costs.

Nothing is timed before everyone has written the same pictures under the same keys.
"""

import argparse
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from benchmarks.data_build.bake import InMemory, code_all
from benchmarks.data_build.large_index import IndexCosts, index_costs
from benchmarks.data_build.passthrough import Passthrough, nothing
from benchmarks.data_build.pictures import SIZE, write_database, write_large
from benchmarks.data_build.running import Part, Rate, built, measure, scratch_below
from benchmarks.harness import OURS, SAMPLES_HEADER, Load, Measure, Record, take_turns, tree_seconds
from benchmarks.peers.distribution import LibraryPeer
from benchmarks.peers.webdataset_writer import WEBDATASET
from benchmarks.report import Bar, Environment, environment, finish, missing_bar, ratio_bar, table
from data_pipeline.build import BuildOptions
from data_pipeline.documents import Document
from data_pipeline.encoding import Encoding
from data_pipeline.fit import Form
from data_pipeline.geometry import Geometry
from data_pipeline.sources.folder import FolderSource
from data_pipeline.team import Team

PASSTHROUGH_TARGET = 5.0
BAKE_TARGET = 0.85
PICTURES = 100_000
"""Fewer make a run small: no bar is about it."""
INDEX_SAMPLES = 3_000_000
RATE_HEADER = ("contender", "img/s", *SAMPLES_HEADER, "CPU us/img")
PART_HEADER = ("part", "s", "us/img")
CODE = "codec only"
"""Contender's name of the pictures' coding alone."""
ENCODINGS = (Encoding.PNG, Encoding.parse("webp-lossless"))
_SMALL_VAL_FRACTION = 0.5  # so that neither split of a small run is empty


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        pictures: In the database that is passed through.
        repeats: Timed calls of each.
        workers: Processes.
        folder: Where everything is written.
        index_samples: Of the large index.
        json: Where to write all samples; None: nowhere.
        peer: Who else writes.
    """

    pictures: int
    repeats: int
    workers: int
    folder: Path
    index_samples: int
    json: Path | None
    peer: LibraryPeer = WEBDATASET

    @property
    def small(self) -> bool:
        """Whether no bar is about this run."""
        return self.pictures < PICTURES

    @property
    def large(self) -> int:
        """How many pictures are coded anew: enough that starting a process does not decide."""
        return max(24, self.workers * self.pictures // 100)

    @property
    def val_fraction(self) -> float | None:
        """Of the builds; None: their default."""
        return _SMALL_VAL_FRACTION if self.small else None

    def bar_name(self, name: str) -> str:
        """The bar's name: tells a small run's numbers from those that count."""
        return f"small-{name}" if self.small else name


class DataBuildResult(Document):
    """The JSON file.

    Attributes:
        settings: The options it ran with.
        environment: Where it ran.
        source: Where the peer's documentation and code stand.
        missing: Peers that are not installed.
        rates: All raw samples.
        floor: The parts of passing pictures through that nobody can leave out.
        index: The large index.
        loads: The machine during each group of timed calls.
        bars: The claims.
    """

    SCHEMA: ClassVar[str] = "data-build-benchmark/1"

    settings: dict[str, int]
    environment: Environment
    source: str
    missing: list[str]
    rates: list[Rate]
    floor: list[Part]
    index: IndexCosts
    loads: list[Load]
    bars: list[Bar]


class Outcome(Record):
    """Of one group of contenders."""

    rates: list[Rate]
    load: Load
    bar: Bar


def passthrough(options: Options, place: Path) -> tuple[Outcome, list[Part]]:
    """Measure ours and the peer on the same database, and the floor."""
    database, ours, peer = place / "lsun_lmdb", f"{OURS}, source", options.peer
    write_database(database, options.pictures)
    task = Passthrough(database, options.pictures, options.workers, options.val_fraction)
    with Team(nothing, options.workers) as team:
        theirs: dict[str, Callable[[Path], None]] = {}
        if peer.version is not None:
            theirs[peer.name] = task.webdataset
            if options.workers > 1:
                theirs[f"{peer.name} in {team.size} processes"] = partial(task.webdatasets, team)
        task.check(place / "ours", theirs)
        print(f"all wrote the same {options.pictures:,} keys and pictures")
        writers = {ours: task.ours, **theirs}
        measures = {name: measure(write, place / "turn") for name, write in writers.items()}
        rates, load = _turns(measures, options.pictures, options.repeats)
    parts = task.floor(place / "ours")
    name = options.bar_name(f"build-passthrough-{peer.name}")
    if peer.version is None:
        print(f"{peer.name} is not installed: its bar is short")
        bar = missing_bar(name, PASSTHROUGH_TARGET, peer.name)
    else:
        bar = _rate_bar(name, PASSTHROUGH_TARGET, rates[ours], rates[peer.name])
    return Outcome(rates=list(rates.values()), load=load, bar=bar), parts


def bake(options: Options, place: Path) -> Outcome:
    """Measure builds that code pictures anew, and the coding alone."""
    folder = place / "large"
    write_large(folder, options.large)
    measures: dict[str, Measure] = {}
    with Team(partial(InMemory, folder, options.workers), options.workers) as team:
        for encoding in ENCODINGS:
            form = Form(SIZE, Geometry.DDPM_LSUN, encoding, channels=3)
            code_all(team, form, limit=1)  # from here on every process has its pictures and its libraries
            choices = BuildOptions(size=SIZE, encoding=encoding, val_fraction=options.val_fraction)
            build = partial(_bake, folder, choices, options.workers)
            measures[f"{OURS}, {encoding}"] = measure(build, place / "turn")
            measures[f"{CODE}, {encoding}"] = partial(code_all, team, form)
        rates, load = _turns(measures, options.large, options.repeats)
    name, png = options.bar_name("build-bake-codec-only"), ENCODINGS[0]
    bar = _rate_bar(name, BAKE_TARGET, rates[f"{OURS}, {png}"], rates[f"{CODE}, {png}"])
    return Outcome(rates=list(rates.values()), load=load, bar=bar)


def _bake(folder: Path, choices: BuildOptions, workers: int, out: Path) -> None:
    index = built(FolderSource(folder), out, choices, workers)
    assert index.kept == index.rejected == 0, "every picture is coded anew"


def _turns(measures: dict[str, Measure], pictures: int, repeats: int) -> tuple[dict[str, Rate], Load]:
    samples, load = take_turns(list(measures.values()), repeats, own=tree_seconds)
    rates = {
        name: Rate(name=name, pictures=pictures, wall=each.wall, cpu=each.cpu)
        for name, each in zip(measures, samples, strict=True)
    }
    print(table(RATE_HEADER, [rate.row() for rate in rates.values()]))
    return rates, load


def _rate_bar(name: str, target: float, ours: Rate, theirs: Rate) -> Bar:
    measured = f"{ours.name} {ours.per_second:.0f} img/s over {theirs.name} {theirs.per_second:.0f} img/s"
    return ratio_bar(name, target, ours, theirs, measured)


def _print_floor(parts: Sequence[Part], outcome: Outcome, options: Options) -> None:
    """Say how far from the floor everyone is."""
    total = sum(part.seconds for part in parts)
    least = total / options.workers
    rows = [*parts, Part(name="together", seconds=total)]
    print("what nobody can leave out, each part alone on one core:")
    each = 1e6 / options.pictures
    print(table(PART_HEADER, [(row.name, f"{row.seconds:.3f}", f"{each * row.seconds:.1f}") for row in rows]))
    print(f"over {options.workers} cores: {least:.3f} s, {options.pictures / least:.0f} img/s")
    for rate in outcome.rates:
        print(f"{rate.name}: {rate.median / least:.2f} times that")


def run(options: Options) -> DataBuildResult:
    """Measure everything and print it, the bars last.

    Raises:
        ValueError: The peer does not write what we do; then nothing is timed.
    """
    with tempfile.TemporaryDirectory(prefix="data-build-", dir=options.folder) as made:
        place = Path(made)
        with scratch_below(place):
            passed, parts = passthrough(options, place)
            _print_floor(parts, passed, options)
            baked = bake(options, place)
        index = index_costs(options.index_samples, max(1, options.index_samples // 3), place / "index")
    print(index.line())
    peer = options.peer
    result = DataBuildResult(
        settings={
            "pictures": options.pictures,
            "large_pictures": options.large,
            "repeats": options.repeats,
            "workers": options.workers,
            "shard_bytes": BuildOptions().shard_bytes,
        },
        environment=environment((peer.distribution, "lmdb", "pillow", "numpy", "google-crc32c")),
        source=peer.source,
        missing=[] if peer.version is not None else [peer.name],
        rates=[*passed.rates, *baked.rates],
        floor=parts,
        index=index,
        loads=[passed.load, baked.load],
        bars=[passed.bar, baked.bar],
    )
    finish(result, options.json)
    return result


def read(arguments: Sequence[str] | None = None) -> Options:
    """Read the command line; default: the process's."""
    cores = os.cpu_count() or 1
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data_build", description=__doc__)
    add = parser.add_argument
    add("--pictures", type=int, default=PICTURES, metavar="N", help=f"default {PICTURES}")
    add("--repeats", type=int, default=5, metavar="N", help="timed calls of each (default 5)")
    add("--workers", type=int, default=cores, metavar="N", help="processes (default: one for each core)")
    add(
        "--folder",
        type=Path,
        default=Path(tempfile.gettempdir()),
        metavar="DIR",
        help="where everything is written and removed again, about 60 kB for each picture (default TMPDIR); "
        "one in memory, a tmpfs such as /dev/shm, keeps the disk out of the measurement",
    )
    add("--index-samples", type=int, default=INDEX_SAMPLES, metavar="N", help=f"default {INDEX_SAMPLES}")
    add("--json", type=Path, metavar="FILE", help="write all samples here")
    found = parser.parse_args(arguments)
    if min(found.pictures, found.repeats, found.workers, found.index_samples) < 1:
        parser.error("every N must be at least 1")
    if not found.folder.is_dir():
        parser.error(f"--folder {found.folder}: no such folder")
    return Options(**vars(found))


def main(arguments: Sequence[str] | None = None) -> DataBuildResult:
    """Run the benchmark.

    Args:
        arguments: Of the command line; default: the process's.

    Returns:
        What was measured.
    """
    return run(read(arguments))
