"""Pictures to features and moments: ours and the peers', compared first, then in turns."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from benchmarks.evaluation.clock import NetworkClock
from benchmarks.evaluation.contenders import PEERS, Contender, candidates, our_distance, ours
from benchmarks.evaluation.pictures import PictureSet
from benchmarks.harness import OURS, SAMPLES_HEADER, Load, Record, Samples, take_turns, timed, tree_seconds
from benchmarks.peers.clean_fid import CLEAN_FID
from benchmarks.peers.torch_fidelity import TORCH_FIDELITY
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
        resize: The same for the resize, as far as this process does it.
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


def measure_extraction(place: Path, pictures: int, repeats: int, *, small: bool) -> Extraction:
    """Try the peers' configurations, compare their answers with ours, and time the fastest.

    Args:
        place: Folder for the pictures' files.
        pictures: Of one timed call.
        repeats: Timed calls of each.
        small: Take a small network and fewer configurations, to try the benchmark out.

    Raises:
        ValueError: A peer's answer differs from ours; then nothing is timed.
    """
    found = Extraction(missing=[peer.name for peer in PEERS if peer.version is None])
    tried = min(pictures, _TRIED)
    with NetworkClock(small=small) as clock:
        us = ours(clock)
        peers = candidates(clock, [peer for peer in PEERS if peer.version is not None], few=small)
        tries = 1 if small else _TRIALS
        chosen = _best(peers, PictureSet.write(place / "tried", tried), tries, found.trials)
        checked = min(pictures, _CHECKED)
        first = PictureSet.write(place / "first", checked)
        second = PictureSet.write(place / "second", checked, skip=checked)
        found.agreements = check(us, chosen, first, second)
        for agreement in found.agreements:
            print(agreement.line())
        timed_set = PictureSet.write(place / "timed", pictures)
        everyone = [us, *chosen]
        turns = [_Turns(contender, timed_set, clock) for contender in everyone]
        samples, load = take_turns([each.take for each in turns], repeats, own=tree_seconds)
    found.times = [each.times(own) for each, own in zip(turns, samples, strict=True)]
    found.loads.append(load)
    print(table(TIMES_HEADER, [times.row() for times in found.times]))
    return found


def _best(
    peers: Sequence[Contender], pictures: PictureSet, tries: int, trials: list[Trial]
) -> list[Contender]:
    """Return each peer's fastest configuration without worker processes, and its fastest one with some.

    Both, because few pictures would decide against the workers, who have to be started first.
    """
    seconds: dict[str, float] = {}
    for contender in peers:
        run = partial(contender.moments, pictures)
        wall = min(timed(run)[0] for _ in range(tries))
        seconds[contender.name] = wall
        trials.append(Trial(contender=contender.name, wall=wall))
        print(f"tried {contender.name}: {len(pictures.images) / wall:.1f} img/s")
    found: list[Contender] = []
    for peer in PEERS:
        for workers in (False, True):
            of_kind = [each for each in peers if each.peer is peer and each.workers is workers]
            if of_kind:
                found.append(min(of_kind, key=lambda contender: seconds[contender.name]))
    return found


def check(
    us: Contender, others: Sequence[Contender], first: PictureSet, second: PictureSet
) -> list[Agreement]:
    """Compare features and distances with ours.

    Raises:
        ValueError: They differ by more than rounding explains.
    """
    ours_found = [us.features(pictures) for pictures in (first, second)]
    ours_distance = us.distance(first, second)
    agreements = []
    for contender in others:
        assert contender.peer is not None, "ours is not compared with itself"
        theirs = [contender.features(pictures) for pictures in (first, second)]
        pairs = [(a.features, b.features) for a, b in zip(theirs, ours_found, strict=True)]
        difference = max(float(np.abs(a - b).max()) for a, b in pairs if a is not None and b is not None)
        agreement = Agreement(
            contender=contender.name,
            version=contender.peer.version or "not installed",
            source=contender.peer.source,
            features=difference,
            scale=max(float(np.abs(b).max()) for _, b in pairs if b is not None),
            distance=contender.distance(first, second),
            ours=ours_distance,
            same_features=abs(our_distance(*theirs) / ours_distance - 1),
        )
        same = agreement.features <= FEATURES_ATOL and agreement.same_features <= SAME_FEATURES_RTOL
        if not (same and agreement.relative <= DISTANCE_RTOL):
            raise ValueError(f"{agreement.line()}: nothing was timed, as it computes something else")
        agreements.append(agreement)
    return agreements


class _Turns:
    """One contender's turns, with the clock beside them."""

    def __init__(self, contender: Contender, pictures: PictureSet, clock: NetworkClock) -> None:
        self._contender, self._pictures, self._clock = contender, pictures, clock
        self._network: list[float] = []
        self._resize: list[float] = []

    def take(self) -> tuple[float, float]:
        """Make one call; return its wall and processor seconds, those of worker processes included."""
        self._clock.restart()
        seconds = timed(partial(self._contender.moments, self._pictures), tree_seconds)
        self._network.append(self._clock.on_network.seconds)
        self._resize.append(self._clock.on_resize.seconds)
        return seconds

    def times(self, samples: Samples) -> FeatureTimes:
        """Return the samples with what the clock showed."""
        return FeatureTimes(
            wall=samples.wall,
            cpu=samples.cpu,
            name=self._contender.name,
            pictures=len(self._pictures.images),
            network=self._network,
            resize=self._resize,
            in_process=self._contender.in_process,
        )
