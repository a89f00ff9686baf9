"""Publishing checkpoints while training goes on: copies on the host, written by a thread of each rank.

Training stands still only while the state is copied. Then every rank writes its part of the state, rank 0
whole tensors and, when all is written, the manifest. One checkpoint at a time: the next one waits.
"""

import logging
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import accumulate
from typing import Final, TypeVar

import torch
from torch import Tensor

from data_pipeline.errors import ExitCode, StorageFault, UserError
from trainer import checkpoint as checkpoints
from trainer.distributed import FollowedError, Ranks
from trainer.manifest import DamagedCheckpointError, Manifest
from trainer.partition import Partition
from trainer.parts import Part, write_part
from trainer.recipe_sections import CheckpointSection, EmaProfile
from trainer.retention import Retention
from trainer.run import Run
from trainer.snapshots import power_profiles, write_snapshot
from trainer.telemetry import MetricsLog
from trainer.weights import assemble

log = logging.getLogger(__name__)
T = TypeVar("T")

_CLOSE_SECONDS: Final = 30.0
"""How long closing waits for a checkpoint on its way."""
_MARGIN: Final = timedelta(minutes=5)
"""How much longer than a checkpoint's deadline ranks wait for one another: a request with its retries."""
_PAUSE_SECONDS: Final = 1.0


class NotPublishedError(StorageFault):
    """A checkpoint was given up, because the store failed until its deadline."""


@dataclass(frozen=True)
class Job:
    """One thing to be written.

    Attributes:
        draft: Manifest of this moment, without files.
        timesteps: The distribution of loss-aware timesteps; empty if there is none.
        checkpoint: Whether a checkpoint is to be published.
        snapshot: Whether a snapshot of the power-function averages is to be kept.
    """

    draft: Manifest
    timesteps: Mapping[str, Tensor]
    checkpoint: bool
    snapshot: bool


class CheckpointWriter:
    """Writes the checkpoints of one attempt; all ranks call its methods together.

    Args:
        run: The run directory.
        ranks: The processes of the job.
        partition: This rank's part of the state.
        averages: By EMA profile, laid out as the partition's masters.
        shapes: Of the network's parameters, by name.
        section: How long a checkpoint may take, and which ones stay.
        profiles: Of the averages.
        metrics: Their history, which is published before them.
    """

    def __init__(
        self,
        run: Run,
        ranks: Ranks,
        partition: Partition,
        averages: Mapping[str, list[Tensor]],
        shapes: Mapping[str, torch.Size],
        section: CheckpointSection,
        profiles: Mapping[str, EmaProfile],
        metrics: MetricsLog,
    ) -> None:
        self._run, self._shapes, self._profiles, self._metrics = run, shapes, profiles, metrics
        self._seconds = 60.0 * section.deadline_minutes
        self._ranks = ranks.for_a_thread(timedelta(seconds=self._seconds) + _MARGIN)
        self._live = [partition.masters, *partition.moments.values(), *averages.values()]
        # Made once and touched, so that no copy waits for the system to find memory.
        self._copies = [[_on_host(flat) for flat in flats] for flats in self._live]
        moments = dict(zip(partition.moments, self._copies[1:], strict=False))
        self._partition = Partition(self._copies[0], moments, partition.pieces)
        self._averages = dict(zip(averages, self._copies[1 + len(moments) :], strict=True))
        self._retention = Retention(run, section)
        self._result: Future[None] | None = None
        self._thread: threading.Thread | None = None
        self.published: Manifest | None = None
        """The last checkpoint that was published, on rank 0."""
        self.stalled_seconds = 0.0
        """For how long training has stood still in all."""
        self.given_up = 0
        """How many checkpoints were given up."""

    @property
    def has_failed(self) -> bool:
        """Whether `wait` would raise at once, on this rank; then it will on all."""
        result = self._result
        error = result.exception() if result is not None and result.done() else None
        return error is not None and not isinstance(error, NotPublishedError)

    def start(self, job: Job) -> None:
        """Copy the state and begin to write it, after waiting for what is on its way.

        Raises:
            UserError: As `wait`.
        """
        began = time.monotonic()
        self.wait()
        waited = time.monotonic() - began
        if waited > 1.0:
            log.warning("training waited %.1f s for the checkpoint before to be written", waited)
        self._metrics.cut(job.draft.images)
        self._copy()
        self._result = Future()
        self._thread = threading.Thread(target=self._work, args=(job, self._result), daemon=True)
        self._thread.start()
        self.stalled_seconds += time.monotonic() - began

    def wait(self) -> None:
        """Wait for what is on its way; what was given up is counted, and its metrics go with the next one.

        Raises:
            UserError: It could not be written, for a reason that time does not mend; on the ranks that did
                not meet it, FollowedError.
        """
        result, self._result = self._result, None
        if result is None:
            return
        try:
            result.result()
        except NotPublishedError as error:
            self.given_up += 1
            log.warning("%s; training goes on (%d given up so far)", error, self.given_up)

    def close(self) -> None:
        """Give what is on its way some time to end, and leave the ranks' company."""
        if self._thread is not None:
            self._thread.join(_CLOSE_SECONDS)
            if self._thread.is_alive():
                return  # in the middle of a collective, which ends with the process
        self._ranks.leave()
        for copies in self._copies:
            copies.clear()  # the next attempt may make its own while somebody still holds this object

    def _copy(self) -> None:
        for copies, flats in zip(self._copies, self._live, strict=True):
            torch._foreach_copy_(copies, [flat.detach() for flat in flats], non_blocking=True)
        if any(flat.is_cuda for flats in self._live for flat in flats):
            torch.cuda.synchronize()

    def _work(self, job: Job, result: "Future[None]") -> None:
        try:
            self._write(job, time.monotonic() + self._seconds)
        except BaseException as error:  # noqa: BLE001  (raised again where training waits for it)
            result.set_exception(error)
        else:
            result.set_result(None)

    def _write(self, job: Job, deadline: float) -> None:
        """Write and publish what a job asks for, on the thread of every rank."""
        began = time.monotonic()
        run, draft = self._run, job.draft
        wanted = self._averages if job.checkpoint else power_profiles(self._profiles)
        averages = {profile: self._whole(self._averages[profile]) for profile in wanted}
        parts = self._write_parts(job, averages, deadline) if job.checkpoint else []
        if job.snapshot:  # first: a checkpoint's snapshot is never missing
            self._on_main(deadline, lambda: write_snapshot(run, draft, averages, self._profiles))
        if job.checkpoint:
            self._on_main(deadline, lambda: self._publish(draft, parts))
            log.info("checkpoint %s published, %.2f s after its moment", draft.name, time.monotonic() - began)

    def _write_parts(
        self, job: Job, averages: Mapping[str, Mapping[str, Tensor]], deadline: float
    ) -> list[Part]:
        """Every rank writes its state, rank 0 the rest; return all parts on rank 0."""
        run, name = self._run, job.draft.name
        slices, weights = self._partition.slices(self._averages), self._whole(self._partition.masters)
        put = partial(write_part, run, name, deadline=deadline)
        writes = [partial(checkpoints.write_state, run, name, self._ranks.rank, slices, deadline=deadline)]
        if self._ranks.is_main:
            writes.append(partial(put, checkpoints.WEIGHTS_FILE, weights, "weights"))
            for profile, tensors in averages.items():
                writes.append(partial(put, checkpoints.ema_file(profile), tensors, "ema", ema=profile))
            if job.timesteps:
                writes.append(partial(put, checkpoints.TIMESTEPS_FILE, job.timesteps, "timesteps"))
        # Each by itself: what is written need not be written again when a later one fails.
        mine = self._together(lambda: [_until(deadline, write) for write in writes])
        return [part for parts in self._ranks.gather(mine) for part in parts]

    def _publish(self, draft: Manifest, parts: Sequence[Part]) -> None:
        """Publish a checkpoint whose parts are written; rank 0 alone."""
        self._metrics.flush()  # first: a checkpoint's history must not be lost
        self.published = checkpoints.publish(self._run, draft, parts)
        try:
            self._retention.apply()
        except StorageFault as error:
            log.warning("old checkpoints stay until the next one: %s", error)

    def _together(self, action: Callable[[], T]) -> T:
        """Do something on every rank; who fails fails all."""
        failure: Exception | None = None
        try:
            result = action()
        except Exception as error:  # noqa: BLE001  (raised below, once the other ranks know)
            failure = error
        mine = None if failure is None else (_code_of(failure), str(failure))
        failures = [each for each in self._ranks.gather(mine) if each is not None]
        if not failures:
            return result
        for code in (ExitCode.USER_MISTAKE, ExitCode.FAILED):
            if any(each[0] is code for each in failures):
                raise failure if failure is not None and _code_of(failure) is code else FollowedError(code)
        raise NotPublishedError(f"a checkpoint is given up: {failures[0][1]}")

    def _whole(self, flats: Sequence[Tensor]) -> dict[str, Tensor]:
        return whole_tensors(self._ranks, self._partition, flats, self._shapes)

    def _on_main(self, deadline: float, action: Callable[[], None]) -> None:
        """Do something on rank 0, until it succeeds; its failure is that of all."""
        self._together(lambda: _until(deadline, action) if self._ranks.is_main else None)


def whole_tensors(
    ranks: Ranks, partition: Partition, flats: Sequence[Tensor], shapes: Mapping[str, torch.Size]
) -> dict[str, Tensor]:
    """Return whole tensors on rank 0 of what every rank holds its part of; all ranks call this together.

    A single rank copies nothing: what is returned are views of `flats`.

    Args:
        ranks: The processes of the job.
        partition: What of which parameter this rank holds.
        flats: Its numbers, laid out as the partition's masters.
        shapes: Of the parameters.
    """
    if ranks.world == 1:
        own = [
            (piece.parameter, piece.start, piece.stop, flats[piece.span][piece.place])
            for piece in partition.pieces
        ]
        return assemble(shapes, own)
    begins = [0, *accumulate(flat.numel() for flat in flats)]
    layout = [
        (piece.parameter, piece.start, piece.stop, begins[piece.span] + piece.offset)
        for piece in partition.pieces
    ]
    layouts = ranks.gather(layout)
    flat = flats[0] if len(flats) == 1 else torch.cat(list(flats)) if flats else torch.empty(0)
    gathered = ranks.gather_to_main(flat)
    if not ranks.is_main:
        return {}
    pieces = [
        (parameter, start, stop, gathered[rank][begin : begin + stop - start])
        for rank, pieces_of in enumerate(layouts)
        for parameter, start, stop, begin in pieces_of
    ]
    return assemble(shapes, pieces)


def _until(deadline: float, action: Callable[[], T]) -> T:
    """Repeat what the store refuses until the deadline; each try has retries of its own."""
    while True:
        try:
            return action()
        except DamagedCheckpointError:
            raise  # what was written is not there any more: somebody removes it
        except (StorageFault, FileNotFoundError) as error:
            if time.monotonic() >= deadline:
                raise
            log.warning("writing a checkpoint is tried again: %s", error)
            time.sleep(random.uniform(0.0, _PAUSE_SECONDS))


def _code_of(failure: Exception) -> ExitCode | None:
    """With what training ends if a checkpoint fails so; None if it goes on."""
    if isinstance(failure, UserError):
        return ExitCode.USER_MISTAKE
    # An OSError that the storage did not judge is a fault of the world, too: a file that somebody removed.
    return None if isinstance(failure, (StorageFault, OSError)) else ExitCode.FAILED


def _on_host(flat: Tensor) -> Tensor:
    return torch.zeros(flat.shape, dtype=flat.dtype, pin_memory=flat.is_cuda).fill_(0.0)
