"""For how long a checkpoint stops training, and what it costs training that goes on meanwhile."""

import gc
import shutil
import statistics
import time
from pathlib import Path
from typing import Final

import torch

from benchmarks.checkpoint.training import Publishing, Training
from benchmarks.harness import Load, Record, Samples, take_turns, timed
from benchmarks.peers import deepspeed_checkpoint
from trainer.distributed import Ranks
from trainer.manifest import Manifest
from trainer.parts import read_part
from trainer.recipe import Recipe

WARM_UP_STEPS: Final = 3
UNDISTURBED_STEPS: Final = 10
"""Of each turn."""
_AFTER_STEPS: Final = 3
"""After a checkpoint is published: what it leaves behind costs time, too."""


class Episode(Record):
    """One checkpoint of ours and the steps from its beginning until after its end.

    Attributes:
        stall: Wall seconds for which training stood still.
        steps: Wall seconds of each step since.
        published: Wall seconds from the beginning to the step boundary at which it was seen to be published.
        cpu: Processor seconds of all of it, all threads.
    """

    stall: float
    steps: list[float]
    published: float
    cpu: float


class Stall(Record):
    """All samples of one process.

    Attributes:
        parameters: Of the network.
        compared: Numbers of which both checkpoints were found to hold the same.
        undisturbed: By turn, wall seconds of each step with no checkpoint on its way.
        undisturbed_cpu: By turn, processor seconds of a step.
        ours: Our checkpoints.
        deepspeed: DeepSpeed's, each timed whole.
        our_bytes: Of the files of one of ours.
        deepspeed_bytes: Of one of theirs.
        load: The machine meanwhile.
    """

    parameters: int
    compared: int
    undisturbed: list[list[float]]
    undisturbed_cpu: list[float]
    ours: list[Episode]
    deepspeed: Samples
    our_bytes: int
    deepspeed_bytes: int
    load: Load

    @property
    def step(self) -> float:
        """Median wall seconds of an undisturbed step."""
        return statistics.median(second for turn in self.undisturbed for second in turn)

    @property
    def stalls(self) -> list[float]:
        """For how long each of our checkpoints stopped training."""
        return [episode.stall for episode in self.ours]

    @property
    def slowdowns(self) -> list[float]:
        """By how much the steps beside each took longer than undisturbed ones in all; never below 0."""
        return [max(0.0, sum(each.steps) - len(each.steps) * self.step) for each in self.ours]

    @property
    def costs(self) -> list[float]:
        """What each of our checkpoints took of training's wall time."""
        return [stall + slow for stall, slow in zip(self.stalls, self.slowdowns, strict=True)]

    @property
    def cpus(self) -> list[float]:
        """Processor seconds of each of our checkpoints, those of the steps beside it taken off."""
        step = statistics.median(self.undisturbed_cpu)
        return [episode.cpu - len(episode.steps) * step for episode in self.ours]


class Contest:
    """The contenders of one process, which save the same training's state.

    Args:
        training: The training.
        folder: Where they write.
    """

    def __init__(self, training: Training, folder: Path) -> None:
        self._training, self._theirs = training, folder / "deepspeed"
        self._publishing = Publishing(training, str(folder / "ours"))
        self.undisturbed_steps: list[list[float]] = []
        self.undisturbed_cpu: list[float] = []
        self.episodes: list[Episode] = []
        self.our_bytes = self.deepspeed_bytes = 0

    def compare(self) -> int:
        """Save one moment both ways; return how many numbers are the same.

        Raises:
            ValueError: The checkpoints do not hold the same: then timings would compare nothing.
        """
        training = self._training
        self._publishing.publish()
        manifest = self._published()
        self._save_theirs("compared")
        self.our_bytes = sum(entry.bytes for entry in manifest.files)
        self.our_bytes += manifest.checksums.bytes if manifest.checksums is not None else 0
        self.deepspeed_bytes = deepspeed_checkpoint.size(self._theirs, "compared")
        theirs = deepspeed_checkpoint.held(self._theirs, "compared")
        ours = {role: self._parts(manifest, role) for role in ("state", "weights")}
        count = compare_state(training, ours["state"], theirs) + compare_weights(ours["weights"], theirs)
        self._remove(manifest)
        shutil.rmtree(self._theirs)
        return count

    def undisturbed(self) -> tuple[float, float]:
        """Take some steps; return wall and processor seconds of one."""
        steps: list[float] = []
        wall, cpu = timed(lambda: steps.extend(self._step() for _ in range(UNDISTURBED_STEPS)))
        self.undisturbed_steps.append(steps)
        self.undisturbed_cpu.append(cpu / len(steps))
        return wall / len(steps), cpu / len(steps)

    def ours(self) -> tuple[float, float]:
        """Publish a checkpoint while training goes on; return wall and processor seconds of all of it."""
        writer, job = self._publishing.writer, self._publishing.job()
        stall, steps, published = 0.0, list[float](), 0.0

        def episode() -> None:
            nonlocal stall, published
            began = time.perf_counter()
            writer.start(job)
            stall = time.perf_counter() - began
            after = 0
            while after < _AFTER_STEPS and not writer.has_failed:
                if writer.published is not None and writer.published.name == job.draft.name:
                    published = published or time.perf_counter() - began
                    after += 1
                steps.append(self._step())

        wall, cpu = timed(episode)
        self._publishing.wait()
        self.episodes.append(Episode(stall=stall, steps=steps, published=published, cpu=cpu))
        self._remove(self._published())
        return wall, cpu

    def deepspeed(self) -> tuple[float, float]:
        """Let DeepSpeed save; return wall and processor seconds."""
        taken = timed(lambda: self._save_theirs("timed"))
        shutil.rmtree(self._theirs)
        return taken

    def _step(self) -> float:
        began = time.perf_counter()
        self._training.step()
        return time.perf_counter() - began

    def _save_theirs(self, tag: str) -> None:
        deepspeed_checkpoint.save(self._training.deepspeed, self._theirs, tag, self._training.ema.flats)

    def _published(self) -> Manifest:
        published = self._publishing.writer.published
        assert published is not None, "it was waited for"
        return published

    def _parts(self, manifest: Manifest, role: str) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for entry in manifest.files:
            if entry.role == role:
                found |= read_part(self._publishing.run, manifest, entry)
        return found

    def _remove(self, manifest: Manifest) -> None:
        """Retention would keep the files for a while: the place is to be as empty for everyone."""
        self._publishing.run.storage.delete_folder(f"checkpoints/{manifest.name}")


def compare_state(
    training: Training, ours: dict[str, torch.Tensor], theirs: deepspeed_checkpoint.Held
) -> int:
    """Compare masters, moments and averages; return how many numbers there are.

    Args:
        training: Whose they are.
        ours: Our state part, all of it.
        theirs: What DeepSpeed's files hold.

    Raises:
        ValueError: They differ, or one of them holds more.
    """
    left, count = dict(ours), 0
    for piece in training.engine.partition.pieces:
        place = slice(piece.offset, piece.offset + piece.stop - piece.start)
        for role, flats in theirs.roles.items():
            key = f"{role}/{piece.parameter}:{piece.start}:{piece.stop}"
            mine = left.pop(key, None)
            if mine is None or not torch.equal(mine, flats[piece.span][place]):
                raise ValueError(f"DeepSpeed's checkpoint and ours hold different numbers of {key}")
            count += mine.numel()
    if left:
        raise ValueError(f"ours holds what DeepSpeed's does not: {', '.join(list(left)[:3])}")
    return count


def compare_weights(ours: dict[str, torch.Tensor], theirs: deepspeed_checkpoint.Held) -> int:
    """Compare the network's own weights as `compare_state` does."""
    if ours.keys() - theirs.weights.keys():
        raise ValueError("DeepSpeed's checkpoint lacks some of the network's weights")
    for name, mine in ours.items():
        if not torch.equal(mine, theirs.weights[name]):
            raise ValueError(f"DeepSpeed's checkpoint and ours hold different weights of {name}")
    return sum(tensor.numel() for tensor in ours.values())


def measure_stall(recipe: Recipe, ranks: Ranks, folder: Path, repeats: int) -> Stall:
    """Compare, then time everyone in turns.

    Raises:
        ValueError: As `Contest.compare`.
    """
    training = Training(recipe, ranks)
    for _ in range(WARM_UP_STEPS):
        training.step()
    contest = Contest(training, folder)
    compared = contest.compare()
    gc.collect()
    turns = (contest.undisturbed, contest.ours, contest.deepspeed)
    samples, load = take_turns(turns, repeats)
    return Stall(
        parameters=sum(shape.numel() for shape in training.shapes.values()),
        compared=compared,
        undisturbed=contest.undisturbed_steps,
        undisturbed_cpu=contest.undisturbed_cpu,
        ours=contest.episodes,
        deepspeed=samples[2],
        our_bytes=contest.our_bytes,
        deepspeed_bytes=contest.deepspeed_bytes,
        load=load,
    )
