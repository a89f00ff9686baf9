"""Running one contender of `benchmarks.data_build` in a folder of its own."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from benchmarks.harness import Measure, Record, Samples, timed, tree_seconds
from data_pipeline.build import BuildOptions, build
from data_pipeline.index import Index
from data_pipeline.sources import Source


class Rate(Samples):
    """The samples of a contender.

    Attributes:
        name: Which one, and what it does.
        pictures: How many it deals with in one call.
    """

    name: str
    pictures: int

    @property
    def per_second(self) -> float:
        """Pictures in a second, by the median."""
        return self.pictures / self.median

    def row(self) -> tuple[str, ...]:
        """The cells of `RATE_HEADER`."""
        microseconds = 1e6 * self.median_cpu / self.pictures
        return self.name, f"{self.per_second:.0f}", *self.cells(), f"{microseconds:.1f}"


class Part(Record):
    """A part of the work, alone on one core.

    Attributes:
        name: What is done.
        seconds: Wall seconds for all pictures.
    """

    name: str
    seconds: float


def measure(write: Callable[[Path], object], out: Path) -> Measure:
    """Time something that writes to a folder; making and removing the folder is not timed."""

    def run() -> tuple[float, float]:
        with emptied(out):
            return timed(partial(write, out), tree_seconds)

    return run


@contextlib.contextmanager
def emptied(folder: Path) -> Iterator[Path]:
    """A folder that is made, and removed afterwards with all in it."""
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@contextlib.contextmanager
def scratch_below(folder: Path) -> Iterator[None]:
    """Let a build put what is in the making there too, whatever TMPDIR says."""
    before = tempfile.tempdir
    tempfile.tempdir = str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before


def built(source: Source, out: Path, options: BuildOptions, workers: int) -> Index:
    """Build without lines of progress."""
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):
        return build(source, str(out), options, workers=workers)
