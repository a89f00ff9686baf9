"""What each rank reads of a checkpoint that another layout wrote: in the ranks, and where they are asked."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.checkpoint.crew import Crew
from benchmarks.checkpoint.training import Job, Publishing, Training
from benchmarks.harness import Record
from data_pipeline.storage import Storage
from trainer.checkpoint import newest_whole
from trainer.distributed import Ranks
from trainer.recipe import Recipe
from trainer.restore import load_state, read_weights
from trainer.run import Run

WRITERS: Final = 2
"""Ranks that write."""
WRITTEN: Final = (1, 3)
"""ZeRO stages at which they do."""
READERS: Final = ((3, 1), (3, 3), (1, 1))
"""Ranks that load, and at which ZeRO stage (of a single one the trainer makes stage 0)."""
READ_HEADER: Final = ("written by", "read by", "MB in all", "MB of each rank", "largest / share")
"""Columns of `Transition.row`."""
_STEPS: Final = 2
"""Before writing: moments and averages are numbers of their own then."""

Fingerprint = dict[str, int]
"""By role, the sum of the bits of all of its numbers, read as integers: the same in every layout."""


class Written(Record):
    """A checkpoint.

    Attributes:
        part_bytes: Bytes of all of its parts together.
        fingerprint: Of the state that it is to hold, of all ranks together.
    """

    part_bytes: int
    fingerprint: Fingerprint


class Read(Record):
    """What one rank loaded.

    Attributes:
        bytes: That it asked the storage for and got.
        fingerprint: Of the state that was loaded, of all ranks together; "weights" among its roles.
    """

    bytes: int
    fingerprint: Fingerprint


class Layout(Record):
    """So many ranks at a ZeRO stage."""

    ranks: int
    stage: int

    def __str__(self) -> str:
        return f"{self.ranks} rank{'s' if self.ranks > 1 else ''}, ZeRO {self.stage}"


class Transition(Record):
    """A checkpoint of one layout loaded into another.

    Attributes:
        writer: Who wrote it.
        reader: Who loaded it.
        part_bytes: Bytes of all of its parts together.
        read: Bytes that each rank read.
    """

    writer: Layout
    reader: Layout
    part_bytes: int
    read: list[int]

    @property
    def share(self) -> float:
        """The largest of what the ranks read over an equal share of all parts, which somebody must verify."""
        return max(self.read) * self.reader.ranks / self.part_bytes

    def row(self) -> tuple[str, ...]:
        """The cells of `READ_HEADER`."""
        each = " ".join(f"{count / 1e6:.1f}" for count in self.read)
        whole = f"{self.part_bytes / 1e6:.1f}"
        return str(self.writer), str(self.reader), whole, each, f"{self.share:.3f}"


def write(recipe: Recipe, ranks: Ranks, url: str) -> Written:
    """Train a little and publish a checkpoint, on a rank of those that write."""
    training = Training(recipe, ranks)
    for _ in range(_STEPS):
        training.step()
    publishing = Publishing(training, url)
    publishing.publish()
    manifest = ranks.on_main(lambda: newest_whole(publishing.run))
    assert manifest is not None, "it was waited for"
    found = Written(
        part_bytes=sum(entry.bytes for entry in manifest.files), fingerprint=_fingerprint(training)
    )
    publishing.writer.close()
    training.engine.close()
    return found


def read(recipe: Recipe, ranks: Ranks, url: str) -> Read:
    """Load the newest checkpoint of a run as the trainer does, on a rank of those that load."""
    with counted() as count:
        run = Run(url)
        manifest = ranks.on_main(lambda: newest_whole(run))
        assert manifest is not None, "it was written before"
        weights = read_weights(run, manifest, ranks)
        training = Training(recipe.for_ranks(ranks.world), ranks, weights)
        load_state(run, manifest, training.engine.partition.targets(training.ema.flats), ranks)
    fingerprint = {**_fingerprint(training), "weights": sum(map(_bits, weights.values()))}
    training.engine.close()
    return Read(bytes=count(), fingerprint=fingerprint)


@contextlib.contextmanager
def counted() -> Iterator[Callable[[], int]]:
    """Count the bytes that any storage of this process hands out meanwhile, whoever asks, on any thread."""
    lock, total = threading.Lock(), 0

    def counting(operation: Callable[..., bytes]) -> Callable[..., bytes]:
        def counting_operation(storage: Storage, *arguments: Any) -> bytes:
            nonlocal total
            data = operation(storage, *arguments)
            with lock:
                total += len(data)
            return data

        return counting_operation

    with (
        patch.object(Storage, "read", counting(Storage.read)),
        patch.object(Storage, "read_range", counting(Storage.read_range)),
    ):
        yield lambda: total


def measure_reading(job: Job, threads: int, place: Path) -> list[Transition]:
    """Write the checkpoints, and load each into every other layout.

    Args:
        job: What to train.
        threads: Of torch, of all ranks together.
        place: Folder for runs and logs.

    Raises:
        ValueError: What was loaded is not what was saved.
    """
    written = {}
    with Crew(job, WRITERS, threads, place) as crew:
        for stage in WRITTEN:
            written[stage] = Written.model_validate(crew.ask("write", url=_url(place, stage), stage=stage)[0])
    found = []
    for ranks in dict.fromkeys(ranks for ranks, _ in READERS):
        with Crew(job, ranks, threads, place) as crew:
            for stage in (stage for readers, stage in READERS if readers == ranks):
                for writer, checkpoint in written.items():
                    answers = crew.ask("read", url=_url(place, writer), stage=stage)
                    reads = [Read.model_validate(each) for each in answers]
                    reader = Layout(ranks=ranks, stage=stage if ranks > 1 else 0)
                    transition = Transition(
                        writer=Layout(ranks=WRITERS, stage=writer),
                        reader=reader,
                        part_bytes=checkpoint.part_bytes,
                        read=[each.bytes for each in reads],
                    )
                    check(transition, checkpoint, reads)
                    found.append(transition)
    return found


def check(transition: Transition, written: Written, reads: list[Read]) -> None:
    """See whether all ranks hold what was saved.

    Raises:
        ValueError: They do not: then it says nothing how little they read.
    """
    wanted = {**written.fingerprint, "weights": written.fingerprint["master"]}
    for each in reads:
        if each.fingerprint != wanted:
            raise ValueError(
                f"{transition.reader} loaded something else than {transition.writer} saved: "
                f"{each.fingerprint} instead of {wanted}"
            )


def _url(place: Path, stage: int) -> str:
    return str(place / f"zero-{stage}")


def _fingerprint(training: Training) -> Fingerprint:
    """Of the state of all ranks; all call this together."""
    mine: Fingerprint = {}
    for piece in training.engine.partition.slices(training.ema.flats):
        _add(mine, piece.tensors)
    roles = sorted(mine)
    total = training.ranks.total(torch.tensor([mine[role] for role in roles], dtype=torch.int64))
    return dict(zip(roles, map(int, total), strict=True))


def _add(fingerprint: Fingerprint, tensors: Mapping[str, Tensor]) -> None:
    for role, tensor in tensors.items():
        fingerprint[role] = fingerprint.get(role, 0) + _bits(tensor)


def _bits(tensor: Tensor) -> int:
    return int(tensor.detach().contiguous().view(torch.int32).sum(dtype=torch.int64))
