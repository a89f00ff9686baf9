"""A peer that is a library as pip installs it."""

from dataclasses import dataclass

from benchmarks.report import installed


@dataclass(frozen=True)
class LibraryPeer:
    """Who does the same work.

    Attributes:
        name: In tables and bars.
        distribution: What pip calls it.
        source: Where its documentation and code stand.
    """

    name: str
    distribution: str
    source: str

    @property
    def version(self) -> str | None:
        """Of the installed distribution; None if it is not installed."""
        return installed(self.distribution)
