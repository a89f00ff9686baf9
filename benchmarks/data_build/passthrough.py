"""Building with the source's own bytes: ours, WebDataset's writer, and what nobody can leave out."""

import hashlib
import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import lmdb

from benchmarks.data_build.pictures import SIZE
from benchmarks.data_build.running import Part, built, emptied
from benchmarks.peers.webdataset_writer import write_shards
from data_pipeline.build import BuildOptions
from data_pipeline.encoding import Encoding
from data_pipeline.sources.lsun import LsunSource
from data_pipeline.team import Team

_BLOCK = 1024
"""Pictures held in memory at a time."""


@dataclass(frozen=True)
class Passthrough:
    """The task: a database of pictures to shards that hold them as they are.

    Attributes:
        database: Folder of the LMDB.
        pictures: How many it holds.
        workers: Processes.
        val_fraction: Of our build; None: its default.
    """

    database: Path
    pictures: int
    workers: int
    val_fraction: float | None

    @property
    def options(self) -> BuildOptions:
        """Of our build."""
        return BuildOptions(size=SIZE, encoding=Encoding.SOURCE, val_fraction=self.val_fraction)

    def ours(self, out: Path) -> None:
        """Build as `ddpm data build lsun` does, the start of its processes included."""
        # The next contender opens the database anew, and LMDB allows that once for each process.
        with closing(LsunSource(self.database)) as source:
            index = built(source, out, self.options, self.workers)
        assert index.kept == self.pictures, "all pictures fit as they are"

    def webdataset(self, out: Path) -> None:
        """Write with one `ShardWriter`, in this process."""
        write_shards(self.database, out, self.options.shard_bytes)

    def webdatasets(self, team: Team[None], out: Path) -> None:
        """Write with one `ShardWriter` in each process of a team."""
        parts = range(team.size)
        pending = [team.start(_WritePart(self, out, part, team.size)) for part in parts]
        for each in pending:
            each.result()

    def check(self, ours: Path, theirs: Mapping[str, Callable[[Path], None]]) -> None:
        """Write once with everyone and compare keys and bytes, as plain `webdataset` reads them.

        Args:
            ours: Where our shards go, and stay.
            theirs: The others, by name.

        Raises:
            ValueError: They differ; then timings would compare nothing.
        """
        self.ours(ours)
        mine = _contents(ours)
        for name, write in theirs.items():
            with emptied(ours.with_name("theirs")) as out:
                write(out)
                if _contents(out) != mine or len(mine) != self.pictures:
                    raise ValueError(f"{name} writes other keys or pictures than ours: nothing was timed")

    def floor(self, shards: Path) -> list[Part]:
        """Time, each alone and on one core, what our format asks of anyone who builds these shards.

        Args:
            shards: What was built.
        """
        clock = _Clock()
        for block in self._blocks(clock):
            with clock.counting("SHA-256 of every picture"):
                for data in block:
                    hashlib.sha256(data).digest()
            with clock.counting("CRC32C of every picture"):
                for data in block:
                    google_crc32c.value(data)
        for path in sorted(shards.glob("*.tar")):
            tar, copy = path.read_bytes(), path.with_suffix(".copy")
            with clock.counting("SHA-256 of the shards"):
                hashlib.sha256(tar).digest()
            with clock.counting("writing the shards"):
                copy.write_bytes(tar)
            copy.unlink()
        return [Part(name=name, seconds=seconds) for name, seconds in clock.seconds.items()]

    def _blocks(self, clock: "_Clock") -> Iterator[list[bytes]]:
        """Read all pictures, some at a time."""
        with (
            lmdb.open(str(self.database), readonly=True, lock=False) as environment,
            environment.begin(buffers=True) as transaction,
        ):
            values = iter(transaction.cursor().iternext(keys=False, values=True))
            while True:
                with clock.counting("reading the LMDB"):
                    block = [bytes(value) for value in itertools.islice(values, _BLOCK)]
                if not block:
                    return
                yield block


def nothing() -> None:
    """What the processes of a team hold that only write."""


@dataclass(frozen=True)
class _WritePart:
    """The task of one process of `Passthrough.webdatasets`."""

    whole: Passthrough
    out: Path
    part: int
    parts: int

    def __call__(self, worker: None) -> None:
        write_shards(self.whole.database, self.out, self.whole.options.shard_bytes, self.part, self.parts)


class _Clock:
    """Adds up wall seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def counting(self, name: str) -> Iterator[None]:
        """Add the time of the block."""
        began = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - began


def _contents(folder: Path) -> dict[str, bytes]:
    """SHA-256 of every picture by key."""
    from webdataset import WebDataset

    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    found: dict[str, bytes] = {}
    for sample in WebDataset(urls, shardshuffle=False, empty_check=False):
        key, names = sample["__key__"], {name for name in sample if not name.startswith("__")}
        if key in found or names != {"jpg"}:
            raise ValueError(f"{key}: not one JPEG under a key of its own: nothing was timed")
        found[key] = hashlib.sha256(sample["jpg"]).digest()
    return found
