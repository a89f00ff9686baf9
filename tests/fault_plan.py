"""What a fault proxy does to which request, and how it keeps count: decisions and numbers, no sockets.

A plan looks at one request and names the harm its answer comes to, or None. Plans made here depend on the
request's number alone, so a run that sends the same requests in the same order meets the same faults. With
them stand the other parts of `fault_proxy` that touch no socket: counters, pace of the link, message heads.
"""

import dataclasses
import json
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Final, Self

BUFFER_BYTES: Final = 256 * 1024
END_OF_HEAD: Final = b"\r\n\r\n"


class Fault(StrEnum):
    """One way in which storage fails."""

    UNAVAILABLE = "unavailable"
    """503 with S3's `SlowDown`; the gateway is not asked."""
    RESET = "reset"
    """Half of the body, then a reset connection (RST); of an answer without body, nothing but that."""
    TRUNCATED = "truncated"
    """The whole Content-Length promised, half of the body sent, then an orderly end (FIN)."""
    SHORT = "short"
    """Half of what was asked for; Content-Length and Content-Range say so."""
    STALL = "stall"
    """Half of the body, then silence; of an answer without body, not even the head."""
    FLIP = "flip"
    """One bit of the body turned."""


@dataclass(frozen=True)
class Flip:
    """`Fault.FLIP` at a fixed place; an answer without that byte passes unharmed.

    Args:
        offset: Which byte of the object.
        bit: Which bit of it, 0 to 7.
    """

    offset: int
    bit: int = 0


@dataclass(frozen=True)
class Request:
    """What a plan decides by.

    Args:
        number: 0, 1, … over the requests that the plan wants to see, from when it was set.
        method: `GET`, `PUT`, …
        path: Decoded, without the query: `/bucket/key`.
        start: First byte asked for by the Range header, 0 without one, negative for "the last n".
        stop: Byte after the last one asked for; None without an end.
    """

    number: int
    method: str
    path: str
    start: int = 0
    stop: int | None = None


Plan = Callable[[Request], Fault | Flip | None]
"""The proxy calls it for one request at a time. A plain function sees every request, a `GetPlan` its own."""


@dataclass(frozen=True)
class GetPlan:
    """A plan for the GETs whose path ends as given; these alone are numbered."""

    choose: Plan
    paths: str = ""

    def __call__(self, request: Request) -> Fault | Flip | None:
        return self.choose(request) if self.wants(request.method, request.path) else None

    def wants(self, method: str, path: str) -> bool:
        """Tell whether a request is numbered and asked about."""
        return method == "GET" and path.endswith(self.paths)


def random_faults(
    seed: int, share: float, kinds: Sequence[Fault] = tuple(Fault), paths: str = ".tar"
) -> GetPlan:
    """Harm a share of the GETs, each by a kind drawn evenly; both are functions of seed and number."""

    def choose(request: Request) -> Fault | None:
        draw = random.Random(f"{seed}-{request.number}")
        return draw.choice(kinds) if draw.random() < share else None

    return GetPlan(choose, paths)


def first(n: int, kind: Fault, paths: str = ".tar") -> GetPlan:
    """Harm the first n GETs."""
    return GetPlan(lambda request: kind if request.number < n else None, paths)


def always(kind: Fault, paths: str = ".tar") -> GetPlan:
    """Harm every GET."""
    return GetPlan(lambda request: kind, paths)


def flip_member(path_suffix: str, start: int, stop: int) -> GetPlan:
    """Damage the object's bytes [start, stop) for good: the middle one has a bit turned in every answer."""
    assert start < stop, "an empty member has no bit to turn"
    return GetPlan(lambda request: Flip((start + stop) // 2), path_suffix)


def parse_range(header: str | None) -> tuple[int, int | None]:
    """Return (start, stop) of a Range header as `Request` has them; the whole object for anything unusual."""
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", (header or "").strip())
    if found is None or found[0] == "bytes=-":
        return 0, None
    first_byte, last_byte = found.groups()
    if not first_byte:
        return -int(last_byte), None
    return int(first_byte), int(last_byte) + 1 if last_byte else None


@dataclass(frozen=True)
class Counters:
    """What went through a proxy.

    Args:
        requests: Request heads that arrived.
        gets: The GETs among them.
        bytes_down: Body bytes handed to the kernel for clients: without heads and chunk framing, with the
            proxy's own 503 bodies. They are counted before they are sent, so a client that has its answer
            finds it counted.
        bytes_up: Body bytes that arrived from clients, likewise.
        faults: Harm that was done (not merely planned), by kind.
        flips: Path and offset in the object of every byte that had a bit turned.
    """

    requests: int = 0
    gets: int = 0
    bytes_down: int = 0
    bytes_up: int = 0
    faults: Counter[Fault] = field(default_factory=Counter)
    flips: list[tuple[str, int]] = field(default_factory=list)

    def to_json(self) -> str:
        """Return one line of JSON."""
        return json.dumps(vars(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Rebuild what `to_json` wrote."""
        values = json.loads(text)
        faults = Counter({Fault(kind): count for kind, count in values.pop("faults").items()})
        return cls(faults=faults, flips=[(path, at) for path, at in values.pop("flips")], **values)


class Tally:
    """Counters that many threads write."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._now = Counters()

    def read(self) -> Counters:
        with self._lock:
            return dataclasses.replace(
                self._now, faults=Counter(self._now.faults), flips=list(self._now.flips)
            )

    def reset(self) -> None:
        with self._lock:
            self._now = Counters()

    def request(self, method: str) -> None:
        self._add(requests=1, gets=int(method == "GET"))

    def down(self, count: int) -> None:
        self._add(down=count)

    def up(self, count: int) -> None:
        self._add(up=count)

    def harm(self, fault: Fault | Flip, path: str) -> None:
        with self._lock:
            self._now.faults[Fault.FLIP if isinstance(fault, Flip) else fault] += 1
            if isinstance(fault, Flip):
                self._now.flips.append((path, fault.offset))

    def _add(self, *, requests: int = 0, gets: int = 0, down: int = 0, up: int = 0) -> None:
        with self._lock:
            now = self._now
            self._now = dataclasses.replace(
                now,
                requests=now.requests + requests,
                gets=now.gets + gets,
                bytes_down=now.bytes_down + down,
                bytes_up=now.bytes_up + up,
            )


class Link:
    """The network between client and gateway: its delay, its limit, and whether it is being torn down."""

    def __init__(
        self,
        latency: float,
        bytes_per_second: float | None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stopping = threading.Event()
        self._latency, self._rate, self._monotonic = latency, bytes_per_second, monotonic
        self._lock = threading.Lock()
        self._free_at = 0.0
        # At most 20 ms of the link at once: a slow one must trickle, not jerk.
        self.piece = (
            min(BUFFER_BYTES, max(1, int(bytes_per_second / 50))) if bytes_per_second else BUFFER_BYTES
        )

    def delay(self) -> None:
        """Wait for the latency of one request."""
        self._wait(self._latency)

    def carry(self, count: int) -> None:
        """Wait until so many bytes have passed the link; those of all connections queue up."""
        if self._rate is None:
            return
        with self._lock:
            now = self._monotonic()
            self._free_at = max(self._free_at, now) + count / self._rate
            wait = self._free_at - now
        self._wait(wait)

    def _wait(self, seconds: float) -> None:
        if seconds > 0 and self.stopping.wait(seconds):
            raise ConnectionAbortedError("the proxy stops")


class Head:
    """Request or status line and header fields of one message."""

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        first_line, *lines = raw[: -len(END_OF_HEAD)].decode("latin-1").split("\r\n")
        self.words = first_line.split(" ")
        pairs = (line.partition(":") for line in lines)
        self.fields = {name.strip().lower(): value.strip() for name, _, value in pairs}

    @cached_property
    def status(self) -> int:
        return int(self.words[1])

    @property
    def length(self) -> int | None:
        """Content-Length, unless chunks have the say."""
        text = self.fields.get("content-length")
        return None if text is None or self.chunked else int(text)

    @property
    def chunked(self) -> bool:
        return self.fields.get("transfer-encoding", "").lower().endswith("chunked")

    @property
    def expects_continue(self) -> bool:
        return self.fields.get("expect", "").lower() == "100-continue"

    @property
    def closes(self) -> bool:
        option = self.fields.get("connection", "").lower()
        return option == "close" or ("HTTP/1.0" in self.words and option != "keep-alive")

    @property
    def object_start(self) -> int:
        """Where in the object an answer's body begins."""
        found = re.match(r"bytes (\d+)-", self.fields.get("content-range", ""))
        return int(found[1]) if found else 0

    def shortened(self, length: int) -> bytes:
        """Return the head of an answer that has so many bytes of the body only."""
        last = self.object_start + length - 1
        raw = re.sub(rb"(?i)(\r\ncontent-length: *)\d+", rb"\g<1>%d" % length, self.raw)
        return re.sub(rb"(?i)(\r\ncontent-range: *bytes \d+-)\d+", rb"\g<1>%d" % last, raw)


def possible_harm(
    request: Request, answer: Head, length: int | None, fault: Fault | Flip | None
) -> Fault | Flip | None:
    """Return the planned harm with its place, or None if this answer cannot come to it."""
    if fault is None or not 200 <= answer.status < 300:
        return None
    if fault in (Fault.RESET, Fault.STALL):
        return fault
    if not length or (fault is Fault.SHORT and length < 2):  # Content-Range knows no empty range
        return None
    if fault is Fault.FLIP:
        draw = random.Random(f"flip-{request.number}")
        return Flip(answer.object_start + draw.randrange(length), draw.randrange(8))
    if isinstance(fault, Flip) and not 0 <= fault.offset - answer.object_start < length:
        return None
    return fault
