"""What a start in the middle of an epoch costs in bytes, counted by a proxy before the store."""

import statistics
from typing import Final

from benchmarks.data_stream.bars import at_least, at_most
from benchmarks.data_stream.contenders import OURS, STOCK
from benchmarks.data_stream.site import Site
from benchmarks.harness import Record
from benchmarks.report import Bar, table
from tests.fault_proxy import ProxyProcess

FRACTIONS: Final = (0.1, 0.5, 0.9)
RESUME_BATCH: Final = 256
"""Pictures of a batch: of fewer, their own sizes would differ by more than what is measured."""
SPREAD_TARGET: Final = 1.05
LIMIT_BYTES: Final = 32 << 20
"""And two batches."""
SKIP_TARGET: Final = 50.0
RESUME_HEADER: Final = ("contender", "start at", "requests", "bytes before the first batch")


class Start(Record):
    """Starts of fresh processes at one place of the epoch.

    Attributes:
        contender: Whose.
        fraction: Of the epoch at which they begin.
        requests: That arrived before the first batch was there, on average.
        bytes: That were answered: index, records, pictures; on average.
        each: Bytes of each start.
    """

    contender: str
    fraction: float
    requests: float
    bytes: float
    each: list[int]

    def row(self) -> tuple[str, ...]:
        """The cells of `RESUME_HEADER`."""
        return self.contender, f"{self.fraction:.0%}", f"{self.requests:.1f}", f"{self.bytes:,.0f}"


def measure_resume(site: Site, repeats: int) -> list[Start]:
    """Start ours at several places and let WebDataset skip to the last of them.

    Args:
        site: Where.
        repeats: Starts, a batch apart, that are averaged at each place: of few pictures sizes differ.
    """
    with ProxyProcess(site.server.endpoint) as proxy:
        starts = [_start(site, proxy, OURS, fraction, repeats) for fraction in FRACTIONS]
        starts.append(_start(site, proxy, STOCK, FRACTIONS[-1], 1))
    print(table(RESUME_HEADER, [start.row() for start in starts]))
    return starts


def _start(site: Site, proxy: ProxyProcess, contender: str, fraction: float, count: int) -> Start:
    first = int(fraction * site.data.pictures)
    requests, each = [], []
    for position in range(first, first + count * RESUME_BATCH, RESUME_BATCH):
        proxy.reset()
        job = site.job(contender, endpoint=proxy.url, batch=RESUME_BATCH)
        with site.start(job, proxy.url) as process:
            delivered = process.ask("first_batch", position=position)
            counted = proxy.counters()
        assert delivered == min(RESUME_BATCH, site.data.pictures - position) or contender == OURS
        requests.append(counted.requests)
        each.append(counted.bytes_down)
    return Start(
        contender=contender,
        fraction=fraction,
        requests=statistics.fmean(requests),
        bytes=statistics.fmean(each),
        each=each,
    )


def resume_bars(starts: list[Start], batch_bytes: float) -> list[Bar]:
    """Judge the starts.

    Args:
        starts: All of them.
        batch_bytes: Of a batch's pictures, on average.
    """
    if not starts:
        return []
    ours = [start.bytes for start in starts if start.contender == OURS]
    (skipped,) = (start.bytes for start in starts if start.contender == STOCK)
    limit = LIMIT_BYTES + 2 * batch_bytes
    shown = ", ".join(f"{bytes_:,.0f}" for bytes_ in ours)
    return [
        at_most(
            "stream-resume-spread", SPREAD_TARGET, max(ours) / min(ours), f"largest over least of {shown}"
        ),
        at_most("stream-resume-bytes", limit / 2**20, max(ours) / 2**20, f"MiB, the largest of {shown}"),
        at_least(
            "stream-resume-webdataset-skip",
            SKIP_TARGET,
            skipped / ours[-1],
            f"webdataset reads {skipped:,.0f} bytes to skip to {FRACTIONS[-1]:.0%}, ours {ours[-1]:,.0f}",
        ),
    ]
