"""The evaluation service: watch a run, claim fresh checkpoints, evaluate, publish.

Any number of services may watch one run, anywhere its URL is readable: a lease per (protocol, checkpoint)
shares the work, and as results are create-only, a double evaluation after a lost lease does no harm. The
service only reads what the trainer published and never writes where the trainer does.
"""

import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self

from data_pipeline.errors import StorageFault, UserError
from data_pipeline.index import load_index
from data_pipeline.lease import LeaseBoard
from eval.baseline import Baseline, prepare
from eval.evaluate import evaluate
from eval.features import FeatureChoice, FeatureNetwork, open_network
from eval.pictures_folder import PicturesFolder
from eval.plan import make_plan
from eval.reference_cache import ReferenceCache
from eval.results import Result, ResultBook
from eval.statistics import Pictures
from eval.team import Stopped, Team
from trainer.manifest import DamagedCheckpointError
from trainer.recipe import Recipe
from trainer.run import CheckpointGoneError, Run, worker_name

log = logging.getLogger(__name__)

LEASE_SECONDS: Final = 60.0
"""A worker silent for so long is believed dead; it beats five times as often."""
_DAMAGED_TRIES: Final = 3
"""How often a checkpoint whose parts fail their hash is tried before it is left out."""


@dataclass(frozen=True)
class WatchOptions:
    """How to watch.

    Attributes:
        specs: Specifications of the recipe's `evaluation` section to compute; all automatic ones if empty.
        features: Feature network to use in place of the specifications'.
        poll_seconds: Seconds between looks at the run when there is nothing to do.
        until_finished: End when training has finished and every live checkpoint has its results.
        wait_for_run: Wait for a run that has not been started yet, instead of refusing it.
        lease_seconds: Time to live of a claim.
        save_images: Folder for the samples as PNG files, `<spec>-<hash>/<checkpoint>/NNNNNN.png`; None: none
            are kept.
    """

    specs: tuple[str, ...] = ()
    features: str | None = None
    poll_seconds: float = 5.0
    until_finished: bool = False
    wait_for_run: bool = False
    lease_seconds: float = LEASE_SECONDS
    save_images: Path | None = None


@dataclass
class Summary:
    """What a watch did.

    Attributes:
        evaluated: Results published.
        faults: Storage faults survived.
        vanished: Checkpoints seen waiting that retention or a rollback took away before they were scored.
        damaged: Evaluations given up because a checkpoint's parts fail their hash.
        outcome: `finished` (see `WatchOptions.until_finished`), or `stopped` on request.
    """

    evaluated: int = 0
    faults: int = 0
    vanished: int = 0
    damaged: int = 0
    outcome: Literal["finished", "stopped"] = "finished"


@dataclass(frozen=True)
class Task:
    """One protocol of the run, ready to compute."""

    book: ResultBook
    network: FeatureNetwork
    baseline: Baseline


class Heartbeat(AbstractContextManager["Heartbeat"]):
    """Calls `beats` from a thread at intervals while the owner works."""

    def __init__(self, beats: Sequence[Callable[[], None]], every_seconds: float) -> None:
        self._beats, self._every = beats, every_seconds
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._end.wait(self._every):
            for beat in self._beats:
                try:
                    beat()
                except (StorageFault, UserError) as fault:  # the next beat may reach the store again
                    log.warning("heart-beat missed: %s", fault)


class Service:
    """One watcher of one run; in a team of several processes each holds one and calls it alike.

    Args:
        run_url: The run directory.
        options: How to watch.
        team: The processes that compute together.
    """

    def __init__(self, run_url: str, options: WatchOptions, team: Team) -> None:
        self.run = Run(run_url)
        self.summary = Summary()
        self._options, self._team = options, team
        self._worker = worker_name()
        self._boards: dict[tuple[str, str], LeaseBoard] = {}
        self._claim = ExitStack()
        self._failures: Counter[tuple[str, str]] = Counter()
        self._given_up: set[tuple[str, str]] = set()
        self._said_waiting = False
        self._pending: set[tuple[int, str]] = set()

    def watch(self, report: Callable[[Result], None]) -> Summary:
        """Evaluate checkpoints as they appear, oldest first.

        Storage that keeps failing ends one try, not the service: the fault is counted and the work done in
        a later round. Ends when asked to stop, at once and without a half result, or with `until_finished`.

        Args:
            report: Told each result as soon as it is published (in the main process).

        Raises:
            UserError: There is no such run, specification or data set, or the features cannot be used.
        """
        tasks: list[Task] | None = None
        while True:
            try:
                if tasks is None:
                    tasks = self.set_up()
                if tasks is not None:
                    step = self._team.on_main(partial(self._next, tasks))
                    if step == "finished":
                        return self.summary
                    if step != "idle":
                        self._report(self._work(tasks[step[0]], step[1]), report)
                        continue
            except Stopped:
                self.summary.outcome = "stopped"
                return self.summary
            except CheckpointGoneError as error:  # counted when its turn would have come
                log.warning("skipped: %s", error)
                continue
            except StorageFault as fault:
                self.summary.faults += 1
                log.warning("trying again in %g s: %s", self._options.poll_seconds, fault)
            if self._team.is_main:
                self._team.stop.wait(self._options.poll_seconds)

    def once(self, checkpoint: str | None, report: Callable[[Result], None]) -> None:
        """Evaluate one checkpoint under every protocol; results already there are reported as they are.

        Args:
            checkpoint: Its name; None for the newest live one.
            report: Told each result (in the main process).

        Raises:
            UserError: No such run or checkpoint, or another worker is evaluating it.
            StorageFault: Storage kept failing.
            CheckpointGoneError: Retention removed it.
            Stopped: The team was asked to stop.
        """
        tasks = self.set_up()
        assert tasks is not None, "without wait_for_run a missing run raises"
        name = self._team.on_main(lambda: self.run.select(checkpoint))
        for index, task in enumerate(tasks):
            if not self._team.on_main(partial(self._has_result, task, name)):
                if not self._team.on_main(partial(self._try_claim, task, name)):
                    raise UserError(
                        f"{task.book.url}: another worker is evaluating {name}; see its result soon"
                    )
                self._report(self._work(tasks[index], name), report)
            elif self._options.save_images is not None:
                raise UserError(
                    f"{task.book.url}: has the result of {name}, its samples are not drawn again; for "
                    f"pictures use `ddpm sample {self.run.url} --checkpoint {name} -n N --out FOLDER`"
                )
            elif self._team.is_main:
                report(task.book.result(name))

    def set_up(self) -> list[Task] | None:
        """Read the run's protocols and compute what their results are compared with.

        Returns:
            The tasks; None if the run has not been started and is waited for.

        Raises:
            UserError: As `watch`.
        """
        recipe = self._team.on_main(self._find_run)
        if recipe is None:
            return None
        index_sha256 = self._team.on_main(lambda: load_index(recipe.data.url).sha256)
        automatic = (name for name, spec in recipe.evaluation.items() if spec.automatic)
        names = self._options.specs or tuple(automatic)
        if not names:
            raise UserError(
                f"{self.run.url}/recipe.yaml: no automatic specification in the section `evaluation`, so "
                "nothing to compute; add one, or name one with --spec"
            )
        networks: dict[FeatureChoice, FeatureNetwork] = {}
        cache, tasks = ReferenceCache(), []
        for name in names:
            plan = make_plan(recipe, name, index_sha256, self._options.features)
            if plan.features not in networks:
                networks[plan.features] = self._team.together(
                    partial(open_network, plan.features, self._team.device)
                )
            book, network = ResultBook(self.run, plan.protocol), networks[plan.features]
            baseline = prepare(book, recipe.data.url, network, self._team, cache, plan.reference_file)
            tasks.append(Task(book, network, baseline))
        return tasks

    def _find_run(self) -> Recipe | None:
        self._team.check_stop()
        if self._options.wait_for_run and not self.run.has_recipe():
            if not self._said_waiting:
                log.info("%s: waiting for the run to start", self.run.url)
            self._said_waiting = True
            return None
        return self.run.latest_recipe()

    def _next(self, tasks: list[Task]) -> tuple[int, str] | Literal["idle", "finished"]:
        """Claim the oldest checkpoint that lacks a result and is free. Main process only."""
        self._team.check_stop()
        # Read before listing: a checkpoint published in between belongs to an attempt not yet ended.
        ended = self.run.ended()
        self._count_lost(tasks)
        waiting = [
            (self._failures[task.book.directory, name], name, i)
            for i, task in enumerate(tasks)
            for name in task.book.pending()
            if (task.book.directory, name) not in self._given_up
        ]
        for _, name, i in sorted(waiting):  # what failed before goes to the end of the queue
            try:
                if self._try_claim(tasks[i], name):
                    return i, name
            except CheckpointGoneError as error:
                log.warning("skipped: %s", error)
            except DamagedCheckpointError as fault:
                self._note_fault(tasks[i].book, name, fault)
        if waiting or not self._options.until_finished or ended is None or ended.outcome == "requeue":
            return "idle"
        for task in tasks:  # another worker's last update may have crossed ours
            task.book.update_best()
        return "finished"

    def _count_lost(self, tasks: list[Task]) -> None:
        """Count checkpoints that were seen waiting and went, by retention or a rollback, without a result."""
        pending = {(i, name) for i, task in enumerate(tasks) for name in task.book.pending()}
        for i, name in sorted(self._pending - pending):
            if not self._has_result(tasks[i], name):
                self.summary.vanished += 1
                log.warning("%s was withdrawn or superseded before it was scored", name)
        self._pending = pending

    def _try_claim(self, task: Task, checkpoint: str) -> bool:
        """Take lease and pin of a checkpoint and keep them alive. Main process only."""
        key = (task.book.directory, checkpoint)
        if key not in self._boards:
            folder = task.book.storage.child("lease", checkpoint)
            self._boards[key] = LeaseBoard(folder, self._worker, self._options.lease_seconds)
        lease = self._boards[key].try_acquire()
        if lease is None:
            return False
        with ExitStack() as claim:
            claim.callback(lease.release)
            if self._has_result(task, checkpoint):  # finished by another between listing and claiming
                return False
            pin = claim.enter_context(self.run.pin(checkpoint, self._worker))
            beats = (lease.beat, pin.beat)
            claim.enter_context(Heartbeat(beats, self._options.lease_seconds / 5))
            self._claim = claim.pop_all()
        return True

    def _work(self, task: Task, checkpoint: str) -> Result:
        """Evaluate a claimed checkpoint, publish, and give the claim back."""
        book = task.book
        try:
            outcome = evaluate(
                self.run,
                checkpoint,
                book.protocol,
                task.network,
                task.baseline,
                self._team,
                self._keeper(book, checkpoint),
            )
            published = self._team.on_main(lambda: book.publish(outcome.result, outcome.files))
            self.summary.evaluated += 1
            self._team.on_main(book.update_best)
            return published
        except StorageFault as fault:
            self._note_fault(book, checkpoint, fault)
            raise
        finally:
            # Main process only and without an exchange: others may have failed elsewhere.
            try:
                self._claim.close()
            except StorageFault as fault:
                log.warning("claim of %s not given back, it runs out by itself: %s", checkpoint, fault)

    def _keeper(self, book: ResultBook, checkpoint: str) -> Callable[[int, Pictures], None]:
        if self._options.save_images is None:
            return lambda first, pictures: None
        folder = self._options.save_images / book.directory / checkpoint
        return PicturesFolder(folder, book.protocol.samples)

    def _note_fault(self, book: ResultBook, checkpoint: str, fault: StorageFault) -> None:
        """Count a failed try; what is damaged is left out after some."""
        key = (book.directory, checkpoint)
        self._failures[key] += 1
        if isinstance(fault, DamagedCheckpointError) and self._failures[key] >= _DAMAGED_TRIES:
            self._given_up.add(key)
            self.summary.damaged += 1
            log.error("%s left out after %d tries: %s", checkpoint, _DAMAGED_TRIES, fault)

    def _report(self, result: Result, report: Callable[[Result], None]) -> None:
        if self._team.is_main:
            report(result)

    @staticmethod
    def _has_result(task: Task, checkpoint: str) -> bool:
        return task.book.storage.exists(f"{checkpoint}.json")


def watch(run_url: str, options: WatchOptions, team: Team, report: Callable[[Result], None]) -> Summary:
    """Watch one run; see `Service.watch`."""
    return Service(run_url, options, team).watch(report)
