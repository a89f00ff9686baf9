"""How well our order mixes a data set, beside a full shuffle and WebDataset's shuffles.

    python -m benchmarks.mixing [--shards 200] [--samples 500] [--classes 100] [--json FILE]

The worst case of a source: it is sorted by class, so a shard holds one class or two. Every contender delivers
two epochs for each seed, and everything is computed from the delivered order alone. N is the number of
samples, a batch has n = 128 (what is left over at the end of an epoch is not looked at):

* dispersion: chi-square of a batch's class counts against the classes' shares in the data set, over its
  expectation for n samples drawn without replacement, (classes - 1) (N - n)/(N - 1); the mean over the
  batches of an epoch. 1: as a full shuffle; more: batches lean to some classes.
* same shard: share of the pairs of a batch that lie in one shard, over a full shuffle's expectation (the
  share among all pairs of the data set); the mean over the batches of an epoch. 1: as a full shuffle.
* |rho|: Spearman's correlation of place in the source with place in the delivered order, without its sign.
  0: where a sample stands in the source tells nothing; a full shuffle has about 0.8/sqrt(N).
* overlap: of the pairs at most 8 places apart in the first epoch, the share that are so in the second too,
  over a full shuffle's expectation (the share among all pairs). 1: as a full shuffle; more: neighbours meet
  again.

"mixed" says among how many samples a contender draws, which is what better mixing costs: a window's samples,
of which a reader fetches its rank's part, or a buffer of samples held in memory.

The peer runs for real, over integers in place of tars: the list of shards wholly shuffled by
`SimpleShardList` (better than `shardshuffle=100`), then `filters.shuffle` with the default `initial`, both
seeded anew for each epoch. 1000 is what its README advises ("usually, pick something bigger, like 1000"). It
is one reader of everything: DataLoader workers and ranks, each with its own shards, mix their batches with
each other or do not, depending on how they are set up; ours delivers the same order whatever the number of
ranks.
"""

import argparse
import random
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np
from webdataset import DataPipeline, SimpleShardList, filters

from benchmarks.harness import OURS, Record
from benchmarks.peers.webdataset_writer import WEBDATASET
from benchmarks.report import Environment, environment, table
from data_pipeline.documents import Document
from data_pipeline.order import Int64Array, Order

WINDOWS: Final = (1, 4, 16, 64)
BUFFERS: Final = (1000, 10_000)
BATCH: Final = 128
NEAR: Final = 8
"""Places within which two samples count as neighbours."""
FULL_SHUFFLE: Final = "full shuffle"
HEADER: Final = ("contender", "mixed", "dispersion", "same shard", "|rho|", "overlap")


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        shards: Of the data set.
        samples: Of each shard.
        classes: By which the source is sorted, of equal size.
        seeds: How many.
        json: Where to write all samples; None: nowhere.
    """

    shards: int
    samples: int
    classes: int
    seeds: int
    json: Path | None

    @property
    def total(self) -> int:
        """Samples of the data set."""
        return self.shards * self.samples


class Mixing(Record):
    """What one contender's orders are like, one number for each seed; see the module.

    Attributes:
        name: Whose.
        mixed: Among how many samples it draws.
        dispersion: Of class counts in batches.
        same_shard: Share of a batch's pairs that lie in one shard.
        rho: Spearman's correlation of source and delivered place, without its sign.
        overlap: Share of neighbours that are so in the next epoch too.
    """

    name: str
    mixed: int
    dispersion: list[float]
    same_shard: list[float]
    rho: list[float]
    overlap: list[float]

    def row(self) -> tuple[str, ...]:
        """The cells of `HEADER`."""
        measures = ((self.dispersion, 2), (self.same_shard, 2), (self.rho, 4), (self.overlap, 2))
        return self.name, f"{self.mixed:,}", *(_spread(values, digits) for values, digits in measures)


class MixingResult(Document):
    """The JSON file.

    Attributes:
        settings: The options it ran with.
        environment: Where it ran.
        source: Where the peer's documentation and code stand.
        contenders: All raw samples.
    """

    SCHEMA: ClassVar[str] = "mixing-benchmark/1"

    settings: dict[str, int]
    environment: Environment
    source: str
    contenders: list[Mixing]


Deliver = Callable[[int, int], Int64Array]
"""(seed, epoch) -> int64 [N], the samples' places in the source, in the order delivered."""


def full_shuffle(options: Options, seed: int, epoch: int) -> Int64Array:
    """Every order equally likely."""
    return np.random.default_rng([seed, epoch]).permutation(options.total)


def ours(options: Options, window: int, seed: int, epoch: int) -> Int64Array:
    """Our order with windows of so many shards."""
    order = Order([options.samples] * options.shards, seed, window)
    shards, members = order.locate(epoch * options.total + np.arange(options.total, dtype=np.int64))
    return shards * options.samples + members


def webdataset(options: Options, buffer: int, seed: int, epoch: int) -> Int64Array:
    """WebDataset's shuffle of the shards' list, then its shuffle buffer of so many samples."""
    generator = random.Random(1000 * seed + epoch)
    names = [f"{shard:06d}" for shard in range(options.shards)]

    def members(found: Iterable[dict[str, Any]]) -> Iterator[int]:
        for shard in found:
            yield from range(int(shard["url"]) * options.samples, (int(shard["url"]) + 1) * options.samples)

    stages = DataPipeline(
        SimpleShardList(names, seed=generator.getrandbits(32)),
        members,
        filters.shuffle(buffer, rng=generator),
    )
    return np.fromiter(stages, dtype=np.int64, count=options.total)


def contenders(options: Options) -> dict[str, tuple[int, Deliver]]:
    """By name, among how many samples each draws, and how it delivers."""
    found: dict[str, tuple[int, Deliver]] = {FULL_SHUFFLE: (options.total, partial(full_shuffle, options))}
    for window in WINDOWS:
        if window <= options.shards:
            name = f"{OURS}, window of {window} shard{'s' if window > 1 else ''}"
            found[name] = window * options.samples, partial(ours, options, window)
    for buffer in BUFFERS:
        name = f"{WEBDATASET.name}, shuffle({buffer})"
        found[name] = min(buffer, options.total), partial(webdataset, options, buffer)
    return found


def measure(options: Options, name: str, mixed: int, deliver: Deliver) -> Mixing:
    """Let one contender deliver two epochs for each seed, and look at them.

    Raises:
        ValueError: An epoch does not hold every sample once; then nothing is to be compared.
    """
    found = []
    for seed in range(options.seeds):
        first, second = (deliver(seed, epoch) for epoch in (0, 1))
        for epoch in (first, second):
            if not np.array_equal(np.sort(epoch), np.arange(options.total)):
                raise ValueError(f"{name}: an epoch does not hold every sample exactly once")
        found.append(
            (
                dispersion(first * options.classes // options.total, options.classes),
                same_group(first // options.samples),
                correlation(first),
                overlap(first, second),
            )
        )
    columns = [list(values) for values in zip(*found, strict=True)]
    return Mixing(
        name=name,
        mixed=mixed,
        dispersion=columns[0],
        same_shard=columns[1],
        rho=columns[2],
        overlap=columns[3],
    )


def dispersion(classes: Int64Array, number: int, batch: int = BATCH) -> float:
    """Mean chi-square of the class counts of batches, over its expectation for a full shuffle.

    Args:
        classes: int64 [N], class of each sample in the order delivered; at least one batch.
        number: How many classes there are, each with a sample at least.
        batch: Samples of a batch.
    """
    total = len(classes)
    expected = batch * np.bincount(classes, minlength=number) / total
    counts = _counts_by_batch(classes, number, batch)
    chi_square = ((counts - expected) ** 2 / expected).sum(axis=1)
    return float(chi_square.mean() / ((number - 1) * (total - batch) / (total - 1)))


def same_group(groups: Int64Array, batch: int = BATCH) -> float:
    """Mean share of a batch's pairs that are of one group, over its expectation for a full shuffle.

    Args:
        groups: int64 [N], group (such as the shard) of each sample in the order delivered.
        batch: Samples of a batch.
    """
    counts = _counts_by_batch(groups, int(groups.max()) + 1, batch)
    share = (counts * (counts - 1)).sum(axis=1) / (batch * (batch - 1))
    sizes = np.bincount(groups)
    return float(share.mean() / ((sizes * (sizes - 1)).sum() / (len(groups) * (len(groups) - 1))))


def correlation(places: Int64Array) -> float:
    """|Spearman's rho| of place in the source (`places`, a permutation) with place in the order delivered."""
    return abs(float(np.corrcoef(places, np.arange(len(places)))[0, 1]))


def overlap(first: Int64Array, second: Int64Array, near: int = NEAR) -> float:
    """Share of neighbours that meet again in the second epoch, over its expectation for a full shuffle.

    Args:
        first: int64 [N], the samples in the order of one epoch.
        second: int64 [N], the same samples in that of another.
        near: Places within which two samples are neighbours.
    """
    total = len(first)
    place = np.empty_like(second)
    place[second] = np.arange(total)
    moved = place[first]  # where in the second epoch each sample of the first stands
    pairs = again = 0
    for apart in range(1, near + 1):
        pairs += total - apart
        again += int(np.count_nonzero(np.abs(moved[apart:] - moved[:-apart]) <= near))
    return (again / pairs) / (pairs / (total * (total - 1) / 2))


def conclusions(measured: Sequence[Mixing]) -> list[str]:
    """Say for each of the peer's buffers which of our windows spreads classes over batches as well."""
    windows = [mixing for mixing in measured if mixing.name.startswith(OURS)]
    said = []
    for peer in (mixing for mixing in measured if mixing.name.startswith(WEBDATASET.name)):
        reached = statistics.median(peer.dispersion)
        equal = [mixing for mixing in windows if statistics.median(mixing.dispersion) <= reached]
        name = equal[0].name if equal else "none of ours"
        said.append(f"spreads classes over batches at least as evenly as {peer.name}: {name}")
    return said


def run(options: Options) -> MixingResult:
    """Measure everyone and print the table."""
    print(
        f"{options.total:,} samples in {options.shards} shards, sorted by {options.classes} classes; "
        f"batches of {BATCH}; {options.seeds} seeds: median (least–most). 1 is a full shuffle, but for |rho|."
    )
    measured = [measure(options, name, *contender) for name, contender in contenders(options).items()]
    print(table(HEADER, [mixing.row() for mixing in measured]))
    for sentence in conclusions(measured):
        print(sentence)
    result = MixingResult(
        settings={
            "shards": options.shards,
            "samples": options.samples,
            "classes": options.classes,
            "seeds": options.seeds,
            "batch": BATCH,
            "near": NEAR,
        },
        environment=environment((WEBDATASET.distribution, "numpy")),
        source=WEBDATASET.source,
        contenders=measured,
    )
    if options.json is not None:
        options.json.write_bytes(result.to_json())
    return result


def read(arguments: Sequence[str] | None = None) -> Options:
    """Read the command line; default: the process's."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.mixing",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--shards", type=int, default=200, metavar="N", help="default 200")
    add("--samples", type=int, default=500, metavar="N", help="of each shard (default 500)")
    add("--classes", type=int, default=100, metavar="N", help="default 100")
    add("--seeds", type=int, default=5, metavar="N", help="default 5")
    add("--json", type=Path, metavar="FILE", help="write all samples here")
    found = parser.parse_args(arguments)
    if min(found.shards, found.samples, found.classes - 1, found.seeds) < 1:
        parser.error("every N must be at least 1, and the classes 2")
    if found.shards * found.samples < max(BATCH, found.classes):
        parser.error(f"the data set must hold a batch of {BATCH} and a sample of every class")
    return Options(**vars(found))


def main(arguments: Sequence[str] | None = None) -> MixingResult:
    """Run the benchmark.

    Args:
        arguments: Of the command line; default: the process's.

    Returns:
        What was measured.
    """
    return run(read(arguments))


def _counts_by_batch(groups: Int64Array, number: int, batch: int) -> Int64Array:
    """How often each group occurs in each whole batch, int64 [batches, number]."""
    batches = len(groups) // batch
    cells = np.repeat(np.arange(batches), batch) * number + groups[: batches * batch]
    return np.bincount(cells, minlength=batches * number).reshape(batches, number)


def _spread(values: Sequence[float], digits: int) -> str:
    median, least, most = statistics.median(values), min(values), max(values)
    return f"{median:.{digits}f} ({least:.{digits}f}–{most:.{digits}f})"


if __name__ == "__main__":
    main()
