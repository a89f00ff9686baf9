"""What one contender's processes are told, and what they answer."""

from typing import Final

from benchmarks.harness import Precision, Record
from trainer.recipe import Recipe, load_recipe

RECIPE: Final = "cifar10"
BATCH: Final = 8
"""Pictures of a step, of all ranks together."""
LOG_STEPS: Final = 10
"""Steps from one row of metrics to the next."""
RUN_IN_S3: Final = "run in S3"
"""Remark of whoever has the run directory where the shards are."""
SMALL: Final = (
    "image.size=16",
    "model.base_channels=32",
    "model.channel_multipliers=[1, 2]",
    "model.num_res_blocks=1",
    "model.attention_resolutions=[8]",
)
"""Makes of the recipe one for trying things out; no bar is about it."""


def job_name(contender: str, precision: Precision, ranks: int = 1, remark: str = "") -> str:
    """What a contender is called in tables and messages; arguments as the attributes of `Job`."""
    several = f"{ranks} ranks" if ranks > 1 else ""
    return ", ".join(filter(None, [f"{contender} {precision}", several, remark]))


class Job(Record):
    """What a process is to train.

    Attributes:
        contender: A key of `contenders.CONTENDERS`.
        precision: Of the network's arithmetic.
        overrides: Of the recipe.
        pictures: Folder of the training split's pictures, for who reads no shards.
        out: Folder for what is written there; made by whoever writes.
        ranks: Processes that train together.
        remark: What else tells it from others, in tables and messages.
    """

    contender: str
    precision: Precision
    overrides: tuple[str, ...]
    pictures: str = ""
    out: str = ""
    ranks: int = 1
    remark: str = ""

    @property
    def name(self) -> str:
        """In tables and messages."""
        return job_name(self.contender, self.precision, self.ranks, self.remark)

    def recipe(self) -> Recipe:
        """The recipe that everyone follows, as far as they know it."""
        return load_recipe(RECIPE, [*self.overrides, f"precision={self.precision}"])


class Turn(Record):
    """What some steps cost one process.

    Attributes:
        wall: Wall seconds of all of them.
        cpu: Processor seconds, all threads.
        steps: Wall seconds of each, with what was done before the next one could begin.
        notes: By name, what the loop noted on its way: "loss", "ema" (wall seconds of an update).
    """

    wall: float
    cpu: float
    steps: list[float]
    notes: dict[str, list[float]]
