"""Reading ahead within a bound of bytes: members come in the order in which they are wanted.

One thread plans (which members, which requests) and hands the requests to a pool; whoever decodes takes
the members in turn. The bytes of a request count from the moment it is made until its last member is taken.
A segment of members close to each other is at most half of the bound: the next comes while one is used up.
The requests of the oldest segment are always made, so what is awaited is never held up by what comes after.
"""

import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Executor, Future
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np
import numpy.typing as npt

from data_pipeline.reader import GAP, LARGEST_RANGE, Payload, RangeRequest, ShardReader

Int64Array = npt.NDArray[np.int64]

_MIN_RANGE: Final = 64 << 10


@dataclass(frozen=True)
class Segment:
    """Consecutively wanted members that are read together.

    Attributes:
        positions: int64 [m], their stream positions, increasing.
        shards: int64 [m].
        members: int64 [m].
    """

    positions: Int64Array
    shards: Int64Array
    members: Int64Array


Mend = Callable[[int, int, int], Payload]
"""(stream position, shard, member) -> what comes in place of a damaged member."""


class _Load:
    """One request on its way, and what it brought until that is taken."""

    def __init__(self, stretch: "_Stretch", request: RangeRequest) -> None:
        self.stretch, self.request = stretch, request
        self.left = len(request.places)
        self.is_submitted = False
        self.done: Future[list[Payload | None]] = Future()


class _Stretch:
    """A segment in the queue: the number of its first member, and where each of its members will be."""

    def __init__(self, first: int, segment: Segment, requests: Sequence[RangeRequest]) -> None:
        self.first, self.segment, self.left = first, segment, len(segment.positions)
        self.loads = [_Load(self, request) for request in requests]
        self.members = [(self.loads[0], 0)] * self.left
        for load in self.loads:
            for place, member in enumerate(load.request.places.tolist()):
                self.members[member] = load, place


class ReadAhead:
    """A queue of members, numbered from 0 in the order of their segments, that is filled ahead of its use.

    Args:
        segments: What will be wanted; iterated in a thread of its own.
        reader: Reads it.
        mend: Called with what is damaged in the store.
        first: So many members are read at once, more only after `go_on`.
        limit: Most bytes to hold and to have asked for; only the oldest segment by itself may exceed it.
        pool: Runs the requests.
        name: Start of the thread's name.
    """

    def __init__(
        self,
        segments: Iterator[Segment],
        reader: ShardReader,
        mend: Mend,
        *,
        first: int,
        limit: int,
        pool: Executor,
        name: str,
    ) -> None:
        self._segments, self._reader, self._mend = segments, reader, mend
        self._first, self._limit, self._pool = first, limit, pool
        self._changed = threading.Condition()
        self._stretches: deque[_Stretch] = deque()  # oldest first, those with members that nobody took
        self._planned = 0
        self._held = 0
        self._may_go_on = False
        self._failure: BaseException | None = None
        self._closed = False
        self._unfinished: set[_Load] = set()
        # A daemon: a program that ends without closing its stream must not wait for more to be wanted.
        self._planner = threading.Thread(target=self._plan_to_the_end, name=name, daemon=True)
        self._planner.start()

    def take(self, first: int, count: int) -> list[Payload]:
        """Wait for the members `first` … `first + count - 1`; each can be taken once.

        Raises:
            CancelledError: The queue was closed meanwhile.
            UserError, StorageFault: What planning or reading ended with.
        """
        taken = []
        for load, place in self._find(first, count):
            payloads = load.done.result()
            payload, payloads[place] = payloads[place], None
            assert payload is not None, "a member was taken twice"
            taken.append(payload)
            self._let_go(load)
        return taken

    def go_on(self) -> None:
        """Read beyond the first members. Until then a start costs no more than its first batch."""
        with self._changed:
            self._may_go_on = True
            self._changed.notify_all()

    def close(self) -> None:
        """Ask for nothing more; whoever waits gets a CancelledError."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._cancel_unfinished()
        self._planner.join()
        self._cancel_unfinished()  # what the planner entered meanwhile

    def _cancel_unfinished(self) -> None:
        with self._changed:
            unfinished = list(self._unfinished)
        for load in unfinished:
            load.done.cancel()

    def _find(self, first: int, count: int) -> list[tuple[_Load, int]]:
        """Return request and place in it of each member, as soon as all of them are planned."""
        with self._changed:
            self._changed.wait_for(lambda: self._planned >= first + count or self._failure or self._closed)
            if self._planned < first + count:
                raise self._failure or CancelledError
            found = []
            for stretch in self._stretches:
                start = first - stretch.first
                found += stretch.members[max(start, 0) : max(start + count, 0)]
            assert len(found) == count, "a member was taken twice"
            return found

    def _let_go(self, load: _Load) -> None:
        """Count a member of a request as taken; with its last one the bytes are free."""
        with self._changed:
            load.left -= 1
            load.stretch.left -= 1
            if load.left == 0:
                self._held -= load.request.held
                self._changed.notify_all()
            while self._stretches and self._stretches[0].left == 0:
                self._stretches.popleft()
                self._changed.notify_all()

    def _plan(self) -> None:
        """Divide segment after segment into requests, and start each as soon as its bytes find room."""
        while self._wait_for(lambda: self._planned < self._first or self._may_go_on):
            segment = next(self._segments, None)
            if segment is None:
                return
            for load in self._enter(segment):
                if not self._has_room(load):
                    return
                run = self._pool.submit(self._read, load)
                load.is_submitted = True
                run.add_done_callback(partial(self._end, load))

    def _plan_to_the_end(self) -> None:
        try:
            self._plan()
        except (ValueError, OSError, RuntimeError) as error:  # the last one at the interpreter's end
            self._fail(error)
        finally:
            broken = sys.exception()
            if broken is not None:  # an invariant: its traceback follows, but nobody waits for ever
                self._fail(broken)

    def _fail(self, error: BaseException) -> None:
        """Tell those who wait for what will never be asked for why."""
        with self._changed:
            self._failure = error
            self._changed.notify_all()
            orphans = [load for load in self._unfinished if not load.is_submitted]
            self._unfinished.difference_update(orphans)
        for load in orphans:
            if load.done.set_running_or_notify_cancel():
                load.done.set_exception(error)

    def _enter(self, segment: Segment) -> list[_Load]:
        """Plan a segment's requests and put its members into the queue."""
        largest = max(min(LARGEST_RANGE, self._limit // 4), _MIN_RANGE)
        # A start reads its first batch's members and not a byte between them.
        gap = GAP if self._planned >= self._first else 0
        requests = self._reader.plan(segment.shards, segment.members, largest, gap)
        with self._changed:
            stretch = _Stretch(self._planned, segment, requests)
            self._stretches.append(stretch)
            self._planned += len(segment.positions)
            self._unfinished.update(stretch.loads)
            self._changed.notify_all()
        return stretch.loads

    def _has_room(self, load: _Load) -> bool:
        """Wait until a request may be made and count its bytes; False if the queue was closed."""
        size = load.request.held

        def fits() -> bool:
            return load.stretch is self._stretches[0] or self._held + size <= self._limit

        if not self._wait_for(fits):
            return False
        with self._changed:
            self._held += size
        return True

    def _wait_for(self, met: Callable[[], bool]) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: met() or self._closed)
            return not self._closed

    def _read(self, load: _Load) -> list[Payload | None]:
        """Read one request, and put something in place of what is damaged."""
        payloads = self._reader.read(load.request)
        for place, payload in enumerate(payloads):
            if payload is None:
                position = int(load.stretch.segment.positions[load.request.places[place]])
                member = int(load.request.members[place])
                payloads[place] = self._mend(position, load.request.shard, member)
        return payloads

    def _end(self, load: _Load, run: "Future[list[Payload | None]]") -> None:
        """Tell those who wait for a request how its run ended."""
        with self._changed:
            self._unfinished.discard(load)
        if run.cancelled():
            load.done.cancel()
        elif load.done.set_running_or_notify_cancel():
            error = run.exception()
            if error is None:
                load.done.set_result(run.result())
            else:
                load.done.set_exception(error)
