"""Retention: which checkpoints keep their files. Manifests go first, parts one pin lifetime later."""

import logging
import time
from collections.abc import Callable

from trainer.manifest import Manifest
from trainer.run import PIN_LIFETIME_SECONDS, Run

log = logging.getLogger(__name__)


class Retention:
    """Keeps the newest checkpoints of the lineage and whatever is pinned; used by rank 0 alone.

    Args:
        run: The run directory.
        keep: How many of the newest live checkpoints stay.
        monotonic: The clock pins are observed with; replaced by tests.
    """

    def __init__(self, run: Run, keep: int, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._run, self._keep, self._monotonic = run, keep, monotonic
        self._pins_seen: dict[str, tuple[bytes, float]] = {}
        self._withdrawn: list[tuple[Manifest, float]] = []

    def apply(self) -> None:
        """Withdraw what is no longer kept, and remove the parts of what was withdrawn long enough ago."""
        pins = self._run.pins()
        for name in self._run.live_checkpoints()[: -self._keep]:
            if any(self._protects(path) for path in pins.get(name, [])):
                continue
            manifest = self._run.manifest(name)
            self._run.storage.delete(f"checkpoints/{name}/manifest.json")
            self._withdrawn.append((manifest, self._monotonic()))
            log.info("checkpoint %s withdrawn (keep %d)", name, self._keep)
        self._remove_parts()

    def _remove_parts(self) -> None:
        now = self._monotonic()
        for manifest, since in list(self._withdrawn):
            if now - since < PIN_LIFETIME_SECONDS:
                continue
            for entry in manifest.files:
                self._run.storage.delete(f"checkpoints/{manifest.name}/{entry.path}")
            self._withdrawn.remove((manifest, since))

    def _protects(self, path: str) -> bool:
        """A pin protects until it has not changed for a whole lifetime of this observer's clock."""
        try:
            content = self._run.storage.read(path)
        except FileNotFoundError:
            return False
        now = self._monotonic()
        seen = self._pins_seen.get(path)
        if seen is None or seen[0] != content:
            self._pins_seen[path] = (content, now)
            return True
        return now - seen[1] < PIN_LIFETIME_SECONDS
