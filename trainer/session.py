"""What an attempt starts from: checks, the newest checkpoint that is whole, and the claim on the run.

Everything here is done by rank 0 alone; the others get its result.
"""

import logging
import socket
from collections.abc import Collection
from dataclasses import dataclass

from trainer import checkpoint as checkpoints
from trainer.guards import DivergedError, Guard, RollBackError
from trainer.manifest import Attempt, Manifest
from trainer.preflight import check_inputs
from trainer.recipe import Recipe
from trainer.run import Run

log = logging.getLogger(__name__)


@dataclass
class TrainState:
    """Where the run is; saved in every manifest."""

    guard: Guard
    images: int = 0
    position: int = 0
    updates: int = 0


@dataclass(frozen=True)
class Session:
    """What one attempt starts from."""

    attempt: Attempt
    parent: Manifest | None

    def state(self, recipe: Recipe) -> TrainState:
        """Return the state at the attempt's start."""
        parent, batch = self.parent, recipe.batch.total
        state = TrainState(Guard(recipe.guard, batch))
        if parent is not None:
            guard = Guard(recipe.guard, batch, list(parent.skips), parent.guard)
            state = TrainState(guard, parent.images, parent.position, parent.updates)
        if self.attempt.position is not None:
            state.guard.passed_over(state.position, self.attempt.position)
            state.position = self.attempt.position
        return state


def open_session(
    recipe: Recipe, run: Run, world: int, allowed: Collection[str] = (), refused: Collection[str] = ()
) -> Session:
    """Check storage, data and recipe, find the newest whole checkpoint and claim the next attempt.

    Args:
        recipe: What to train.
        run: The run directory, new or existing.
        world: Processes of the job.
        allowed: Keys of the recipe that may differ from those of the run so far.
        refused: Checkpoints that turned out to be damaged when they were loaded.

    Raises:
        DamagedCheckpointError: No checkpoint is left.
        UserError: Data or run directory cannot be used, or the run was started with something else.
    """
    index_sha = check_inputs(recipe, run, world, allowed)
    run.storage.prove_create_only()
    run.adopt_recipe(recipe, allowed)
    parent = checkpoints.newest_whole(run, refused)
    position, rollbacks = _rolled_back(run, parent)
    claim = run.claim_attempt(_name(parent), socket.gethostname(), recipe, index_sha, position, rollbacks)
    _announce(run, claim)
    return Session(claim, parent)


def roll_back(recipe: Recipe, run: Run, session: Session, trouble: RollBackError) -> Session:
    """Claim a new attempt from the newest whole checkpoint that passes over what was tried since.

    Raises:
        DivergedError: The run was rolled back as often as it may.
    """
    rollbacks = session.attempt.rollbacks + 1
    if rollbacks > recipe.guard.rollbacks:
        raise DivergedError(
            f"training diverged: {trouble}; {recipe.guard.rollbacks} rollbacks did not help: lower "
            "optimizer.learning_rate, look at the data, or raise guard.rollbacks"
        )
    parent = checkpoints.newest_whole(run)
    claim = run.claim_attempt(
        _name(parent),
        session.attempt.host,
        recipe,
        session.attempt.index_sha,
        trouble.position,
        rollbacks,
    )
    log.warning("rollback %d of at most %d: %s", rollbacks, recipe.guard.rollbacks, trouble)
    _announce(run, claim)
    return Session(claim, parent)


def _rolled_back(run: Run, parent: Manifest | None) -> tuple[int | None, int]:
    """Return where to go on and how many rollbacks there were, as the newest attempt left it."""
    newest = run.newest_attempt()
    if not newest:
        return None, 0
    last = run.attempt(newest)
    # A checkpoint published since then knows its own position and what was passed over.
    is_since = parent is not None and parent.attempt == newest
    return (None if is_since else last.position), last.rollbacks


def _announce(run: Run, claim: Attempt) -> None:
    start = f"checkpoint {claim.parent}" if claim.parent else "random weights"
    at = "" if claim.position is None else f", at stream position {claim.position}"
    log.info("attempt %d of run %s starts from %s%s", claim.attempt, run.url, start, at)


def _name(manifest: Manifest | None) -> str | None:
    return manifest.name if manifest else None
