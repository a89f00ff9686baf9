"""Streaming from a store of whose answers every tenth is faulty, beside the same store without faults."""

from collections import Counter
from functools import partial
from typing import Final, NamedTuple

from benchmarks.data_build.running import Rate
from benchmarks.data_stream.bars import at_least, at_most, by_cpu
from benchmarks.data_stream.contenders import OURS
from benchmarks.data_stream.process import ContenderProcess
from benchmarks.data_stream.site import Site
from benchmarks.data_stream.speed import RATE_HEADER
from benchmarks.harness import Load, Record, take_turns, tree_seconds
from benchmarks.process import Hang
from benchmarks.report import Bar, ratio_bar, table
from tests.fault_plan import Fault
from tests.fault_proxy import ProxyProcess

SHARE: Final = 0.1
"""Of the answers that come to harm."""
REQUEST_TIMEOUT: Final = 2.0
THROUGHPUT_TARGET: Final = 0.7
AMPLIFICATION_TARGET: Final = 1.3
FLIPS: Final = 1000
"""Flips that `--faults` waits for."""
_HANG_SECONDS: Final = 300.0
_FLIP_SHARE: Final = SHARE / len(Fault)
"""Of the answers that have a bit turned: as many as when all kinds share the faults."""
_FLIP_PREFETCH: Final = 1 << 20  # small segments make many requests, and so many flips
_CLEAN, _FAULTY = "clean", "10 % faulty"


class Faults(Record):
    """What was measured.

    Attributes:
        rates: Without and with faults.
        bytes: Answered in one epoch of each, by name.
        injected: Faults of the timed epochs, by kind.
        same_order: Whether the faulty epochs' pictures are those of the clean one, in its order.
        flips_wanted: Bits that were to be turned; 0: as many as one epoch brings.
        flips: Bits turned by the proxy that turns nothing but bits.
        flips_requests: Requests among which they were.
        stops: Errors that ended the stream there, for one member met three flips in a row; it went on at its
            cursor.
        damaged: Pictures delivered there that are not those of the clean epoch.
        hangs: Epochs that did not end.
        loads: The machine meanwhile.
    """

    rates: dict[str, Rate]
    bytes: dict[str, list[int]]
    injected: dict[str, int]
    same_order: bool
    flips_wanted: int
    flips: int
    flips_requests: int
    stops: int
    damaged: int
    hangs: int
    loads: list[Load]

    def bars(self) -> list[Bar]:
        """Judge."""
        hangs = at_most("stream-faults-hangs", 0, self.hangs, "epochs that did not end")
        if self.hangs:
            return [hangs]
        clean, faulty = self.rates[_CLEAN], self.rates[_FAULTY]
        amplification = sum(self.bytes[_FAULTY]) / sum(self.bytes[_CLEAN])
        shown = ", ".join(f"{count} {kind}" for kind, count in self.injected.items())
        wall = f"{clean.per_second:.0f} img/s clean, {faulty.per_second:.0f} with {shown}"
        cpu = f"{clean.median_cpu:.3f} CPU s clean, {faulty.median_cpu:.3f} with {shown}"
        damaged = (
            f"damaged pictures delivered of {self.flips} bits turned in {self.flips_requests} requests; "
            f"{self.stops} times the stream stopped with an error and went on at its cursor"
        )
        return [
            # The clean run stands where a peer would: how much of its speed is left.
            ratio_bar("stream-faults-throughput-wall", THROUGHPUT_TARGET, faulty, clean, wall),
            ratio_bar("stream-faults-throughput-cpu", THROUGHPUT_TARGET, by_cpu(faulty), by_cpu(clean), cpu),
            at_least("stream-faults-same-order", 1, float(self.same_order), "SHA-256 of pixels in sequence"),
            at_most(
                "stream-faults-bytes", AMPLIFICATION_TARGET, amplification, "bytes over those of clean runs"
            ),
            at_most("stream-faults-damaged", 0, self.damaged, damaged),
            *(
                [at_least("stream-faults-flips", FLIPS, self.flips, "bits turned")]
                if self.flips_wanted
                else []
            ),
            hangs,
        ]


def measure_faults(site: Site, repeats: int, flips: int) -> Faults:
    """Stream without and with faults in turns, then through a proxy that turns bits.

    Args:
        site: Where.
        repeats: Epochs of each.
        flips: Go on until so many bits were turned; 0: one epoch.
    """
    job = site.job(OURS, request_timeout=REQUEST_TIMEOUT)
    endpoint = site.server.endpoint
    with (
        ProxyProcess(endpoint) as clean_proxy,
        ProxyProcess(endpoint, SHARE, seed=1) as faulty_proxy,
        site.start(job, clean_proxy.url) as clean,
        site.start(job, faulty_proxy.url) as faulty,
    ):
        bytes_: dict[str, list[int]] = {_CLEAN: [], _FAULTY: []}
        injected: Counter[Fault] = Counter()
        try:
            expected = clean.ask("digests", seconds=_HANG_SECONDS)
            same_order = faulty.ask("digests", seconds=_HANG_SECONDS) == expected
            measures = [
                partial(_epoch, clean, clean_proxy, bytes_[_CLEAN], Counter()),
                partial(_epoch, faulty, faulty_proxy, bytes_[_FAULTY], injected),
            ]
            samples, load = take_turns(measures, repeats, own=tree_seconds)
            same_order = same_order and faulty.ask("digests", seconds=_HANG_SECONDS) == expected
            bits = _turn_bits(site, expected, flips)
        except Hang as hang:
            print(hang)
            return _hung(bytes_, injected, flips)
    rates = {
        name: Rate(name=name, pictures=job.pictures, wall=each.wall, cpu=each.cpu)
        for name, each in zip((_CLEAN, _FAULTY), samples, strict=True)
    }
    print(table(RATE_HEADER, [rate.row() for rate in rates.values()]))
    print(table(("fault", "times"), [(kind, str(injected[kind])) for kind in Fault]))
    return Faults(
        rates=rates,
        bytes=bytes_,
        injected={str(kind): injected[kind] for kind in Fault},
        same_order=same_order,
        flips_wanted=flips,
        flips=bits.turned,
        flips_requests=bits.requests,
        stops=bits.stops,
        damaged=bits.damaged,
        hangs=0,
        loads=[load],
    )


def _epoch(
    process: ContenderProcess, proxy: ProxyProcess, bytes_: list[int], injected: Counter[Fault]
) -> tuple[float, float]:
    """Time one epoch and take down what the proxy saw of it."""
    proxy.reset()
    answer = process.ask("epoch", seconds=_HANG_SECONDS)
    counted = proxy.counters()
    bytes_.append(counted.bytes_down)
    injected.update(counted.faults)
    return answer["wall"], answer["cpu"]


class _Bits(NamedTuple):
    turned: int
    requests: int
    stops: int
    damaged: int


def _turn_bits(site: Site, expected: list[str], flips: int) -> _Bits:
    """Stream epoch after epoch through a proxy that turns bits, until it has turned enough."""
    job = site.job(OURS, request_timeout=REQUEST_TIMEOUT, prefetch_bytes=_FLIP_PREFETCH)
    with (
        ProxyProcess(site.server.endpoint, _FLIP_SHARE, seed=2, kinds=[Fault.FLIP]) as proxy,
        site.start(job, proxy.url) as process,
    ):
        damaged = stops = 0
        while True:
            answer = process.ask("digests_to_the_end", seconds=_HANG_SECONDS)
            stops += answer["stops"]
            damaged += sum(one != other for one, other in zip(answer["digests"], expected, strict=True))
            counted = proxy.counters()
            turned = counted.faults[Fault.FLIP]
            if turned >= flips:
                return _Bits(turned, counted.requests, stops, damaged)


def _hung(bytes_: dict[str, list[int]], injected: Counter[Fault], flips: int) -> Faults:
    return Faults(
        rates={},
        bytes=bytes_,
        injected={str(kind): count for kind, count in injected.items()},
        same_order=False,
        flips_wanted=flips,
        flips=0,
        flips_requests=0,
        stops=0,
        damaged=0,
        hangs=1,
        loads=[],
    )
