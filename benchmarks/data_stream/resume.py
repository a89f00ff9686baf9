"""What a start in the middle of an epoch costs in bytes, counted by a proxy before the store."""

from typing import Final

from benchmarks.data_stream.bars import at_least, at_most
from benchmarks.data_stream.contenders import OURS, STOCK
from benchmarks.data_stream.job import BATCH
from benchmarks.data_stream.site import Site
from benchmarks.harness import Record
from benchmarks.report import Bar, table
from tests.fault_proxy import ProxyProcess

FRACTIONS: Final = (0.1, 0.5, 0.9)
SPREAD_TARGET: Final = 1.05
LIMIT_BYTES: Final = 32 << 20
"""And two batches."""
SKIP_TARGET: Final = 50.0
RESUME_HEADER: Final = ("contender", "start at", "requests", "bytes before the first batch")


class Start(Record):
    """A start of a fresh process.

    Attributes:
        contender: Whose.
        fraction: Of the epoch at which it begins.
        requests: That arrived before the first batch was there.
        bytes: That were answered: index, records, pictures.
    """

    contender: str
    fraction: float
    requests: int
    bytes: int

    def row(self) -> tuple[str, ...]:
        """The cells of `RESUME_HEADER`."""
        return self.contender, f"{self.fraction:.0%}", str(self.requests), f"{self.bytes:,}"


def measure_resume(site: Site) -> list[Start]:
    """Start ours at several places and let WebDataset skip to the last of them."""
    with ProxyProcess(site.server.endpoint) as proxy:
        starts = [_start(site, proxy, OURS, fraction) for fraction in FRACTIONS]
        starts.append(_start(site, proxy, STOCK, FRACTIONS[-1]))
    print(table(RESUME_HEADER, [start.row() for start in starts]))
    return starts


def _start(site: Site, proxy: ProxyProcess, contender: str, fraction: float) -> Start:
    position = int(fraction * site.data.pictures)
    proxy.reset()
    with site.start(site.job(contender, endpoint=proxy.url), proxy.url) as process:
        delivered = process.ask("first_batch", position=position)
        counted = proxy.counters()
    assert delivered == min(BATCH, site.data.pictures - position) or contender == OURS
    return Start(contender=contender, fraction=fraction, requests=counted.requests, bytes=counted.bytes_down)


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
    shown = ", ".join(f"{bytes_:,}" for bytes_ in ours)
    return [
        at_most(
            "stream-resume-spread", SPREAD_TARGET, max(ours) / min(ours), f"largest over least of {shown}"
        ),
        at_most("stream-resume-bytes", limit / 2**20, max(ours) / 2**20, f"MiB, the largest of {shown}"),
        at_least(
            "stream-resume-webdataset-skip",
            SKIP_TARGET,
            skipped / ours[-1],
            f"webdataset reads {skipped:,} bytes to skip to {FRACTIONS[-1]:.0%}, ours {ours[-1]:,}",
        ),
    ]
