"""Claims over shared storage without trusting any wall clock.

A lease lives in a folder: `<term>.json` files are created once each, and the highest term holds the
claim. Its holder overwrites `hb/<term>` at intervals. Whoever else wants the claim watches that
heart-beat with its *own monotonic clock* and creates the next term only after seeing no change for a
whole time to live. Creation is create-only, so of several takers exactly one wins.
"""

import logging
import time
import uuid
from collections.abc import Callable
from typing import ClassVar, Final

from data_pipeline.documents import Document
from data_pipeline.storage import Storage

log = logging.getLogger(__name__)

_RELEASED: Final = b"released\n"


class Claim(Document):
    """One term of a lease, `<term>.json`."""

    SCHEMA: ClassVar[str] = "lease/1"

    term: int
    owner: str
    nonce: str
    """Makes the claims of two owners of the same name differ."""


class Lease:
    """A held claim. Call `beat` well within the time to live, `release` when done."""

    def __init__(self, storage: Storage, claim: Claim) -> None:
        self._storage, self._claim = storage, claim
        self._beats = 0

    @property
    def term(self) -> int:
        """The term this lease holds."""
        return self._claim.term

    def beat(self) -> None:
        """Show the others that the holder is alive."""
        self._beats += 1
        self._storage.write(f"hb/{self.term:06d}", f"{self._claim.nonce} {self._beats}\n".encode())

    def held(self) -> bool:
        """Tell whether no later term has been claimed; check before publishing."""
        return _newest_term(self._storage) == self.term

    def release(self) -> None:
        """Give the claim up so that the next taker need not wait."""
        self._storage.write(f"hb/{self.term:06d}", _RELEASED)


class LeaseBoard:
    """One observer's view of one lease folder.

    Args:
        storage: The lease's folder.
        owner: Name of this process in the claim, for people.
        ttl_seconds: How long an unchanged heart-beat is believed.
        monotonic: This observer's clock; replaced by tests.
    """

    def __init__(
        self,
        storage: Storage,
        owner: str,
        ttl_seconds: float,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._storage, self._owner, self._ttl = storage, owner, ttl_seconds
        self._monotonic = monotonic
        self._seen: tuple[int, bytes] | None = None
        self._seen_since = 0.0
        self.saw_life = False
        """Whether a heart-beat changed between two looks of this observer."""

    def try_acquire(self) -> Lease | None:
        """Claim the lease if it is free, given up, or silent for a whole time to live; else None.

        Call repeatedly: silence is measured between the calls of this observer.
        """
        term = _newest_term(self._storage)
        if term > 0 and not self._is_silent(term):
            return None
        claim = Claim(term=term + 1, owner=self._owner, nonce=uuid.uuid4().hex)
        if not self._storage.create(f"{claim.term:06d}.json", claim.to_json()):
            return None
        if term > 0:
            log.info("%s: term %d taken by %s", self._storage.url, claim.term, self._owner)
        lease = Lease(self._storage, claim)
        lease.beat()
        return lease

    def holder(self) -> str:
        """Name of whoever claimed the newest term; empty if nobody ever did."""
        term = _newest_term(self._storage)
        if term == 0:
            return ""
        path = f"{term:06d}.json"
        return Claim.from_json(self._storage.read(path), f"{self._storage.url}/{path}").owner

    def _is_silent(self, term: int) -> bool:
        try:
            heartbeat = self._storage.read(f"hb/{term:06d}")
        except FileNotFoundError:  # claimed, first beat not yet written
            heartbeat = b""
        if heartbeat == _RELEASED:
            return True
        now = self._monotonic()
        if self._seen != (term, heartbeat):
            self.saw_life = self._seen is not None
            self._seen, self._seen_since = (term, heartbeat), now
        return now - self._seen_since >= self._ttl


def _newest_term(storage: Storage) -> int:
    terms = [int(name.removesuffix(".json")) for name in storage.list() if name.endswith(".json")]
    return max(terms, default=0)
