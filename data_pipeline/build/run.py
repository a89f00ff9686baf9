"""`ddpm data build`: a source of pictures -> shards, records and, last of all, the index.

    source's places -> runs -> workers prepare them (`prepare`) -> packed in order (`packing`)
                                                 -> workers write full shards (`shards`) -> `index.json`

One process decides, in the order of the source, and holds no picture; the others do the work. Until
`index.json` exists the folder is no data set: `unfinished.json` says so, and what the journal beside it tells
to be done is not done again. The outcome is the same to the byte for any number of processes and kills.
"""

import itertools
import json
import logging
import os
import re
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from data_pipeline.build.duplicates import ContentSpool, report_duplicates
from data_pipeline.build.journal import UNFINISHED_FILE, FinishedShard, Journal, Segment, Unfinished
from data_pipeline.build.packing import PackedShard, Packer
from data_pipeline.build.plan import BuildOptions, Plan, differences, make_plan
from data_pipeline.build.prepare import HASH_GROUP, SPLITS, Prepared, Run, part_path, prepare, source_sha256
from data_pipeline.build.shards import write_shard
from data_pipeline.documents import canonical_json
from data_pipeline.errors import UserError
from data_pipeline.index import INDEX_FILE, Index, ShardEntry, load_index
from data_pipeline.progress import Progress
from data_pipeline.scratch import ScratchFolder
from data_pipeline.sources import Source, Survey, runs
from data_pipeline.storage import PROBE, Storage
from data_pipeline.team import Pending, Team

log = logging.getLogger(__name__)

REJECTED_FILE: Final = "rejected.jsonl"
_WORTH_A_PROCESS: Final = 512
"""Pictures: coding fewer anew takes little more time than starting the process."""
_SHARD_FILE: Final = re.compile(r"shard-\d{6,}\.(tar|idx)")


@dataclass(frozen=True)
class Grain:
    """How finely the work is divided; the outcome does not depend on it.

    Attributes:
        run: Items that one process prepares at a time; a multiple of `HASH_GROUP`.
        segment: Runs that are recorded together: after a kill at most so many are done again.
    """

    run: int = 256
    segment: int = 16

    def __post_init__(self) -> None:
        if self.run < 1 or self.run % HASH_GROUP or self.segment < 1:
            raise ValueError(f"run must be a multiple of {HASH_GROUP}, segment positive: {self}")


@dataclass(frozen=True)
class _Worker:
    """What each process holds."""

    source: Source
    plan: Plan
    scratch: Path
    storage: Storage


@dataclass(frozen=True)
class _MakeWorker:
    source: Source
    plan: Plan
    scratch: Path
    url: str

    def __call__(self) -> _Worker:
        return _Worker(self.source, self.plan, self.scratch, Storage(self.url))


@dataclass(frozen=True)
class _Prepare:
    run: Run

    def __call__(self, worker: _Worker) -> Prepared:
        plan = worker.plan
        return prepare(worker.source, self.run, plan.form, plan.build.val_fraction, worker.scratch)


@dataclass(frozen=True)
class _Write:
    shard: PackedShard
    claim: Unfinished

    def __call__(self, worker: _Worker) -> ShardEntry:
        Journal(worker.storage).check(self.claim)
        return write_shard(self.shard, worker.scratch, worker.storage)


def default_workers(source: Source) -> int:
    """How many processes suit a source: all cores, but starting one must pay."""
    enough = itertools.islice(source.places(), _WORTH_A_PROCESS * (os.cpu_count() or 1))
    return min(os.cpu_count() or 1, max(1, sum(1 for _ in enough) // _WORTH_A_PROCESS))


def find_built(source: Source, out_url: str, options: BuildOptions, *, workers: int = 1) -> Index | None:
    """Return the index if exactly this build is finished at `out_url`; None if no data set is there.

    Reads and hashes the whole source to know.

    Raises:
        UserError: Another data set is there.
    """
    storage = Storage(out_url)
    if not storage.exists(INDEX_FILE):
        return None
    index = load_index(storage).index
    plan = make_plan(source, options)
    different = differences(plan, index)
    if not different:
        survey = source.survey()
        with ScratchFolder("data-build", storage.url) as scratch:
            make = _MakeWorker(source, plan, scratch.path, storage.url)
            with Team(make, workers) as team, Progress("compare", survey.count, "img") as progress:
                groups = bytearray()
                nothing_to_fit = dict.fromkeys(SPLITS, survey.count)
                for run in _prepared(team, source, 0, nothing_to_fit, Grain()):
                    groups += run.groups
                    progress.update(run.first + run.count)
        if source_sha256(bytes(groups)) == index.source_sha256:
            Journal(storage).clear()  # of a build that was killed right after its last step
            return index
        different = ["the source's pictures"]
    raise UserError(
        f"{storage.url}: already holds the data set {index.name!r} built from something else "
        f"(different: {', '.join(different)}); choose another --out or delete that one"
    )


def build(
    source: Source,
    out_url: str,
    options: BuildOptions | None = None,
    *,
    workers: int = 1,
    start_over: bool = False,
    grain: Grain | None = None,
) -> Index:
    """Build a data set, or go on with a build that was killed; a finished one is left as it is.

    Args:
        source: The pictures.
        out_url: Folder or URL for the shards.
        options: The choices.
        workers: Processes that do the work; with more than 1 a script that calls this needs the guard
            `if __name__ == "__main__"`.
        start_over: Throw away what another, unfinished build left at `out_url`.
        grain: How finely the work is divided.

    Returns:
        The published index.

    Raises:
        UserError: Bad options, no or too many unreadable pictures, an empty split, another data set,
            another unfinished build or foreign shards at `out_url`, or no space.
        StorageFault: The storage kept failing, or a process died: the same call goes on from there.
    """
    options, grain = options or BuildOptions(), grain or Grain()
    storage = Storage(out_url)
    built = find_built(source, out_url, options, workers=workers)
    if built is not None:
        return built
    survey = source.survey()
    if survey.count == 0:
        raise UserError(f"{source.name}: no pictures in it; name a folder that holds some")
    plan = make_plan(source, options)
    with ScratchFolder("data-build", storage.url) as scratch:
        scratch.empty()
        made = _Build(source, survey, plan, storage, scratch.path, grain)
        made.claim(start_over=start_over)
        workers = min(workers, -(-survey.count // grain.run))
        with Team(_MakeWorker(source, plan, scratch.path, storage.url), workers) as team:
            made.write_shards(team)
        return made.publish(options.max_rejected)


class _Build:
    """One build under way: what is known so far, in the order of the source."""

    def __init__(
        self, source: Source, survey: Survey, plan: Plan, storage: Storage, scratch: Path, grain: Grain
    ) -> None:
        self._source, self._plan, self._count, self._grain = source, plan, survey.count, grain
        self._storage, self._scratch = storage, scratch
        self._journal = Journal(storage)
        self._identity = Unfinished(
            name=plan.name,
            kind=plan.kind,
            plan={
                **plan.document(),
                "labels": source.labelled,
                "run": grain.run,
                "segment": grain.segment,
            },
            stamp=survey.stamp,
        )
        self._groups = bytearray()
        self._contents = ContentSpool(scratch / "contents")
        self._rejected: list[bytes] = []
        self._told = 0  # the number of the item before which the journal tells everything
        self._untold: list[Prepared] = []
        self._shards: dict[str, list[FinishedShard]] = {}
        self._writing: deque[tuple[PackedShard, Pending[ShardEntry]]] = deque()
        self._unrecorded: list[FinishedShard] = []
        self._parts: dict[str, deque[int]] = {split: deque() for split in SPLITS}

    def claim(self, *, start_over: bool) -> None:
        """Make the place ours before the first shard, and refuse one that holds foreign shards."""
        names = self._storage.list()
        if UNFINISHED_FILE not in names and any(_SHARD_FILE.fullmatch(name) for name in names):
            raise UserError(
                f"{self._storage.url}: holds shards without {INDEX_FILE} that this command did not write; "
                "choose an empty place for --out"
            )
        self._storage.prove_create_only()
        self._journal.claim(self._identity, start_over=start_over)

    def write_shards(self, team: Team[_Worker]) -> None:
        """Write all shards."""
        for segment in self._journal.segments():
            self._take_in(segment)
        self._shards = self._journal.shards(self._told)
        covered = {split: done[-1].last + 1 if done else 0 for split, done in self._shards.items()}
        begun = {split: [shard.first for shard in done] for split, done in self._shards.items()}
        packer = Packer(self._plan.build.shard_bytes, begun)
        segment_items = self._grain.run * self._grain.segment
        first = min(covered.values()) // segment_items * segment_items
        if self._told:
            log.warning(
                "%s: going on with an unfinished build at item %d", self._storage.url, max(covered.values())
            )
        try:
            with Progress("build", self._count, "img", start=first) as progress:
                for run in _prepared(team, self._source, first, covered, self._grain):
                    self._take_over(run, packer, team)
                    rejected = len(self._rejected) + sum(len(each.rejected) for each in self._untold)
                    progress.update(run.first + run.count, rejected=str(rejected))
            self._tell(None)
            self._write(packer.finish(), team)
            while self._writing:
                self._finish_one()
        except KeyboardInterrupt:
            self._record_what_is_done()
            raise
        assert not self._unrecorded, "every item is told of"

    def publish(self, max_rejected: float) -> Index:
        """Publish the index; report rejections and duplicates.

        Raises:
            UserError: Too many rejections, an empty split, or another build took over.
        """
        self._journal.check(self._identity)
        if self._source.survey().stamp != self._identity.stamp:
            raise UserError(
                f"{self._source.name}: changed while it was read; leave it alone and add --start-over"
            )
        duplicates = report_duplicates(self._contents, self._source, self._storage)
        self._report_rejected(max_rejected)
        index = Index(
            name=self._plan.name,
            kind=self._plan.kind,
            source_sha256=source_sha256(bytes(self._groups)),
            geometry=self._plan.geometry_record(),
            encoding=str(self._plan.form.encoding),
            build=self._plan.build,
            splits={split: [shard.entry for shard in done] for split, done in self._shards.items()},
            rejected=len(self._rejected),
            duplicates=duplicates,
            kept=sum(shard.kept for done in self._shards.values() for shard in done),
            classes=list(self._source.classes),
        )
        for split in SPLITS:
            if index.samples(split) == 0:
                raise UserError(
                    f"{self._source.name}: of {self._count} pictures none fell to the split {split!r}; "
                    "change --val-fraction or add pictures"
                )
        self._journal.check(self._identity)
        self._storage.sweep()
        ours = index.files()
        for name in self._storage.list():
            of_another_build = _SHARD_FILE.fullmatch(name) and name not in ours
            if of_another_build or name.startswith(PROBE):
                self._storage.delete(name)
        if not self._storage.create(INDEX_FILE, index.to_json()):
            raise UserError(f"{self._storage.url}: another build finished here first; choose another --out")
        self._journal.clear()
        return index

    def _take_over(self, run: Prepared, packer: Packer, team: Team[_Worker]) -> None:
        self._tell(run)
        for split in SPLITS:
            if len(run.samples[split]):
                self._parts[split].append(run.first)
        self._write(packer.add(run), team)

    def _record_what_is_done(self) -> None:
        """Leave as little as possible to be done again."""
        self._tell(None)
        while self._writing and self._writing[0][1].done:
            self._finish_one()

    def _tell(self, run: Prepared | None) -> None:
        """Record what was found out about items, a segment at a time; None: there are no more."""
        if run is not None and run.first >= self._told + sum(each.count for each in self._untold):
            self._untold.append(run)
        if self._untold and (run is None or len(self._untold) == self._grain.segment):
            segment = Segment.of(self._untold)
            self._journal.add_segment(segment)
            self._untold.clear()
            self._take_in(segment)
            self._record_shards()

    def _take_in(self, segment: Segment) -> None:
        self._told = segment.stop
        self._groups += segment.groups
        self._contents.add(segment.contents)
        for row in segment.rejected:
            self._rejected.append(canonical_json({"schema": "rejected/1", **asdict(row)}) + b"\n")

    def _write(self, shards: list[PackedShard], team: Team[_Worker]) -> None:
        """Have shards written, before anything else is prepared; do not let too many pile up."""
        for shard in shards:
            self._writing.append((shard, team.start(_Write(shard, self._identity), next_in_line=True)))
        most = 2 * team.size if team.size > 1 else 0
        while self._writing and (self._writing[0][1].done or len(self._writing) > most):
            self._finish_one()

    def _finish_one(self) -> None:
        """Wait for the shard that was begun first."""
        shard, pending = self._writing.popleft()
        finished = FinishedShard.of(shard, pending.result())
        self._shards[shard.split].append(finished)
        self._unrecorded.append(finished)
        self._record_shards()
        parts = self._parts[shard.split]
        while parts[0] < shard.pieces[-1].run:  # the last one may go on in the next shard
            part_path(self._scratch, shard.split, parts.popleft()).unlink()

    def _record_shards(self) -> None:
        ready = [shard for shard in self._unrecorded if shard.last < self._told]
        self._unrecorded = [shard for shard in self._unrecorded if shard.last >= self._told]
        for shard in ready:
            self._journal.add_shard(shard)

    def _report_rejected(self, max_rejected: float) -> None:
        if not self._rejected:
            self._storage.delete(REJECTED_FILE)  # an earlier, broken-off build may have left one
            return
        self._storage.write(REJECTED_FILE, b"".join(self._rejected))
        allowed = max(1, int(max_rejected * self._count))
        if len(self._rejected) > allowed:
            row = json.loads(self._rejected[0])
            raise UserError(
                f"{len(self._rejected)} of {self._count} pictures are unreadable, at most {allowed} may be; "
                f"first {row['path']}: {row['reason']} (all in {self._storage.url}/{REJECTED_FILE}); "
                "mend or remove them and add --start-over, or allow more by --max-rejected"
            )


def _prepared(
    team: Team[_Worker], source: Source, first: int, covered: Mapping[str, int], grain: Grain
) -> Iterator[Prepared]:
    """Prepare the runs from item `first` on; give them in order."""
    pending: deque[Pending[Prepared]] = deque()
    places = itertools.islice(source.places(), first, None)
    for number, run in enumerate(runs(places, grain.run)):
        pending.append(team.start(_Prepare(Run(first + number * grain.run, run, covered))))
        if len(pending) > 2 * (team.size - 1):
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
