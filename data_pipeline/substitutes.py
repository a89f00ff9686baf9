"""What is trained on in place of members that are damaged in the store.

A damaged member must neither stop a long run nor silently shorten its epochs, and every rank and every
later attempt must train on the same picture instead. So the choice is made once, published create-only
under the stream position it was made for, before the picture is used, and obeyed by whoever comes to that
position again, even if the member has been mended since: the trajectory stays a function of what is written.
"""

import logging
import re
import threading
from collections.abc import Callable, Iterator
from typing import ClassVar, Final

import numpy as np
import numpy.typing as npt

from data_pipeline.documents import Document
from data_pipeline.errors import UserError
from data_pipeline.order import derive
from data_pipeline.storage import Storage

log = logging.getLogger(__name__)
Int64Array = npt.NDArray[np.int64]

_SUBSTITUTE: Final = 5  # purpose of `order.derive`, as `order` numbers them
_NAME: Final = re.compile(r"(\d{16})-(\d+)-(\d+)-(\d+)\.json")
_CANDIDATES: Final = 64


class Substitution(Document):
    """`<position>-<source>-<shard>-<member>.json`: the member at that stream position gave way to another.

    Attributes:
        position: Stream position it holds for.
        source: Number of the data set among those of the stream.
        shard: Of the damaged member, number in the split's list.
        member: Its number within the shard.
        by_shard: Of the member that stands in for it.
        by_member: Its number within that shard.
        index_sha: SHA-256 of the data set's index.json.
    """

    SCHEMA: ClassVar[str] = "substitution/1"

    position: int
    source: int
    shard: int
    member: int
    by_shard: int
    by_member: int
    index_sha: str


class Substitutions:
    """The substitutions of one stream, in a folder of the run. Safe to use from several threads.

    Args:
        storage: The folder.
        budget: How many different members may be damaged before the stream stops.

    Raises:
        UserError: More are listed already.
    """

    def __init__(self, storage: Storage, budget: int) -> None:
        self._storage, self._budget = storage, budget
        self._lock = threading.Lock()
        self._named: dict[tuple[int, int], str] = {}
        self._damaged: set[tuple[int, int, int]] = set()
        self._made = 0
        self._look()

    @property
    def made(self) -> int:
        """Positions whose member gave way to another, as far as this process came by them."""
        return self._made

    def positions(self, source: int) -> Int64Array:
        """Return the stream positions for which something was decided, int64, in no order."""
        with self._lock:
            return np.array([position for of, position in self._named if of == source], dtype=np.int64)

    def damaged(self, source: int) -> list[tuple[int, int]]:
        """Return (shard, member) of the members that are known to be damaged."""
        with self._lock:
            return [(shard, member) for of, shard, member in self._damaged if of == source]

    def is_damaged(self, source: int, shard: int, member: int) -> bool:
        """Tell whether the member is known to be damaged."""
        return (source, shard, member) in self._damaged

    def published(self, position: int, source: int) -> Substitution:
        """Return what was decided for one of `positions`."""
        name = self._named[source, position]
        with self._lock:
            self._made += 1
        return Substitution.from_json(self._storage.read(name), f"{self._storage.url}/{name}")

    def decide(
        self,
        position: int,
        source: int,
        place: tuple[int, int],
        samples_per_shard: Int64Array,
        index_sha: str,
        sound: Callable[[int, int], bool],
    ) -> Substitution:
        """Choose what stands in for a damaged member, publish it, and return what holds.

        Args:
            position: The stream position at which it is wanted.
            source: Number of its data set among those of the stream.
            place: Its shard and its number within the shard.
            samples_per_shard: int64 [shards] of the split.
            index_sha: SHA-256 of the data set's index.json.
            sound: Tells whether a member's bytes can be read.

        Returns:
            What is published for that position: ours, or what another process published before.

        Raises:
            UserError: More members are damaged than the budget allows.
        """
        shard, member = place
        by = next(
            candidate
            for candidate in candidates(shard, member, samples_per_shard)
            if not self.is_damaged(source, *candidate) and sound(*candidate)
        )
        chosen = Substitution(
            position=position,
            source=source,
            shard=shard,
            member=member,
            by_shard=by[0],
            by_member=by[1],
            index_sha=index_sha,
        )
        name = f"{position:016d}-{source}-{shard}-{member}.json"
        if not self._storage.create(name, chosen.to_json()):
            chosen = Substitution.from_json(self._storage.read(name), f"{self._storage.url}/{name}")
        log.warning(
            "position %d: member %d of shard %d of source %d is damaged in the store; member %d of shard %d "
            "takes its place",
            position,
            member,
            shard,
            source,
            chosen.by_member,
            chosen.by_shard,
        )
        with self._lock:
            self._made += 1
        self._look()
        return chosen

    def _look(self) -> None:
        """Read the list, which other ranks write too, and compare it with the budget."""
        found = [match for name in self._storage.list() if (match := _NAME.fullmatch(name))]
        with self._lock:
            for match in found:
                position, source, shard, member = map(int, match.groups())
                self._named[source, position] = match.string
                self._damaged.add((source, shard, member))
            damaged = len(self._damaged)
        if damaged > self._budget:
            raise UserError(
                f"{self._storage.url}: {damaged} members of the data are damaged in the store, "
                f"data.damage_budget allows {self._budget}; mend the shards (`ddpm data verify` names them) "
                "or raise it"
            )


def candidates(shard: int, member: int, samples_per_shard: Int64Array) -> Iterator[tuple[int, int]]:
    """Iterate what may stand in for a member: members of the same split, the same ones for everybody.

    Raises:
        UserError: None of the first ones will do.
    """
    stops = np.cumsum(samples_per_shard)
    for number in range(_CANDIDATES):
        place = derive(_SUBSTITUTE, shard, member, number) % int(stops[-1])
        by_shard = int(np.searchsorted(stops, place, side="right"))
        by_member = place - int(stops[by_shard] - samples_per_shard[by_shard])
        if (by_shard, by_member) != (shard, member):
            yield by_shard, by_member
    raise UserError(
        f"shard {shard} member {member}: damaged in the store, and so is whatever might stand in for it; "
        "see `ddpm data verify` and build the data set anew"
    )
