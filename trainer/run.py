"""The run directory: where trainer and evaluation meet (a local path or any fsspec URL)."""

import logging
import os
import re
import socket
import uuid
from collections.abc import Collection
from types import TracebackType
from typing import Final, Self

from data_pipeline.documents import sha256_hex
from data_pipeline.errors import UserError
from data_pipeline.storage import Storage
from trainer.manifest import (
    Attempt,
    AttemptEnd,
    Manifest,
    is_checkpoint_name,
    parse_checkpoint_name,
)
from trainer.recipe import Recipe, differences, parse_recipe

log = logging.getLogger(__name__)

_ATTEMPT: Final = re.compile(r"(\d{6})\.json")
PIN_LIFETIME_SECONDS: Final = 600.0
"""A pin that has not changed for so long protects nothing any more."""


def worker_name() -> str:
    """Name of this process in pins and leases: host and process."""
    return f"{socket.gethostname()}-{os.getpid()}"


class CheckpointGoneError(UserError):
    """The checkpoint's manifest vanished (retention) before it could be pinned, or was never there."""


class Pin:
    """Protects a checkpoint from retention while it is being read; use as a context manager.

    Entering writes the pin and *then* reads the manifest again: whoever removes checkpoints removes the
    manifest first, so a manifest seen after pinning stays readable.

    Raises:
        CheckpointGoneError: On entering, if the manifest has vanished.
    """

    def __init__(self, run: "Run", checkpoint: str, worker: str) -> None:
        self._run, self._checkpoint = run, checkpoint
        self._path = f"pins/{checkpoint}.{worker}"

    def __enter__(self) -> Self:
        self.beat()
        try:
            self.manifest = self._run.manifest(self._checkpoint)
        except BaseException:
            self._run.storage.delete(self._path)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._run.storage.delete(self._path)

    def beat(self) -> None:
        """Show that the reader is alive; needed within `PIN_LIFETIME_SECONDS`."""
        self._run.storage.write(self._path, uuid.uuid4().hex.encode())


class Run:
    """One run directory.

    Args:
        url: A folder or fsspec URL.
    """

    def __init__(self, url: str) -> None:
        if not url:
            raise UserError("run: no run directory given; add run=FOLDER_OR_URL, e.g. run=runs/first")
        self.storage = Storage(url)
        self.url = self.storage.url

    def recipe(self) -> Recipe:
        """Read the recipe the run was started with.

        Raises:
            UserError: There is none, so this is no run directory.
        """
        try:
            text = self.storage.read("recipe.yaml").decode()
        except FileNotFoundError as error:
            raise UserError(
                f"{self.url}: holds no run (recipe.yaml is missing); check the path or start one with "
                f"`ddpm train RECIPE run={self.url}`"
            ) from error
        return parse_recipe(text, f"{self.url}/recipe.yaml")

    def latest_recipe(self) -> Recipe:
        """Return the recipe of the newest attempt: the same trajectory with today's data URL and evaluation.

        Raises:
            UserError: As `recipe`.
        """
        newest = self.newest_attempt()
        return Recipe.model_validate(self.attempt(newest).recipe) if newest else self.recipe()

    def has_recipe(self) -> bool:
        """Tell whether a run has been started here."""
        return self.storage.exists("recipe.yaml")

    def adopt_recipe(self, recipe: Recipe, allowed: Collection[str] = ()) -> None:
        """Store the recipe at the first start; later starts must train the same trajectory.

        Raises:
            UserError: As `check_recipe`.
        """
        if not self.storage.create("recipe.yaml", recipe.to_yaml().encode()):
            self.check_recipe(recipe, allowed)

    def check_recipe(self, recipe: Recipe, allowed: Collection[str] = ()) -> None:
        """Check that a recipe trains what the newest attempt of this run did.

        Args:
            recipe: The recipe.
            allowed: Keys, or whole sections, that may differ.

        Raises:
            UserError: Others differ, each of which is named, or the networks do.
        """
        stored = self.latest_recipe()
        changed = differences(stored, recipe)
        refused = [line for key, line in changed.items() if not _covers(allowed, key)]
        if refused:
            raise UserError(
                f"{self.url}: the run was started with another recipe ({'; '.join(refused)}); use the same "
                "keys, another run directory, or --allow KEY to go on with the change"
            )
        if changed and not stored.has_network_of(recipe):
            raise UserError(f"{self.url}: --allow cannot change the network ({'; '.join(changed.values())})")

    def attempts(self) -> list[Attempt]:
        """Return all attempts, oldest first."""
        return [self.attempt(number) for number in self._attempt_numbers()]

    def attempt(self, number: int) -> Attempt:
        """Return one attempt's record."""
        path = f"attempts/{number:06d}.json"
        return Attempt.from_json(self.storage.read(path), f"{self.url}/{path}")

    def recipe_of(self, manifest: Manifest) -> Recipe:
        """Return the recipe that a checkpoint was trained with."""
        return Recipe.model_validate(self.attempt(manifest.attempt).recipe)

    def newest_attempt(self) -> int:
        """Number of the newest attempt; 0 if there is none. It alone may publish."""
        return max(self._attempt_numbers(), default=0)

    def claim_attempt(
        self,
        parent: str | None,
        host: str,
        recipe: Recipe,
        index_sha: str,
        position: int | None = None,
        rollbacks: int = 0,
    ) -> Attempt:
        """Create the next attempt; from now on no earlier one may publish. The arguments are its fields."""
        while True:
            newest = self.newest_attempt()
            run_id = self.attempt(newest).run if newest else uuid.uuid4().hex[:12]
            claim = Attempt(
                run=run_id,
                attempt=newest + 1,
                parent=parent,
                position=position,
                rollbacks=rollbacks,
                host=host,
                nonce=uuid.uuid4().hex,
                recipe_sha=recipe.sha256,
                index_sha=index_sha,
                recipe=recipe.model_dump(mode="json"),
            )
            if self.storage.create(f"attempts/{claim.attempt:06d}.json", claim.to_json()):
                return claim

    def end_attempt(self, end: AttemptEnd) -> None:
        """Record how an attempt ended."""
        self.storage.create(f"attempts/{end.attempt:06d}.end.json", end.to_json())

    def fail_attempt(self, number: int) -> None:
        """Record that an attempt failed and nobody goes on, so that evaluation need not wait for ever."""
        newest = next(reversed(self.live_checkpoints()), None)
        images = parse_checkpoint_name(newest)[0] if newest else 0
        self.end_attempt(AttemptEnd(attempt=number, outcome="failed", images=images, checkpoint=newest))

    def ended(self) -> AttemptEnd | None:
        """Return how the newest attempt ended; None while it runs, or if it died without a word."""
        path = f"attempts/{self.newest_attempt():06d}.end.json"
        try:
            return AttemptEnd.from_json(self.storage.read(path), f"{self.url}/{path}")
        except FileNotFoundError:
            return None

    def checkpoints(self) -> list[str]:
        """Names of the published checkpoints, by images and then attempt."""
        names = [name for name in self.storage.list("checkpoints") if is_checkpoint_name(name)]
        return [name for name in names if self.storage.exists(_manifest_path(name))]

    def live_checkpoints(self) -> list[str]:
        """Names of the published checkpoints that belong to the newest attempt's lineage."""
        limits = self.lineage()
        return [name for name in self.checkpoints() if _within(name, limits)]

    def is_live(self, checkpoint: str) -> bool:
        """Tell whether no later attempt branched off before this checkpoint."""
        return _within(checkpoint, self.lineage())

    def lineage(self) -> dict[int, int | None]:
        """Map each attempt of the newest attempt's ancestry to its last live image count (None: no end)."""
        by_number = {attempt.attempt: attempt for attempt in self.attempts()}
        limits: dict[int, int | None] = {}
        number, limit = max(by_number, default=0), None
        while number in by_number:
            limits[number] = limit
            parent = by_number[number].parent
            if parent is None:
                break
            limit, number = parse_checkpoint_name(parent)
        return limits

    def manifest(self, checkpoint: str) -> Manifest:
        """Read a checkpoint's manifest.

        Raises:
            CheckpointGoneError: It is not published (any more).
        """
        where = f"{self.url}/{_manifest_path(checkpoint)}"
        return Manifest.from_json(self._manifest_bytes(checkpoint), where)

    def manifest_sha256(self, checkpoint: str) -> str:
        """SHA-256 of a checkpoint's manifest: the checkpoint's hash in reports.

        Raises:
            CheckpointGoneError: It is not published (any more).
        """
        return sha256_hex(self._manifest_bytes(checkpoint))

    def select(self, checkpoint: str | None) -> str:
        """Return the named checkpoint, or the newest live one.

        Raises:
            UserError: There is none, or none of that name.
        """
        if checkpoint is None:
            live = self.live_checkpoints()
            if not live:
                raise UserError(f"{self.url}: no checkpoint is published yet; train first")
            return live[-1]
        parse_checkpoint_name(checkpoint)
        if not self.storage.exists(_manifest_path(checkpoint)):
            raise UserError(f"{self.url}: no checkpoint {checkpoint}; see `ddpm checkpoints list {self.url}`")
        return checkpoint

    def pin(self, checkpoint: str, worker: str) -> Pin:
        """Return a context manager that protects `checkpoint` while `worker` reads it."""
        return Pin(self, checkpoint, worker)

    def pins(self) -> dict[str, list[str]]:
        """Map checkpoint names to the pins that protect them (paths within the run)."""
        found: dict[str, list[str]] = {}
        for name in self.storage.list("pins"):
            found.setdefault(name.partition(".")[0], []).append(f"pins/{name}")
        return found

    def _manifest_bytes(self, checkpoint: str) -> bytes:
        try:
            return self.storage.read(_manifest_path(checkpoint))
        except FileNotFoundError as error:
            raise CheckpointGoneError(f"{self.url}: no checkpoint {checkpoint} is published") from error

    def _attempt_numbers(self) -> list[int]:
        matches = (_ATTEMPT.fullmatch(name) for name in self.storage.list("attempts"))
        return sorted(int(match[1]) for match in matches if match)


def _manifest_path(checkpoint: str) -> str:
    return f"checkpoints/{checkpoint}/manifest.json"


def _within(checkpoint: str, limits: dict[int, int | None]) -> bool:
    images, attempt = parse_checkpoint_name(checkpoint)
    if attempt not in limits:
        return False
    limit = limits[attempt]
    return limit is None or images <= limit


def _covers(allowed: Collection[str], key: str) -> bool:
    """Tell whether a key or a section that holds it is among the allowed ones."""
    return any(key == name or key.startswith(f"{name}.") for name in allowed)
