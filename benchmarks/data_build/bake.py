"""Building with pictures coded anew, and the same coding alone: what the build adds to it."""

import time
from dataclasses import dataclass, field
from pathlib import Path

from data_pipeline.fit import Form, fit
from data_pipeline.team import Team


@dataclass
class InMemory:
    """What a process of the team holds: its share of the pictures' bytes.

    Attributes:
        folder: Where the pictures lie.
        parts: How many processes there are; every `parts`-th picture is one's share.
    """

    folder: Path
    parts: int
    _held: dict[int, list[bytes]] = field(default_factory=dict)

    def share(self, part: int) -> list[bytes]:
        """Read a share from disk, once."""
        if part not in self._held:
            paths = sorted(self.folder.iterdir())[part :: self.parts]
            self._held[part] = [path.read_bytes() for path in paths]
        return self._held[part]


@dataclass(frozen=True)
class _Code:
    """Codes a share of the pictures when called; returns wall and processor seconds.

    Attributes:
        form: What they are brought to.
        part: Which share.
        limit: At most so many; None: all.
    """

    form: Form
    part: int
    limit: int | None = None

    def __call__(self, pictures: InMemory) -> tuple[float, float]:
        share = pictures.share(self.part)[: self.limit]
        processor, wall = time.process_time(), time.perf_counter()
        for data in share:
            fit(data, self.form)
        return time.perf_counter() - wall, time.process_time() - processor


def code_all(team: Team[InMemory], form: Form, limit: int | None = None) -> tuple[float, float]:
    """Code all pictures, each process its share, which stays in its memory.

    Args:
        team: Free processes: so each gets the same share every time.
        form: What the pictures are brought to.
        limit: At most so many of each share; None: all.

    Returns:
        Wall seconds of the slowest process, processor seconds of all.
    """
    pending = [team.start(_Code(form, part, limit)) for part in range(team.size)]
    times = [each.result() for each in pending]
    return max(wall for wall, _ in times), sum(processor for _, processor in times)
