"""How fast a training will be: told, seen in the run, or reckoned from the GPU's peak."""

import json
from dataclasses import dataclass
from typing import Final

from trainer.batches import BatchPlan
from trainer.manifest import parse_checkpoint_name
from trainer.run import Run

ASSUMED_UTILISATION: Final = 0.35
"""Of the GPU's peak, where nothing better is known: an assumption, not a measurement."""


@dataclass(frozen=True)
class History:
    """What an existing run tells.

    Attributes:
        images: Of its newest live checkpoint, where training goes on; 0 without one.
        images_per_second: In the newest row of its metrics that has it; None without one.
        ranks: Processes that wrote that checkpoint; None without one.
    """

    images: int = 0
    images_per_second: float | None = None
    ranks: int | None = None

    @classmethod
    def of(cls, run: Run | None) -> "History":
        """Read a run directory, which may be new or None."""
        if run is None or not run.has_recipe():
            return cls()
        live = run.live_checkpoints()
        if not live:
            return cls()
        images, attempt = parse_checkpoint_name(live[-1])
        return cls(images, _last_speed(run, attempt), run.manifest(live[-1]).topology.world)


def forecast_speed(
    batch: BatchPlan,
    flops_per_image: int,
    history: History,
    *,
    told: float | None = None,
    peak: float | None = None,
) -> tuple[float | None, str]:
    """Return images per second of all ranks together, None if nothing is known, and where that is from.

    Args:
        batch: How a batch is divided.
        flops_per_image: Operations that training with one image takes.
        history: What the run tells.
        told: What the user says.
        peak: Floating-point operations per second of one GPU.
    """
    if told is not None:
        return told, "as given"
    if history.images_per_second is not None and history.ranks is not None:
        seen = f"the run's last row of metrics, on {history.ranks} ranks"
        if history.ranks == batch.ranks:
            return history.images_per_second, seen
        # The slowest rank decides, so it is its images that scale.
        factor = (batch.ranks * batch.balance) / history.ranks
        return history.images_per_second * factor, f"{seen}, scaled to {batch.ranks}: an assumption"
    if peak is not None:
        seconds = batch.most * flops_per_image / (ASSUMED_UTILISATION * peak)
        basis = f"{ASSUMED_UTILISATION:.0%} of the GPU's {peak / 1e12:.0f} TFLOP/s: an assumption"
        return batch.total / seconds, basis
    return None, "unknown: give --images-per-second"


def _last_speed(run: Run, attempt: int) -> float | None:
    """The newest published `images_per_second` of an attempt."""
    folder = f"metrics/{attempt:06d}"
    for segment in reversed([name for name in run.storage.list(folder) if name.endswith(".jsonl")]):
        for line in reversed(run.storage.read(f"{folder}/{segment}").splitlines()):
            speed = json.loads(line).get("images_per_second")
            if speed:
                return float(speed)
    return None
