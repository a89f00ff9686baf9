"""A run is trained from one place at a time: whoever trains holds the lease in its directory.

Attempts fence what is published in any case; this spares a second trainer the hours until it would find out.
"""

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Iterator
from typing import Final

from data_pipeline.errors import StorageFault, UserError
from data_pipeline.lease import Lease, LeaseBoard
from trainer.run import Run

log = logging.getLogger(__name__)

SILENCE_SECONDS: Final = 20.0
"""A holder that shows no sign of life for so long is dead."""
_BEAT_SECONDS: Final = 4.0
_LOOK_SECONDS: Final = 1.0


@contextlib.contextmanager
def occupied(run: Run, silence_seconds: float = SILENCE_SECONDS) -> Iterator[None]:
    """Hold the run's lease while the context lasts.

    After a trainer that was killed this waits until it has been silent for `silence_seconds`.

    Raises:
        UserError: Another trainer holds it and is alive.
    """
    lease = _acquire(run, silence_seconds)
    done = threading.Event()
    beating = threading.Thread(target=_beat, args=(lease, done), name="run-lease", daemon=True)
    beating.start()
    try:
        yield
    finally:
        done.set()
        beating.join()
        lease.release()


def _acquire(run: Run, silence_seconds: float) -> Lease:
    board = LeaseBoard(
        run.storage.child("lease"), f"{socket.gethostname()} pid {os.getpid()}", silence_seconds
    )
    pause, told = threading.Event(), False
    while (lease := board.try_acquire()) is None:
        if board.saw_life:
            raise UserError(
                f"{run.url}: in use by a live run ({board.holder()}); stop it, or give another run directory"
            )
        if not told:
            log.info("%s: was held by %s; watching it for %.0f s", run.url, board.holder(), silence_seconds)
            told = True
        pause.wait(_LOOK_SECONDS)
    return lease


def _beat(lease: Lease, done: threading.Event) -> None:
    while not done.wait(_BEAT_SECONDS):
        try:
            lease.beat()
        except (
            StorageFault,
            UserError,
        ) as error:  # training goes on without: attempts fence what is published
            log.warning("no sign of life could be written: %s", error)
