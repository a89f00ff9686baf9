"""Batch arithmetic: how a global batch is divided among ranks and micro-steps."""

import math

from pydantic import BaseModel, ConfigDict

from data_pipeline.errors import UserError
from data_pipeline.order import rank_slice
from trainer.recipe import Recipe


class BatchPlan(BaseModel):
    """How one update's images are divided.

    Attributes:
        total: Images per update, all ranks together.
        ranks: Processes that share them.
        most: Images of the rank that has most.
        least: Images of the rank that has least; at most one less.
        ranks_with_most: How many ranks have most.
        micro_steps: Forward and backward passes per update, the same on every rank.
        micro_batch: Most images of one of them.
        padding: Pictures of weight zero that all ranks together compute per update: a rank with fewer images
            than micro-steps computes one in each that is left over.
    """

    model_config = ConfigDict(frozen=True)

    total: int
    ranks: int
    most: int
    least: int
    ranks_with_most: int
    micro_steps: int
    micro_batch: int
    padding: int

    @property
    def balance(self) -> float:
        """Share of the time in which a rank computes, if all wait for the one that has most images."""
        return self.total / (self.ranks * self.most)


def plan_batches(recipe: Recipe, ranks: int) -> BatchPlan:
    """Divide the recipe's batch among ranks as training does.

    Raises:
        UserError: There are more ranks than images.
    """
    total = recipe.batch.total
    if ranks > total:
        raise UserError(f"batch.total={total} is less than the {ranks} ranks; raise it")
    shares = [rank_slice(total, rank, ranks) for rank in range(ranks)]
    images = [share.stop - share.start for share in shares]
    most, steps = max(images), micro_steps(recipe, ranks)
    return BatchPlan(
        total=total,
        ranks=ranks,
        most=most,
        least=min(images),
        ranks_with_most=images.count(most),
        micro_steps=steps,
        micro_batch=math.ceil(most / steps),
        padding=sum(max(steps - own, 0) for own in images),
    )


def micro_steps(recipe: Recipe, ranks: int) -> int:
    """Forward and backward passes per update: enough that no rank holds more than `batch.micro` images."""
    share = rank_slice(recipe.batch.total, 0, ranks)
    largest: int = share.stop - share.start
    return math.ceil(largest / min(recipe.batch.micro or largest, largest))
