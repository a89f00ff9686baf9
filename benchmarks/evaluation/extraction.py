"""Pictures to features and moments: ours and the peers', compared first, then timed in turns."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from benchmarks.evaluation.contenders import OUR_CONFIGURATION, PEERS, Features, our_distance
from benchmarks.evaluation.job import Call, Configuration, FeatureJob
from benchmarks.evaluation.pictures import PictureSet
from benchmarks.harness import OURS, SAMPLES_HEADER, Load, Record, Samples, take_turns, tree_seconds
from benchmarks.peers.clean_fid import CLEAN_FID
from benchmarks.peers.torch_fidelity import TORCH_FIDELITY
from benchmarks.process import AnsweringCrew, AnsweringProcess
from benchmarks.report import Bar, missing_bar, ratio_bar, table

TARGETS: Final = {CLEAN_FID.name: 1.05, TORCH_FIDELITY.name: 1.0}
"""Least ratio of their seconds for features and moments to ours."""
REST_TARGET: Final = 3.0
"""Least ratio of their seconds outside network and resize to ours."""
FEATURES_ATOL: Final = 2e-4
"""Largest difference of a feature that another batch size explains; see docs/benchmarks.md."""
SAME_FEATURES_RTOL: Final = 1e-6
"""Largest relative difference of our distance of their features from that of ours."""
DISTANCE_RTOL: Final = 1e-5
"""The same for their own distance. Of few pictures covariances are rank-deficient, and theirs takes the
roots of rounding errors: about 1e-6 of the distance. `distances` compares the functions at full rank."""
TIMES_HEADER: Final = (
    "features and moments",
    "img/s",
    *SAMPLES_HEADER,
    "network s",
    "resize s",
    "rest ms",
)
"""Columns of `FeatureTimes.row`."""
_CHECKED: Final = 64
_TRIED: Final = 64
_TRIALS: Final = 2


class Agreement(Record):
    """A peer's answer beside ours, before anything is timed.

    Attributes:
        contender: Who, and how it runs.
        version: Of its distribution.
        source: Where its documentation stands.
        features: Largest absolute difference of a feature from ours.
        scale: Largest absolute feature.
        distance: Its Fréchet distance of two sets of pictures, by its documented call.
        ours: Our distance of the same pictures.
        same_features: Relative difference of our distance of its features from our distance.
    """

    contender: str
    version: str
    source: str
    features: float
    scale: float
    distance: float
    ours: float
    same_features: float

    @property
    def relative(self) -> float:
        """Relative difference of the distances."""
        return abs(self.distance / self.ours - 1)

    def line(self) -> str:
        """One line for the reader."""
        return (
            f"{self.contender} ({self.version}): features differ from ours by {self.features:.1e} of "
            f"{self.scale:.2f}; distance {self.distance:.6f}, ours {self.ours:.6f}, relatively "
            f"{self.relative:.1e} ({self.same_features:.1e} by our formula)"
        )


class Trial(Record):
    """A configuration that was tried.

    Attributes:
        contender: Whose, and how it runs.
        wall: Wall seconds of a few pictures, the best of two tries.
    """

    contender: str
    wall: float


class FeatureTimes(Samples):
    """The samples of a contender.

    Attributes:
        name: Who, and how it runs.
        pictures: Of one call.
        network: Wall seconds inside the network in each call.
        resize: The same for the resize, as far as its first process does it.
        in_process: Whether it does all of it.
    """

    name: str
    pictures: int
    network: list[float]
    resize: list[float]
    in_process: bool

    @property
    def rest(self) -> Samples:
        """The samples with the seconds outside network and resize in place of the wall seconds."""
        wall = [a - b - c for a, b, c in zip(self.wall, self.network, self.resize, strict=True)]
        return Samples(wall=wall, cpu=self.cpu)

    def row(self) -> tuple[str, ...]:
        """The cells of `TIMES_HEADER`."""
        inside = [f"{float(np.median(each)):.3f}" for each in (self.network, self.resize)]
        rest = f"{1e3 * self.rest.median:.1f}"
        if not self.in_process:
            inside[1], rest = "elsewhere", "-"
        return self.name, f"{self.pictures / self.median:.1f}", *self.cells(), *inside, rest


@dataclass
class Extraction:
    """What was measured."""

    missing: list[str] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)
    agreements: list[Agreement] = field(default_factory=list)
    times: list[FeatureTimes] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)

    def bars(self) -> list[Bar]:
        """Judge; nothing if nothing was measured."""
        if not self.times:
            return []
        ours = self._of(OURS)[0]
        found = []
        for peer, target in TARGETS.items():
            theirs = self._of(peer)
            name, rest = f"evaluation-features-{peer}", f"evaluation-rest-{peer}"
            if not theirs:
                found += [missing_bar(name, target, peer), missing_bar(rest, REST_TARGET, peer)]
                continue
            fastest = min(theirs, key=lambda times: times.median)
            found.append(ratio_bar(name, target, ours, fastest, _over(fastest, ours)))
            leanest = min((each for each in theirs if each.in_process), key=lambda each: each.rest.median)
            found.append(ratio_bar(rest, REST_TARGET, ours.rest, leanest.rest, _rest_over(leanest, ours)))
        return found

    def _of(self, name: str) -> list[FeatureTimes]:
        """One contender's samples, in each of its configurations."""
        return [times for times in self.times if times.name.partition(",")[0] == name]


def _over(theirs: FeatureTimes, ours: FeatureTimes) -> str:
    return f"{theirs.name} {theirs.median:.3f} s over {ours.name} {ours.median:.3f} s"


def _rest_over(theirs: FeatureTimes, ours: FeatureTimes) -> str:
    return (
        f"outside network and resize: {theirs.name} {1e3 * theirs.rest.median:.1f} ms over "
        f"{ours.name} {1e3 * ours.rest.median:.1f} ms"
    )


def measure_extraction(place: Path, pictures: int, repeats: int, threads: int, *, small: bool) -> Extraction:
    """Try the peers' configurations, compare their answers with ours, and time the fastest.

    Everyone has a process, which waits while others have their turn.

    Args:
        place: Folder for the pictures' files and the processes' logs.
        pictures: Of one timed call.
        repeats: Timed calls of each.
        threads: Of everyone's arithmetic.
        small: Take a small network and fewer configurations, to try the benchmark out.

    Raises:
        ValueError: A peer's answer differs from ours; then nothing is timed.
    """
    found = Extraction(missing=[peer.name for peer in PEERS if peer.version is None])
    start = partial(_process, place, threads=threads, small=small)
    PictureSet.write(place / "tried", min(pictures, _TRIED))
    chosen = [OUR_CONFIGURATION]
    for peer in PEERS:
        if peer.version is not None:
            with start(peer.name, peer.name) as process:
                chosen += _best(process, place / "tried", 1 if small else _TRIALS, found.trials)
    checked = min(pictures, _CHECKED)
    pair = [place / "first", place / "second"]
    for number, folder in enumerate(pair):
        PictureSet.write(folder, checked, skip=number * checked)
    PictureSet.write(place / "timed", pictures)
    with AnsweringCrew([start(each.contender, each.name) for each in chosen]) as crew:
        turns = [
            _Turns(process, each, pictures, place / "timed")
            for process, each in zip(crew.processes, chosen, strict=True)
        ]
        ours, *others = [each.answer(pair, place / "features.npy") for each in turns]
        found.agreements = check(ours, others)
        for agreement in found.agreements:
            print(agreement.line())
        samples, load = take_turns([each.take for each in turns], repeats, own=tree_seconds)
    found.times = [each.times(own) for each, own in zip(turns, samples, strict=True)]
    found.loads.append(load)
    print(table(TIMES_HEADER, [times.row() for times in found.times]))
    return found


def _process(place: Path, contender: str, name: str, *, threads: int, small: bool) -> AnsweringProcess:
    """A process to be entered: its allocator, threads and caches are nobody else's."""
    job = FeatureJob(contender=contender, threads=threads, small=small)
    return AnsweringProcess(
        "benchmarks.evaluation.worker",
        name,
        job.model_dump_json(),
        {"CUDA_VISIBLE_DEVICES": ""},
        place / f"{name}.log",
    )


def _call(process: AnsweringProcess, configuration: Configuration, folder: Path) -> Call:
    return Call.model_validate(process.ask("call", name=configuration.name, folder=str(folder)))


def _best(process: AnsweringProcess, folder: Path, tries: int, trials: list[Trial]) -> list[Configuration]:
    """Return a peer's fastest configuration without worker processes, and its fastest one with some.

    Both, because few pictures would decide against the workers, who have to be started first.
    """
    tried: dict[bool, list[tuple[float, Configuration]]] = {False: [], True: []}
    for each in map(Configuration.model_validate, process.ask("configurations")):
        wall = min(_call(process, each, folder).wall for _ in range(tries))
        tried[each.workers].append((wall, each))
        trials.append(Trial(contender=each.name, wall=wall))
        print(f"tried {each.name}: {wall:.3f} s")
    return [min(of_kind, key=lambda pair: pair[0])[1] for of_kind in tried.values() if of_kind]


@dataclass(frozen=True)
class Answer:
    """What somebody made of two sets of pictures.

    Attributes:
        configuration: Who, and how it runs.
        features: [2, N, d], both sets'.
        distance: Theirs, asked for as one asks for it.
    """

    configuration: Configuration
    features: Features
    distance: float


def check(ours: Answer, others: Sequence[Answer]) -> list[Agreement]:
    """Compare features and distances with ours.

    Raises:
        ValueError: They differ by more than rounding explains.
    """
    agreements = []
    for theirs in others:
        peer = next(each for each in PEERS if each.name == theirs.configuration.contender)
        agreement = Agreement(
            contender=theirs.configuration.name,
            version=peer.version or "not installed",
            source=peer.source,
            features=float(np.abs(theirs.features - ours.features).max()),
            scale=float(np.abs(ours.features).max()),
            distance=theirs.distance,
            ours=ours.distance,
            same_features=abs(our_distance(*theirs.features) / ours.distance - 1),
        )
        same = agreement.features <= FEATURES_ATOL and agreement.same_features <= SAME_FEATURES_RTOL
        if not (same and agreement.relative <= DISTANCE_RTOL):
            raise ValueError(f"{agreement.line()}: nothing was timed, as it computes something else")
        agreements.append(agreement)
    return agreements


class _Turns:
    """One contender's turns in its process."""

    def __init__(
        self, process: AnsweringProcess, configuration: Configuration, pictures: int, folder: Path
    ) -> None:
        self._process, self._configuration = process, configuration
        self._pictures, self._folder = pictures, folder
        self._calls: list[Call] = []

    def answer(self, folders: Sequence[Path], out: Path) -> Answer:
        """Let it make features of two sets of pictures, by way of a file, and their distance."""
        asked = {"folders": [str(folder) for folder in folders], "out": str(out)}
        distance = self._process.ask("answer", name=self._configuration.name, **asked)
        return Answer(self._configuration, np.load(out), distance)

    def take(self) -> tuple[float, float]:
        """Let it make one call; return its wall and processor seconds, those of worker processes included."""
        self._calls.append(_call(self._process, self._configuration, self._folder))
        return self._calls[-1].wall, self._calls[-1].cpu

    def times(self, samples: Samples) -> FeatureTimes:
        """Return the samples with what the clock showed."""
        return FeatureTimes(
            wall=samples.wall,
            cpu=samples.cpu,
            name=self._configuration.name,
            pictures=self._pictures,
            network=[call.network for call in self._calls],
            resize=[call.resize for call in self._calls],
            in_process=self._configuration.in_process,
        )
