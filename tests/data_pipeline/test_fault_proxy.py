"""The fault proxy before a real S3 server: transparent without a plan, exact in its harm and its counts."""

import http.client
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import botocore.session
import fsspec
import obstore
import obstore.exceptions
import pytest
from botocore.config import Config
from hypothesis import given
from hypothesis import strategies as st
from obstore.store import S3Store

from launch.s3server import REGION, S3Server
from tests.fault_plan import (
    Counters,
    Fault,
    GetPlan,
    Link,
    Request,
    always,
    first,
    flip_member,
    parse_range,
    random_faults,
)
from tests.fault_proxy import FaultProxy, ProxyProcess

BODY = random.Random(7).randbytes(3_000_001)
HALF = len(BODY) // 2


@pytest.fixture
def proxy(s3_server: S3Server) -> Iterator[FaultProxy]:
    before = set(threading.enumerate())
    with FaultProxy(s3_server.endpoint) as made:
        yield made
    left = [one.name for one in set(threading.enumerate()) - before if one.name.startswith("fault-proxy")]
    assert not left


@pytest.fixture
def key(s3_prefix: str) -> str:
    """Path of an object that holds BODY, put there without the proxy."""
    path = s3_prefix.removeprefix("s3://") + "/shard-000000.tar"
    fsspec.filesystem("s3").pipe_file(path, BODY)
    return path


@dataclass(frozen=True)
class Seen:
    """What a client without any cleverness got."""

    status: int
    fields: dict[str, str]
    body: bytes
    reset: bool

    @property
    def promised(self) -> int:
        return int(self.fields["content-length"])


def s3_client(endpoint: str) -> Any:
    config = Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1})
    return botocore.session.Session().create_client(
        "s3", region_name=REGION, endpoint_url=endpoint, config=config
    )


def signed(endpoint: str, path: str, method: str = "get_object") -> str:
    bucket, _, name = path.partition("/")
    url: str = s3_client(endpoint).generate_presigned_url(method, Params={"Bucket": bucket, "Key": name})
    return url


def connect(url: str) -> http.client.HTTPConnection:
    parts = urlsplit(url)
    assert parts.hostname is not None
    return http.client.HTTPConnection(parts.hostname, parts.port, timeout=60)


def ask(
    url: str,
    method: str = "GET",
    *,
    start: int | None = None,
    stop: int | None = None,
    body: bytes | None = None,
    over: http.client.HTTPConnection | None = None,
) -> Seen:
    connection = over or connect(url)
    parts = urlsplit(url)
    fields = {} if start is None else {"Range": f"bytes={start}-{'' if stop is None else stop - 1}"}
    connection.request(method, f"{parts.path}?{parts.query}", body, fields)
    response = connection.getresponse()
    pieces, reset = [], False
    try:
        while piece := response.read1(65536):
            pieces.append(piece)
        if response.length == 0:
            response.read()  # read1 alone does not free the connection for the next request
    except ConnectionResetError:
        reset = True
    if over is None:
        connection.close()
    names = {name.lower(): value for name, value in response.getheaders()}
    return Seen(response.status, names, b"".join(pieces), reset)


def s3_path(key: str) -> str:
    return "/" + key


@pytest.mark.parametrize("direct", [False, True])
def test_s3fs_works_unchanged(s3_server: S3Server, proxy: FaultProxy, s3_prefix: str, direct: bool) -> None:
    url = s3_server.endpoint if direct else proxy.url
    files = fsspec.filesystem(
        "s3", client_kwargs={"endpoint_url": url}, skip_instance_cache=True, use_listings_cache=False
    )
    folder = s3_prefix.removeprefix("s3://")
    files.pipe_file(f"{folder}/a b+ü.tar", BODY)
    files.pipe_file(f"{folder}/once", b"first", mode="create")
    with pytest.raises(OSError, match="pre-conditions"):
        files.pipe_file(f"{folder}/once", BODY, mode="create")
    assert files.cat_file(f"{folder}/a b+ü.tar") == BODY
    assert files.cat_file(f"{folder}/a b+ü.tar", start=10, end=2_000_000) == BODY[10:2_000_000]
    assert files.info(f"{folder}/a b+ü.tar")["size"] == len(BODY)
    assert files.cat_file(f"{folder}/once") == b"first"
    assert files.ls(folder, detail=False) == [f"{folder}/a b+ü.tar", f"{folder}/once"]
    with pytest.raises(FileNotFoundError):
        files.cat_file(f"{folder}/absent")
    files.rm_file(f"{folder}/once")
    assert not files.exists(f"{folder}/once")
    assert (proxy.counters().requests == 0) is direct


def test_s3fs_uploads_in_parts(proxy: FaultProxy, s3_prefix: str) -> None:
    files = fsspec.filesystem("s3", client_kwargs={"endpoint_url": proxy.url}, skip_instance_cache=True)
    path = s3_prefix.removeprefix("s3://") + "/large"
    body = BODY * 5
    with files.open(path, "wb", block_size=6_000_000) as file:
        file.write(body)
    assert files.cat_file(path) == body
    assert proxy.counters().bytes_up >= len(body)


def test_obstore_works_unchanged(proxy: FaultProxy, s3_prefix: str) -> None:
    folder = s3_prefix.removeprefix("s3://").partition("/")[2]
    store = S3Store(
        "tests",
        config={"endpoint": proxy.url, "region": REGION},
        client_options={"allow_http": True},
        retry_config={"max_retries": 0},
    )
    obstore.put(store, f"{folder}/a.tar", BODY, use_multipart=False)
    obstore.put(store, f"{folder}/once", b"first", mode="create", use_multipart=False)
    with pytest.raises(obstore.exceptions.AlreadyExistsError):
        obstore.put(store, f"{folder}/once", BODY, mode="create", use_multipart=False)
    assert bytes(obstore.get(store, f"{folder}/a.tar").bytes()) == BODY
    pieces = obstore.get_ranges(store, f"{folder}/a.tar", starts=[5, 2_500_000], ends=[9, 3_000_001])
    assert [bytes(piece) for piece in pieces] == [BODY[5:9], BODY[2_500_000:]]
    assert obstore.head(store, f"{folder}/a.tar")["size"] == len(BODY)
    assert [one["path"] for one in obstore.list(store, folder).collect()] == [
        f"{folder}/a.tar",
        f"{folder}/once",
    ]
    assert proxy.counters().bytes_up == 2 * len(BODY) + len(b"first")
    assert not proxy.counters().faults


def test_botocore_waits_for_100_continue(proxy: FaultProxy, key: str) -> None:
    bucket, _, name = key.partition("/")
    client = s3_client(proxy.url)
    asked: list[str] = []
    client.meta.events.register(
        "before-send.s3.PutObject", lambda request, **_: asked.append(str(request.headers))
    )
    client.put_object(Bucket=bucket, Key=name, Body=BODY[:1000])
    assert "100-continue" in asked[0]
    assert ask(signed(proxy.url, key)).body == BODY[:1000]
    proxy.plan = lambda request: Fault.UNAVAILABLE if request.method == "PUT" else None
    with pytest.raises(client.exceptions.ClientError, match="SlowDown"):
        client.put_object(Bucket=bucket, Key=name, Body=BODY)
    assert proxy.counters().faults == Counter({Fault.UNAVAILABLE: 1})
    assert ask(signed(proxy.url, key)).body == BODY[:1000]


def test_bodies_are_counted_to_the_byte_on_one_connection(proxy: FaultProxy, key: str) -> None:
    get, head = signed(proxy.url, key), signed(proxy.url, key, "head_object")
    connection = connect(proxy.url)
    assert ask(get, over=connection).body == BODY
    assert ask(get, over=connection, start=100, stop=228).body == BODY[100:228]
    described = ask(head, "HEAD", over=connection)
    assert (described.promised, described.body) == (len(BODY), b"")
    assert proxy.counters() == Counters(3, 2, len(BODY) + 128, 0)
    assert ask(signed(proxy.url, key, "put_object"), "PUT", over=connection, body=BODY[:777]).status == 200
    assert ask(get, over=connection).body == BODY[:777]
    assert ask(signed(proxy.url, key, "delete_object"), "DELETE", over=connection).status == 204
    absent = ask(get, over=connection)
    assert absent.status == 404
    connection.close()
    assert proxy.counters() == Counters(7, 4, len(BODY) + 128 + 777 + len(absent.body), 777)
    proxy.reset_counters()
    assert proxy.counters() == Counters()


def test_unavailable_does_not_ask_the_gateway(proxy: FaultProxy, key: str) -> None:
    proxy.plan = first(1, Fault.UNAVAILABLE)
    connection = connect(proxy.url)
    missing = signed(proxy.url, key.replace("shard-000000", "absent"))
    refused, asked = ask(missing, over=connection), ask(missing, over=connection)
    connection.close()
    assert refused.status == 503
    assert b"<Code>SlowDown</Code>" in refused.body
    assert asked.status == 404
    assert proxy.counters() == Counters(
        2, 2, len(refused.body) + len(asked.body), 0, Counter({Fault.UNAVAILABLE: 1})
    )


def test_reset_comes_amid_the_body(proxy: FaultProxy, key: str) -> None:
    proxy.plan = always(Fault.RESET)
    seen = ask(signed(proxy.url, key), start=0, stop=20_000)
    assert (seen.status, seen.promised, seen.reset) == (206, 20_000, True)
    assert seen.body == BODY[: len(seen.body)]
    assert proxy.counters() == Counters(1, 1, 10_000, 0, Counter({Fault.RESET: 1}))


def test_reset_loses_the_answer_to_a_put_that_was_done(proxy: FaultProxy, key: str) -> None:
    proxy.plan = lambda request: Fault.RESET if request.method == "PUT" else None
    with pytest.raises(ConnectionResetError):
        ask(signed(proxy.url, key, "put_object"), "PUT", body=b"new")
    assert proxy.counters() == Counters(1, 0, 0, 3, Counter({Fault.RESET: 1}))
    assert ask(signed(proxy.url, key)).body == b"new"


def test_truncated_breaks_its_promise(proxy: FaultProxy, key: str) -> None:
    proxy.plan = always(Fault.TRUNCATED)
    seen = ask(signed(proxy.url, key))
    assert (seen.status, seen.promised, seen.body, seen.reset) == (200, len(BODY), BODY[:HALF], False)
    assert proxy.counters() == Counters(1, 1, HALF, 0, Counter({Fault.TRUNCATED: 1}))


def test_short_is_consistent_and_leaves_the_connection_usable(proxy: FaultProxy, key: str) -> None:
    proxy.plan = first(2, Fault.SHORT)
    connection, url = connect(proxy.url), signed(proxy.url, key)
    ranged = ask(url, over=connection, start=1000, stop=2000)
    assert (ranged.status, ranged.promised, ranged.body) == (206, 500, BODY[1000:1500])
    assert ranged.fields["content-range"] == f"bytes 1000-1499/{len(BODY)}"
    whole = ask(url, over=connection)
    assert (whole.status, whole.promised, whole.body) == (200, HALF, BODY[:HALF])
    assert ask(url, over=connection).body == BODY
    connection.close()
    assert proxy.counters() == Counters(3, 3, 500 + HALF + len(BODY), 0, Counter({Fault.SHORT: 2}))


def test_flip_turns_one_bit_and_says_where(proxy: FaultProxy, key: str) -> None:
    proxy.plan = always(Fault.FLIP)
    url = signed(proxy.url, key)
    seen = [ask(url, start=500_000).body for _ in range(3)]
    places = []
    for body in seen:
        turned = [
            (at, one ^ other)
            for at, (one, other) in enumerate(zip(body, BODY[500_000:], strict=True))
            if one != other
        ]
        assert [difference.bit_count() for _, difference in turned] == [1]
        places.append((s3_path(key), 500_000 + turned[0][0]))
    counters = proxy.counters()
    assert counters.flips == places
    assert counters == Counters(3, 3, 3 * len(seen[0]), 0, Counter({Fault.FLIP: 3}), places)
    proxy.plan = always(Fault.FLIP)
    assert [ask(url, start=500_000).body for _ in range(3)] == seen, "places depend on the number alone"


def test_a_damaged_member_is_damaged_in_every_answer_that_covers_it(proxy: FaultProxy, key: str) -> None:
    start, stop = 1_048_000, 1_049_000
    proxy.plan = flip_member("shard-000000.tar", start, stop)
    url = signed(proxy.url, key)
    bodies = [
        ask(url).body[start:stop],
        ask(url, start=start, stop=stop).body,
        ask(url, start=start - 5, stop=stop + 5).body[5:-5],
        ask(url, start=len(BODY) // 4).body[start - len(BODY) // 4 : stop - len(BODY) // 4],
    ]
    assert len(set(bodies)) == 1
    assert bin(int.from_bytes(bodies[0]) ^ int.from_bytes(BODY[start:stop])).count("1") == 1
    assert ask(url, start=0, stop=start).body == BODY[:start]
    assert ask(url, start=stop).body == BODY[stop:]
    assert proxy.counters().flips == [(s3_path(key), 1_048_500)] * 4
    assert proxy.counters().faults == Counter({Fault.FLIP: 4})


def test_stall_ends_with_the_proxy_and_leaves_nothing(s3_server: S3Server, key: str) -> None:
    files_before = len(list(Path("/proc/self/fd").iterdir()))
    threads_before = set(threading.enumerate())
    with FaultProxy(s3_server.endpoint, always(Fault.STALL)) as proxy:
        url = signed(proxy.url, key)
        connection = connect(url)
        connection.request("GET", url.removeprefix(proxy.url))
        response = connection.getresponse()
        received = response.read(HALF)
        idle = socket.create_connection(("127.0.0.1", int(proxy.url.rpartition(":")[2])))
        gone = connect(url)
        gone.request("GET", url.removeprefix(proxy.url))
        gone.getresponse().read(HALF)
        gone.close()
    assert received == BODY[:HALF]
    assert int(response.headers["Content-Length"]) == len(BODY)
    assert response.read1() == b"", "not one byte more, and the end came by the proxy's"
    connection.close()
    idle.close()
    assert proxy.counters() == Counters(2, 2, 2 * HALF, 0, Counter({Fault.STALL: 2}))
    left = [one.name for one in set(threading.enumerate()) - threads_before]
    assert not [name for name in left if name.startswith("fault-proxy")]
    assert len(list(Path("/proc/self/fd").iterdir())) <= files_before


def test_stopping_does_not_wait_for_a_slow_link(s3_server: S3Server, key: str) -> None:
    with FaultProxy(s3_server.endpoint, bytes_per_second=100.0) as proxy:
        url = signed(proxy.url, key)
        connection = connect(url)
        connection.request("GET", url.removeprefix(proxy.url))
        response = connection.getresponse()
        assert response.read(2) == BODY[:2]
    assert len(response.read1(len(BODY))) < 10_000
    connection.close()


def test_a_limited_link_carries_everything(s3_server: S3Server, key: str) -> None:
    with FaultProxy(s3_server.endpoint, latency=0.001, bytes_per_second=50e6) as proxy:
        assert ask(signed(proxy.url, key)).body == BODY
        assert ask(signed(proxy.url, key, "put_object"), "PUT", body=BODY).status == 200
        assert proxy.counters() == Counters(2, 1, len(BODY), len(BODY))


class Clock(threading.Event):
    """A clock that waiting moves."""

    now = 0.0

    def wait(self, timeout: float | None = None) -> bool:
        self.now += timeout or 0.0
        return False


@given(st.lists(st.tuples(st.integers(1, 10**6), st.sampled_from([0.0, 0.5]))), st.floats(10.0, 1e9))
def test_a_link_never_carries_more_than_its_rate(loads: list[tuple[int, float]], rate: float) -> None:
    clock = Clock()
    link = Link(0.0, rate, lambda: clock.now)
    link.stopping = clock
    idle = 0.0
    for count, pause in loads:
        clock.now += pause  # an idle link saves nothing up
        idle += pause
        link.carry(count)
    assert clock.now == pytest.approx(idle + sum(count for count, _ in loads) / rate)


def test_a_dead_gateway_ends_the_connection(s3_server: S3Server) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # taken, but not listening
        with FaultProxy(nobody.getsockname()) as proxy, pytest.raises(http.client.RemoteDisconnected):
            ask(signed(proxy.url, "tests/any"))


def test_chunks_pass_both_ways() -> None:
    """No S3 client sends them here, and the gateway rarely: a hand-made gateway that echoes what it got."""
    message = (
        b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"5;note=1\r\nhello\r\nA\r\n0123456789\r\n0\r\nTrailer: 1\r\n\r\n"
    )
    answer = b"HTTP/1.1 200 OK" + message[message.index(b"\r\n") :]
    with socket.create_server(("127.0.0.1", 0)) as gateway:

        def echo() -> None:
            link, _ = gateway.accept()
            with link:
                for _ in range(2):
                    got = b""
                    while len(got) < len(message):
                        got += link.recv(len(message) - len(got))
                    link.sendall(b"HTTP/1.1 200 OK" + got[got.index(b"\r\n") :])

        thread = threading.Thread(target=echo)
        thread.start()
        with (
            FaultProxy(gateway.getsockname()) as proxy,
            socket.create_connection(("127.0.0.1", int(proxy.url.rpartition(":")[2]))) as client,
        ):
            for _ in range(2):
                client.sendall(message)
                got = b""
                while len(got) < len(answer):
                    got += client.recv(len(answer) - len(got))
                assert got == answer
            thread.join()
            assert proxy.counters() == Counters(2, 0, 30, 30)


def test_an_answer_before_the_end_of_the_upload_arrives() -> None:
    """SeaweedFS reads what it refuses to its end; this hand-made gateway resets the connection instead."""
    with socket.create_server(("127.0.0.1", 0)) as gateway:

        def refuse() -> None:
            for _ in range(2):
                link, _ = gateway.accept()
                with link:
                    link.recv(1)
                    link.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno")
                    link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

        thread = threading.Thread(target=refuse)
        thread.start()
        with FaultProxy(gateway.getsockname()) as proxy:
            connection = connect(proxy.url)
            for _ in range(2):
                seen = ask(f"{proxy.url}/b/key", "PUT", body=BODY * 10, over=connection)
                assert (seen.status, seen.body) == (403, b"no")
            connection.close()
            thread.join()
            assert proxy.counters() == Counters(2, 0, 4, 20 * len(BODY))


def test_many_clients_are_counted_exactly(proxy: FaultProxy, key: str) -> None:
    url = signed(proxy.url, key)
    proxy.plan = first(5, Fault.SHORT)
    received: list[int] = []

    def read() -> None:
        received.extend(
            len(ask(url, start=at, stop=at + 200_000).body) for at in range(0, 2_000_000, 200_000)
        )

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(received) == Counter({200_000: 75, 100_000: 5})
    assert proxy.counters() == Counters(80, 80, sum(received), 0, Counter({Fault.SHORT: 5}))


@given(st.integers(0, 2**32), st.floats(0.0, 1.0), st.sets(st.sampled_from(Fault), min_size=1))
def test_random_faults_depend_on_seed_and_number_alone(seed: int, share: float, kinds: set[Fault]) -> None:
    def drawn(plan: GetPlan, order: list[int], path: str) -> list[object]:
        return [plan(Request(number, "GET", path)) for number in order]

    order = sorted(kinds)
    one, other = (random_faults(seed, share, order) for _ in range(2))
    forwards = drawn(one, list(range(50)), "/b/a.tar")
    assert forwards == drawn(other, list(range(49, -1, -1)), "/b/c.tar")[::-1]
    assert set(forwards) <= {None, *kinds}
    assert one(Request(0, "PUT", "/b/a.tar")) is None
    assert drawn(random_faults(seed, 1.0, order), list(range(9)), "/b/a.idx") == [None] * 9
    assert None not in drawn(random_faults(seed, 1.0, order), list(range(9)), "/b/a.tar")


def test_random_faults_come_in_their_share_and_evenly() -> None:
    plan = random_faults(3, 0.1)
    drawn = Counter(plan(Request(number, "GET", "/b/a.tar")) for number in range(20_000))
    assert 1_800 < 20_000 - drawn[None] < 2_200
    assert all(250 < drawn[kind] < 420 for kind in Fault)


@pytest.mark.parametrize(
    ("header", "parsed"),
    [
        (None, (0, None)),
        ("bytes=0-0", (0, 1)),
        ("bytes=5-", (5, None)),
        ("bytes=-7", (-7, None)),
        ("bytes=-", (0, None)),
        ("bytes=1-2,4-5", (0, None)),
    ],
)
def test_parse_range(header: str | None, parsed: tuple[int, int | None]) -> None:
    assert parse_range(header) == parsed


def test_the_plan_sees_decoded_paths_and_ranges(proxy: FaultProxy, key: str) -> None:
    seen: list[Request] = []
    proxy.plan = seen.append
    ask(signed(proxy.url, "tests/ä b.tar"), start=3, stop=9)
    ask(signed(proxy.url, key, "head_object"), "HEAD")
    assert seen == [Request(0, "GET", "/tests/ä b.tar", 3, 9), Request(1, "HEAD", s3_path(key))]


def test_a_process_of_its_own(s3_server: S3Server, key: str) -> None:
    with ProxyProcess(s3_server.endpoint, 1.0, seed=3, kinds=[Fault.FLIP]) as proxy:
        url = signed(proxy.url, key)
        assert ask(url).body != BODY
        counters = proxy.counters()
        assert counters == Counters(1, 1, len(BODY), 0, Counter({Fault.FLIP: 1}), counters.flips)
        assert [path for path, _ in counters.flips] == [s3_path(key)]
        proxy.set_share(0.0)
        proxy.reset()
        assert proxy.counters() == Counters()
        assert ask(url).body == BODY
        assert proxy.counters() == Counters(1, 1, len(BODY))
        process = proxy._process
    assert process.returncode == 0
    with pytest.raises(ConnectionRefusedError):
        ask(url)
