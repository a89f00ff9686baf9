"""Leases: exactly one holder, takeover only after silence measured by the observer's own clock."""

import threading
from pathlib import Path

from data_pipeline.lease import Lease, LeaseBoard
from data_pipeline.storage import Storage


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_takeover_needs_a_whole_silent_lifetime(tmp_path: Path) -> None:
    clock = Clock()
    storage = Storage(str(tmp_path))
    first, second = (LeaseBoard(storage, name, 10.0, clock) for name in ("a", "b"))
    lease = first.try_acquire()
    assert lease is not None
    assert lease.held()
    assert second.try_acquire() is None
    clock.now = 9.0
    lease.beat()
    assert second.try_acquire() is None, "the heart-beat changed"
    clock.now = 18.9
    assert second.try_acquire() is None
    clock.now = 19.0
    taken = second.try_acquire()
    assert taken is not None
    assert taken.term == 2
    assert taken.held()
    assert not lease.held(), "the old holder must see that it was replaced"


def test_release_frees_at_once(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    lease = LeaseBoard(storage, "a", 1e9).try_acquire()
    assert lease is not None
    lease.release()
    assert LeaseBoard(storage, "b", 1e9).try_acquire() is not None


def test_a_claim_without_a_beat_expires_too(tmp_path: Path) -> None:
    clock = Clock()
    storage = Storage(str(tmp_path))
    lease = LeaseBoard(storage, "a", 10.0, clock).try_acquire()
    assert lease is not None
    storage.delete("hb/000001")
    other = LeaseBoard(storage, "b", 10.0, clock)
    assert other.try_acquire() is None
    clock.now = 10.0
    assert other.try_acquire() is not None


def test_of_many_takers_one_wins(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    barrier = threading.Barrier(8)
    held: list[Lease] = []

    def take(name: str) -> None:
        board = LeaseBoard(storage, name, 1e9)
        barrier.wait()
        lease = board.try_acquire()
        if lease is not None:
            held.append(lease)

    threads = [threading.Thread(target=take, args=(f"w{n}",)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(held) == 1
