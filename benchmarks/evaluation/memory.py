"""Resident memory of our evaluation at few and at many pictures, each in a fresh process."""

from pathlib import Path
from typing import Final

from benchmarks.harness import Record
from benchmarks.process import AnsweringCrew, AnsweringProcess
from benchmarks.report import Bar, most_bar, table

TARGET: Final = 1.1
"""Most that the growth at many pictures may be of that at few; ten times the pictures."""
FEW: Final = 1_000
MANY: Final = 10_000
DIM: Final = 2048
MEMORY_HEADER: Final = ("our evaluation", "features kept", "MiB before", "growth MiB")


class Memory(Record):
    """What one process needed.

    Attributes:
        pictures: N.
        kept: Whether the features of all pictures were kept (in a file).
        before: Resident bytes when the network was ready.
        peak: The largest number of resident bytes until the statistics were there.
    """

    pictures: int
    kept: bool
    before: int
    peak: int

    @property
    def growth(self) -> int:
        """Bytes that the evaluation needed on top, at least one page."""
        return max(self.peak - self.before, 4096)

    def row(self) -> tuple[str, ...]:
        """The cells of `MEMORY_HEADER`."""
        mib = [f"{value / 2**20:.1f}" for value in (self.before, self.growth)]
        return f"{self.pictures:,} pictures", "yes" if self.kept else "no", *mib


class MemoryJob(Record):
    """What a process is told.

    Attributes:
        dim: d of its feature network.
        threads: Of torch.
    """

    dim: int = DIM
    threads: int = 1


def measure_memory(place: Path, few: int, many: int, *, kept: tuple[bool, ...]) -> list[Memory]:
    """Let fresh processes evaluate, two at a time: nothing is timed.

    Args:
        place: Folder for their logs.
        few: N of one process.
        many: N of the other.
        kept: Whether features are kept, for each pair.
    """
    found = []
    for keep in kept:
        processes = [
            AnsweringProcess(
                "benchmarks.evaluation.memory_worker",
                f"evaluation of {pictures} pictures",
                MemoryJob().model_dump_json(),
                {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
                place / f"memory-{pictures}-{keep}.log",
            )
            for pictures in (few, many)
        ]
        with AnsweringCrew(processes) as crew:
            for process, pictures in zip(crew.processes, (few, many), strict=True):
                process.tell("evaluate", pictures=pictures, kept=keep)
            found += [Memory.model_validate(process.answer("evaluate")) for process in crew.processes]
    print(table(MEMORY_HEADER, [memory.row() for memory in found]))
    return found


def memory_bars(found: list[Memory]) -> list[Bar]:
    """Judge the growth at many pictures over that at few, without and with features kept."""
    bars = []
    for kept in (False, True):
        pair = sorted((each for each in found if each.kept is kept), key=lambda memory: memory.pictures)
        if pair:
            few, many = pair
            measured = (
                f"growth of {many.growth / 2**20:.1f} MiB at {many.pictures:,} pictures over "
                f"{few.growth / 2**20:.1f} MiB at {few.pictures:,}"
            )
            name = "evaluation-memory-features-kept" if kept else "evaluation-memory"
            bars.append(most_bar(f"{name}-at-most", TARGET, many.growth / few.growth, measured))
    return bars
