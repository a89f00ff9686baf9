"""Retention: which checkpoints keep their files. Manifests go first, parts one pin lifetime later."""

import json
import logging
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Final

from trainer.checkpoint import check_sizes
from trainer.clock import is_due
from trainer.manifest import DamagedCheckpointError, is_checkpoint_name, parse_checkpoint_name
from trainer.recipe_sections import CheckpointSection
from trainer.run import PIN_LIFETIME_SECONDS, CheckpointGoneError, Run

log = logging.getLogger(__name__)

_FOLDERS: Final = ("checkpoints", "snapshots")
"""Of a run, whose own folders exist if and only if they hold a manifest."""


class Retention:
    """Decides which checkpoints of the lineage stay, and removes the others; used by rank 0 alone.

    There stay the newest ones, those at certain multiples of images, those an evaluation found best, and
    whatever is pinned. What dead attempts left unfinished is removed, too; what a later attempt has
    superseded stays.

    Args:
        run: The run directory.
        section: What stays.
        monotonic: The clock pins are observed with; replaced by tests.
    """

    def __init__(
        self, run: Run, section: CheckpointSection, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._run, self._section, self._monotonic = run, section, monotonic
        self._pins_seen: dict[str, tuple[bytes, float]] = {}
        self._whole: set[str] = set()
        self._removable: dict[str, float] | None = None
        """Folders without manifest, and since when."""

    def apply(self) -> None:
        """Withdraw what is no longer kept, and remove the parts of what was withdrawn long enough ago."""
        run, now = self._run, self._monotonic()
        if self._removable is None:
            self._removable = {orphan.path: now for orphan in orphans(run)}
        pins = run.pins()
        live = run.live_checkpoints()
        kept = self._kept(live)
        for name in live:
            if name in kept or self._is_pinned(pins.get(name, [])):
                continue
            run.storage.delete(f"checkpoints/{name}/manifest.json")
            self._removable[f"checkpoints/{name}"] = now
            log.info("checkpoint %s withdrawn (keep %d)", name, self._section.keep)
        for path, since in list(self._removable.items()):
            name = path.rpartition("/")[2]
            if now - since >= PIN_LIFETIME_SECONDS and not self._is_pinned(pins.get(name, [])):
                run.storage.delete_folder(path)
                del self._removable[path]

    def _kept(self, live: list[str]) -> set[str]:
        """Which of the live checkpoints stay."""
        section = self._section
        kept = best_checkpoints(self._run) if section.keep_best else set()
        if section.keep_every_images is not None:
            kept |= set(_at_multiples(live, section.keep_every_images))
        newest = 0
        for name in reversed(live):
            kept.add(name)  # a damaged one among the newest is no reason to remove a good one, nor itself
            newest += self._is_whole(name)
            if newest == section.keep:
                break
        return kept

    def _is_whole(self, name: str) -> bool:
        if name not in self._whole:
            try:
                check_sizes(self._run, self._run.manifest(name))
            except (DamagedCheckpointError, CheckpointGoneError) as error:
                log.warning("checkpoint %s does not count among those to keep: %s", name, error)
                return False
            self._whole.add(name)
        return True

    def _is_pinned(self, paths: Collection[str]) -> bool:
        return any(list(map(self._protects, paths)))  # each is observed

    def _protects(self, path: str) -> bool:
        """A pin protects until it has not changed for a whole lifetime of this observer's clock."""
        try:
            content = self._run.storage.read(path)
        except FileNotFoundError:
            return True  # it was there a moment ago: its reader may have left word of what it read
        now = self._monotonic()
        seen = self._pins_seen.get(path)
        if seen is None or seen[0] != content:
            self._pins_seen[path] = (content, now)
            return True
        return now - seen[1] < PIN_LIFETIME_SECONDS


@dataclass(frozen=True)
class Orphan:
    """A folder of files that belong to no checkpoint and never will.

    Attributes:
        path: Within the run.
        bytes: Of all its files.
        pins: Who may still be reading it: pins from before its manifest was removed.
    """

    path: str
    bytes: int
    pins: tuple[str, ...]


def orphans(run: Run) -> list[Orphan]:
    """Find what attempts left unpublished that cannot publish any more.

    Those are all but the newest, and that one, too, if it has ended.
    """
    newest, has_ended = run.newest_attempt(), run.ended() is not None
    found = []
    for folder in _FOLDERS:
        for name in filter(is_checkpoint_name, run.storage.list(folder)):
            _, attempt = parse_checkpoint_name(name)
            is_over = attempt < newest or (attempt == newest and has_ended)
            if not is_over or run.storage.exists(f"{folder}/{name}/manifest.json"):
                continue
            sizes = run.storage.sizes(f"{folder}/{name}")
            if sizes or run.storage.is_local:  # some object stores list a while what has been emptied
                found.append((f"{folder}/{name}", name, sum(sizes.values())))
    # Last: who has seen a manifest that is gone now had pinned before.
    pins = run.pins()
    return [Orphan(path, size, tuple(pins.get(name, []))) for path, name, size in found]


def best_checkpoints(run: Run) -> set[str]:
    """Names of the checkpoints that evaluations found best: `RUN/eval/*/best.json`."""
    found = set()
    for protocol in run.storage.list("eval"):
        try:
            content = json.loads(run.storage.read(f"eval/{protocol}/best.json"))
            found.add(str(content["checkpoint"]))
        except FileNotFoundError:
            continue
        except (ValueError, TypeError, KeyError) as error:
            log.warning("%s/eval/%s/best.json cannot be read: %s", run.url, protocol, error)
    return found


def _at_multiples(live: list[str], every: int) -> Iterator[str]:
    """Yield the first checkpoint at or after each multiple of so many images."""
    before = 0
    for name in live:
        images, _ = parse_checkpoint_name(name)
        if is_due(every, before, images):
            yield name
        before = images
