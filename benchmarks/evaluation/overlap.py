"""Sampling with the features of the chunk before beside it, and one after the other."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import torch

from benchmarks.evaluation.projection import ProjectionFeatures
from benchmarks.harness import SAMPLES_HEADER, Load, Samples, take_turns, timed
from benchmarks.report import Bar, ratio_bar, table
from eval.features import FeatureNetwork, open_network, parse_choice
from eval.sampling import SamplerSettings, sample_chunk
from eval.statistics import Job, Statistics, accumulate
from eval.team import Team
from tests.support import make_run
from trainer.recipe_evaluation import SamplerName
from trainer.weights import Loaded, load_for_inference

TARGET: Final = 0.97
"""Least ratio of the seconds in sequence to those overlapped."""
PICTURES: Final = 96
CHUNK: Final = 16
OVERLAP_HEADER: Final = ("sampling and features", *SAMPLES_HEADER, "sampling s", "features s")
_STEPS: Final = 5
OVERRIDES: Final = (
    "image.size=32",
    "image.channels=3",
    "model.base_channels=32",
    "model.norm_groups=8",
    "model.attention_resolutions=[16]",
)
"""Makes of the tiny recipe a network whose sampling takes about as long as the features: the hardest case."""
_SMALL: Final = ("image.channels=3",)


class OverlapTimes(Samples):
    """The samples of one way.

    Attributes:
        overlap: Whether both run at once.
        threads: Of torch.
        sampling: Seconds of the last call spent on sampling, on its own thread.
        features: The same for the features.
    """

    overlap: bool
    threads: int
    sampling: float
    features: float

    @property
    def name(self) -> str:
        """In tables."""
        way = "overlapped" if self.overlap else "in sequence"
        return f"{way}, {self.threads} thread{'' if self.threads == 1 else 's'}"

    def row(self) -> tuple[str, ...]:
        """The cells of `OVERLAP_HEADER`."""
        return self.name, *self.cells(), f"{self.sampling:.3f}", f"{self.features:.3f}"


@dataclass
class Overlap:
    """What was measured."""

    times: list[OverlapTimes] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)

    def bars(self) -> list[Bar]:
        """Judge: one bar for each number of threads."""
        found = []
        for threads in dict.fromkeys(times.threads for times in self.times):
            pair = {times.overlap: times for times in self.times if times.threads == threads}
            ours, sequence = pair[True], pair[False]
            measured = f"{sequence.name} {sequence.median:.3f} s over {ours.name} {ours.median:.3f} s"
            name = f"evaluation-overlap-{threads}-thread{'' if threads == 1 else 's'}"
            found.append(ratio_bar(name, TARGET, ours, sequence, measured))
        return found


class _Evaluation:
    """Sampling and features of one checkpoint, by one number of threads."""

    def __init__(self, place: Path, pictures: int, threads: int, *, small: bool) -> None:
        self._pictures, self._threads = pictures, threads
        self._loaded = _checkpoint(place, small=small)
        self._network = _network(small=small)
        self._team = Team()
        self._last: dict[bool, Statistics] = {}

    def run(self, overlap: bool) -> Statistics:
        """Draw all pictures and accumulate their statistics."""
        image = self._loaded.recipe.image
        settings = SamplerSettings(SamplerName.DDIM, steps=_STEPS, eta=0.0, seed=0, chunk=CHUNK)
        job = Job(
            total=self._pictures,
            chunk=CHUNK,
            shape=(image.size, image.size, image.channels),
            keep=self._pictures,
            overlap=overlap,
        )
        source = partial(sample_chunk, self._loaded, settings=settings, device=torch.device("cpu"))
        with _threads(self._threads):
            self._last[overlap] = accumulate(self._team, self._network, source, job)
        return self._last[overlap]

    def times(self, overlap: bool, samples: Samples) -> OverlapTimes:
        """Return the samples with what the evaluation's own stopwatch says of the last call."""
        spent = self._last[overlap].seconds
        return OverlapTimes(
            wall=samples.wall,
            cpu=samples.cpu,
            overlap=overlap,
            threads=self._threads,
            sampling=spent.pictures,
            features=spent.features,
        )


def measure_overlap(place: Path, pictures: int, repeats: int, threads: int, *, small: bool) -> Overlap:
    """Compare the results bit for bit, then time both ways in turns, by all threads and by one.

    Args:
        place: Folder for the checkpoints.
        pictures: How many are drawn.
        repeats: Timed calls of each.
        threads: Torch's number.
        small: Take small networks.

    Raises:
        ValueError: The results differ; then nothing is timed.
    """
    found = Overlap()
    for number in sorted({threads, 1}, reverse=True):
        evaluation = _Evaluation(place / f"run-{number}", pictures, number, small=small)
        check_same(evaluation.run(True), evaluation.run(False))
        ways = (True, False)
        measures = [partial(timed, partial(evaluation.run, overlap)) for overlap in ways]
        samples, load = take_turns(measures, repeats)
        found.times += [evaluation.times(*each) for each in zip(ways, samples, strict=True)]
        found.loads.append(load)
    print(table(OVERLAP_HEADER, [times.row() for times in found.times]))
    return found


def check_same(a: Statistics, b: Statistics) -> None:
    """See whether pictures, moments and score are equal bit for bit.

    Raises:
        ValueError: They are not.
    """
    pictures = bool((a.first == b.first).all())
    moments = torch.equal(a.moments.mean, b.moments.mean) and torch.equal(
        a.moments.scatter, b.moments.scatter
    )
    if not (pictures and moments and a.score == b.score):
        raise ValueError("overlapped and in sequence give different results; nothing was timed")


def _checkpoint(place: Path, *, small: bool) -> Loaded:
    """A checkpoint with random weights, loaded as the evaluation does."""
    run = make_run(str(place), recipe_overrides=_SMALL if small else OVERRIDES, images_list=(64,))
    return load_for_inference(run, run.checkpoints()[-1], ema="raw", device="cpu")


def _network(*, small: bool) -> FeatureNetwork:
    return ProjectionFeatures(32) if small else open_network(parse_choice("effnetlite0"), torch.device("cpu"))


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
