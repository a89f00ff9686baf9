"""A reverse proxy for HTTP/1.1 that counts bytes and does harm on purpose.

It stands between an S3 client and a real gateway on loopback. Heads pass unchanged, so signatures (over
the Host header) hold. Every client connection is one thread and one connection to the gateway, and bodies
stream through one buffer, so it costs little beside the gateway itself.

As a process of its own, for benchmarks: `python -m tests.fault_proxy --upstream URL --share 0.1 --seed 3`.
It prints `{"url": …}`, then the counters for every line on stdin; the line `reset` zeroes them first,
`plan SHARE` sets another share of faults; it ends with stdin. `ProxyProcess` does that from Python.
"""

import argparse
import json
import select
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, Self
from urllib.parse import unquote, urlsplit

from tests.fault_plan import (
    BUFFER_BYTES,
    END_OF_HEAD,
    Counters,
    Fault,
    Flip,
    GetPlan,
    Head,
    Link,
    Plan,
    Request,
    Tally,
    parse_range,
    possible_harm,
    random_faults,
)
from trainer.tether import tethered

_HEAD_LIMIT: Final = 1024 * 1024
_SLOW_DOWN: Final = (
    b'<?xml version="1.0" encoding="UTF-8"?>\n'
    b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)


class FaultProxy:
    """The proxy, on a free port of 127.0.0.1, as a context manager.

    Args:
        upstream: The gateway, (host, port) or `http://HOST:PORT`.
        plan: Which requests come to harm; None harms none.
        latency: Seconds added to every request.
        bytes_per_second: Limit on body bytes, over all connections and both directions.

    A request whose gateway is gone ends in a closed connection. An answer that is no success is never harmed,
    and TRUNCATED, SHORT and FLIP pass over answers without a body of known length; neither is counted.
    """

    def __init__(
        self,
        upstream: tuple[str, int] | str,
        plan: Plan | None = None,
        *,
        latency: float = 0.0,
        bytes_per_second: float | None = None,
    ) -> None:
        self.upstream = _address(upstream)
        self.link = Link(latency, bytes_per_second)
        self.tally = Tally()
        self._lock = threading.Lock()
        self._plan, self._number = plan, 0
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listener = socket.socket()

    @property
    def url(self) -> str:
        """The proxy's URL, `http://127.0.0.1:PORT`."""
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    @property
    def plan(self) -> Plan | None:
        """Which requests come to harm; setting it starts the numbering anew."""
        return self._plan

    @plan.setter
    def plan(self, plan: Plan | None) -> None:
        with self._lock:
            self._plan, self._number = plan, 0

    def counters(self) -> Counters:
        """Return what went through since the start or the last reset."""
        return self.tally.read()

    def reset_counters(self) -> None:
        """Zero the counters; the numbering of requests goes on."""
        self.tally.reset()

    def __enter__(self) -> Self:
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(128)
        self._acceptor = threading.Thread(target=self._accept, name="fault-proxy-accept", daemon=True)
        self._acceptor.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.link.stopping.set()
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept, which closing would not
        self._acceptor.join()
        self._listener.close()
        with self._lock:
            for one in self._sockets:
                with suppress(OSError):  # the peer may have gone first
                    one.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()

    def admit(
        self, method: str, target: str, range_header: str | None
    ) -> tuple[Request, Fault | Flip | None]:
        """Count a request that arrived and return it with the harm it is to come to."""
        path = unquote(target.partition("?")[0])
        self.tally.request(method)
        with self._lock:
            request = Request(self._number, method, path, *parse_range(range_header))
            if self._plan is None or (isinstance(self._plan, GetPlan) and not self._plan.wants(method, path)):
                return request, None
            self._number += 1
            return request, self._plan(request)

    def adopt(self, one: socket.socket) -> socket.socket:
        """Register a socket that stopping has to wake; ConnectionError if it came too late."""
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._lock:
            if self.link.stopping.is_set():
                one.close()
                raise ConnectionAbortedError("the proxy stops")
            self._sockets.add(one)
        return one

    def release(self, one: socket.socket) -> None:
        """Close an adopted socket; under the lock, or stopping might meet another file of the same number."""
        with self._lock:
            self._sockets.discard(one)
            one.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
                connection = _Connection(self, self.adopt(client))
            except OSError:
                if self.link.stopping.is_set():
                    return
                continue  # that client was gone before it was served
            self._threads = [thread for thread in self._threads if thread.is_alive()]
            self._threads.append(threading.Thread(target=connection.serve, name="fault-proxy", daemon=True))
            self._threads[-1].start()


class _Wire:
    """A socket with what was read beyond the last head; `gone` once a send met no peer."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.gone = False
        self._rest = bytearray()

    def read_through(self, mark: bytes) -> bytes:
        """Everything up to and including the mark; ConnectionError if the peer closed before."""
        while (at := self._rest.find(mark)) < 0:
            piece = self.sock.recv(65536)
            if not piece or len(self._rest) > _HEAD_LIMIT:
                raise ConnectionError("no end of a head or line")
            self._rest += piece
        end = at + len(mark)
        found = bytes(self._rest[:end])
        del self._rest[:end]
        return found

    def receive(self, view: memoryview) -> int:
        """Fill the front of a buffer; 0 at the end of the stream."""
        if not self._rest:
            return self.sock.recv_into(view)
        count = min(len(view), len(self._rest))
        view[:count] = self._rest[:count]
        del self._rest[:count]
        return count

    def send(self, data: bytes | memoryview) -> int:
        """Send all and return 0, or how many bytes were left over when the peer was gone."""
        view = memoryview(data)
        try:
            while view:
                view = view[self.sock.send(view) :]
        except OSError:
            self.gone = True
        return len(view)


class _Connection:
    """One client, request after request."""

    def __init__(self, proxy: FaultProxy, client: socket.socket) -> None:
        self._proxy, self._client = proxy, _Wire(client)
        self._upstream: _Wire | None = None
        self._buffer = memoryview(bytearray(BUFFER_BYTES))

    def serve(self) -> None:
        try:
            with suppress(OSError):  # either side is gone, and the other learns it by the closed connection
                while self._exchange():
                    pass
        finally:
            self._drop_upstream()
            self._proxy.release(self._client.sock)

    def _exchange(self) -> bool:
        """Serve one request; True if the connection can take another."""
        asked = Head(self._client.read_through(END_OF_HEAD))
        request, fault = self._proxy.admit(asked.words[0], asked.words[1], asked.fields.get("range"))
        self._proxy.link.delay()
        if fault is Fault.UNAVAILABLE:
            return self._refuse(request, asked)
        upstream = self._fresh_upstream()
        upstream.send(asked.raw)
        if not asked.expects_continue:
            self._upload(asked, upstream)
        answer = Head(upstream.read_through(END_OF_HEAD))
        body_awaited = asked.expects_continue
        while answer.status < 200:
            self._send(self._client, answer.raw)
            if answer.status == 100 and body_awaited:
                self._upload(asked, upstream)
                body_awaited = False
            answer = Head(upstream.read_through(END_OF_HEAD))
        keep = self._answer(request, answer, upstream, fault)
        if upstream.gone:
            self._drop_upstream()
        return keep and not asked.closes and not body_awaited  # whether a body still comes, nobody knows

    def _refuse(self, request: Request, asked: Head) -> bool:
        """Answer 503 without asking the gateway."""
        if not asked.expects_continue:
            self._upload(asked, None)
        self._proxy.tally.harm(Fault.UNAVAILABLE, request.path)
        head = (
            "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/xml\r\n"
            f"Content-Length: {len(_SLOW_DOWN)}\r\n"
        )
        head += "Connection: close\r\n\r\n" if asked.expects_continue else "\r\n"
        self._send(self._client, head.encode())
        if request.method != "HEAD":
            self._body_to_client(_SLOW_DOWN)
        return not (asked.expects_continue or asked.closes)

    def _upload(self, asked: Head, upstream: _Wire | None) -> None:
        """Carry the request's body, to its end even if the gateway has answered and closed before.

        To close with unread bytes would be a reset, and that may overtake the answer.
        """
        if asked.chunked:
            self._carry_chunks(self._client, upstream)
        else:
            self._carry(self._client, upstream, asked.length or 0)

    def _answer(self, request: Request, answer: Head, upstream: _Wire, fault: Fault | Flip | None) -> bool:
        """Carry the answer to the client, harmed as planned; True if the connection stays open."""
        bodyless = request.method == "HEAD" or answer.status in (204, 304)
        length = 0 if bodyless else answer.length
        harm = possible_harm(request, answer, length, fault)
        if harm is not None:
            self._proxy.tally.harm(harm, request.path)
        if harm in (Fault.RESET, Fault.TRUNCATED, Fault.STALL):
            return self._break_off(answer, upstream, length, harm)
        if harm is Fault.SHORT:
            assert length is not None
            self._send(self._client, answer.shortened(length // 2))
            self._carry(upstream, self._client, length // 2)
            self._drop_upstream()
            return not answer.closes
        self._send(self._client, answer.raw)
        if length is None and answer.chunked:
            self._carry_chunks(upstream, self._client)
        else:
            flip = (harm.offset - answer.object_start, 1 << harm.bit) if isinstance(harm, Flip) else None
            self._carry(upstream, self._client, length, flip)
        return (length is not None or answer.chunked) and not answer.closes

    def _break_off(self, answer: Head, upstream: _Wire, length: int | None, harm: Fault | Flip) -> bool:
        """Send half of the body, if there is one, and end the connection in one of three ways."""
        if length:
            self._send(self._client, answer.raw)
            self._carry(upstream, self._client, length // 2)
        self._drop_upstream()
        if harm is Fault.RESET:
            self._client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        while harm is Fault.STALL and self._client.sock.recv(4096):
            pass
        return False

    def _carry(
        self, source: _Wire, sink: _Wire | None, length: int | None, flip: tuple[int, int] | None = None
    ) -> None:
        """Stream a body of so many bytes, or to the end of the stream.

        Args:
            source: Where it comes from; ConnectionError if it ends early.
            sink: Where it goes; None drops it. ConnectionError if that is the client and it is gone.
            length: Bytes to carry.
            flip: Which byte of the body to exclusive-or with what.
        """
        done = 0
        while length is None or done < length:
            room = self._proxy.link.piece if length is None else min(self._proxy.link.piece, length - done)
            count = source.receive(self._buffer[:room])
            if count == 0 and length is None:
                break
            if count == 0:
                raise ConnectionError("the body ended early")
            piece = self._buffer[:count]
            if flip is not None and done <= flip[0] < done + count:
                piece[flip[0] - done] ^= flip[1]
            done += count
            if sink is self._client:
                self._body_to_client(piece)
            else:
                self._proxy.tally.up(count)
                self._proxy.link.carry(count)
                self._send(sink, piece)

    def _carry_chunks(self, source: _Wire, sink: _Wire | None) -> None:
        """Stream a chunked body with its framing; otherwise like `_carry`."""
        size = 1
        while size > 0:
            line = source.read_through(b"\r\n")
            self._send(sink, line)
            size = int(line.partition(b";")[0], 16)
            if size > 0:
                self._carry(source, sink, size)
                self._send(sink, source.read_through(b"\r\n"))
        while line != b"\r\n":  # trailers, and the empty line
            line = source.read_through(b"\r\n")
            self._send(sink, line)

    def _send(self, sink: _Wire | None, data: bytes | memoryview) -> None:
        """Send what is not counted here; a gateway that is gone may still have answered, a client has not."""
        if sink is not None and sink.send(data) and sink is self._client:
            raise ConnectionError("the client is gone")

    def _body_to_client(self, data: bytes | memoryview) -> None:
        """Send part of a body, counted before the client can have it."""
        self._proxy.link.carry(len(data))
        self._proxy.tally.down(len(data))
        if left := self._client.send(data):
            self._proxy.tally.down(-left)
            raise ConnectionError("the client is gone")

    def _fresh_upstream(self) -> _Wire:
        """Return the connection to the gateway, a new one if there is none or the gateway closed it."""
        if self._upstream is not None:
            poll = select.poll()
            poll.register(self._upstream.sock, select.POLLIN)
            if poll.poll(0):  # nothing was asked, so it can only be the end
                self._drop_upstream()
        if self._upstream is None:
            made = socket.create_connection(self._proxy.upstream, timeout=10)
            made.settimeout(None)
            self._upstream = _Wire(self._proxy.adopt(made))
        return self._upstream

    def _drop_upstream(self) -> None:
        if self._upstream is not None:
            self._proxy.release(self._upstream.sock)
            self._upstream = None


class ProxyProcess:
    """A `FaultProxy` with `random_faults` in a process of its own, as a context manager.

    Args:
        upstream: The gateway's URL.
        share, seed, kinds, paths: See `random_faults`.
        latency, bandwidth: See `FaultProxy`.

    It dies with the thread that started it, whatever ends that one.
    """

    def __init__(
        self,
        upstream: str,
        share: float = 0.0,
        seed: int = 0,
        *,
        kinds: Sequence[Fault] = tuple(Fault),
        paths: str = ".tar",
        latency: float = 0.0,
        bandwidth: float | None = None,
    ) -> None:
        self._command = [sys.executable, "-m", "tests.fault_proxy", "--upstream", upstream, "--paths", paths]
        self._command += ["--share", str(share), "--seed", str(seed), "--latency", str(latency)]
        self._command += ["--kinds", *kinds]
        if bandwidth is not None:
            self._command += ["--bandwidth", str(bandwidth)]

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            tethered(self._command),
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.url: str = json.loads(self._line())["url"]
        return self

    def __exit__(self, *_: object) -> None:
        with self._process:  # closes both pipes, and the process ends with its stdin
            pass

    def counters(self) -> Counters:
        """Return what went through since the start or the last reset."""
        return self._tell("counters")

    def reset(self) -> None:
        """Zero the counters."""
        self._tell("reset")

    def set_share(self, share: float) -> None:
        """Harm another share from now on; the numbering starts anew."""
        self._tell(f"plan {share}")

    def _tell(self, line: str) -> Counters:
        assert self._process.stdin is not None
        print(line, file=self._process.stdin, flush=True)
        return Counters.from_json(self._line())

    def _line(self) -> str:
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            return line
        raise ChildProcessError("the proxy has ended; its traceback is on stderr")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a proxy until stdin ends; see the module's description."""
    parser = argparse.ArgumentParser(prog="python -m tests.fault_proxy", description=__doc__)
    parser.add_argument("--upstream", required=True, help="URL of the S3 gateway")
    parser.add_argument("--share", type=float, default=0.0, help="share of GETs that come to harm")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", type=Fault, nargs="+", default=tuple(Fault), metavar="FAULT")
    parser.add_argument("--paths", default=".tar", help="end of the paths that come to harm")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds per request")
    parser.add_argument("--bandwidth", type=float, help="body bytes per second")
    given = parser.parse_args(arguments)

    def plan(share: float) -> Plan:
        return random_faults(given.seed, share, given.kinds, given.paths)

    link = {"latency": given.latency, "bytes_per_second": given.bandwidth}
    with FaultProxy(given.upstream, plan(given.share), **link) as proxy:
        print(json.dumps({"url": proxy.url}), flush=True)
        for line in sys.stdin:
            match line.split():
                case ["reset"]:
                    proxy.reset_counters()
                case ["plan", share]:
                    proxy.plan = plan(float(share))
            print(proxy.counters().to_json(), flush=True)


def _address(upstream: tuple[str, int] | str) -> tuple[str, int]:
    if not isinstance(upstream, str):
        return upstream
    parts = urlsplit(upstream)
    if parts.scheme != "http" or not parts.hostname or not parts.port:
        raise ValueError(f"{upstream}: not http://HOST:PORT")
    return parts.hostname, parts.port


if __name__ == "__main__":
    main()
