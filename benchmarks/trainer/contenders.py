"""Whose loops are measured: our bare step, our whole loop, and diffusers' example."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final
from unittest.mock import patch

import torch
import torch.nn.functional as F

from benchmarks.harness import OURS
from benchmarks.network import Batch
from benchmarks.peers import diffusers_example
from benchmarks.trainer.group import process_group
from benchmarks.trainer.job import Job
from benchmarks.trainer.pace import Pace
from trainer.clock import adam_epsilon, learning_rate
from trainer.ema import PartitionedEma
from trainer.run import Run
from trainer.stop import StopReason, StopRequest
from trainer.unet import UNet

BARE: Final = "bare"
EXAMPLE: Final = diffusers_example.DIFFUSERS_EXAMPLE.name


class PacedStop(StopRequest):
    """Is asked once per step, like any other, and lets the loop wait for its turn then."""

    def __init__(self, pace: Pace) -> None:
        super().__init__()
        self._pace = pace

    def reason(self) -> StopReason:
        """Wait until the step is wanted."""
        self._pace.before_step()
        return super().reason()


def run_bare(job: Job, pace: Pace) -> None:
    """Forward, backward, Adam, over and over on one batch in memory: the least that a step can be."""
    with process_group() as ranks:
        from trainer.engine import Engine  # late, as all that imports DeepSpeed

        recipe = job.recipe().for_ranks(ranks.world)
        config, optimizer = recipe.unet_config(), recipe.optimizer
        network = UNet(config, torch.Generator().manual_seed(recipe.seed))
        engine = Engine(recipe, network, ranks, micro_steps=1)
        batch = Batch.draw(config, recipe.batch.total)
        updates = 0
        while True:
            pace.before_step()
            loss = F.mse_loss(engine.forward(batch.x_t, batch.t), batch.noise)
            engine.backward(loss)
            rate = learning_rate(optimizer, updates * recipe.batch.total)
            outcome = engine.update(rate, adam_epsilon(optimizer, updates), lambda norm: True)
            assert outcome.applied, "an update was dropped"
            updates += 1


def run_ours(job: Job, pace: Pace) -> None:
    """Train as the recipe says, each average's update on a clock of its own."""
    update = PartitionedEma.update

    def clocked(ema: PartitionedEma, images: int, batch: int) -> None:
        began = time.perf_counter()
        update(ema, images, batch)
        pace.note("ema", time.perf_counter() - began)

    with process_group() as ranks:
        from trainer.loop import train

        recipe = job.recipe()
        with patch.object(PartitionedEma, "update", clocked):
            train(recipe, Run(recipe.run), ranks, PacedStop(pace))


def run_example(job: Job, pace: Pace) -> None:
    """Train as diffusers' example does."""
    recipe = job.recipe()
    diffusers_example.train(
        recipe.unet_config(),
        Path(job.pictures),
        Path(job.out),
        batch=recipe.batch.total,
        precision=job.precision,
        before_step=pace.before_step,
        after_step=lambda loss: pace.note("loss", loss),
    )


CONTENDERS: Final[dict[str, Callable[[Job, Pace], None]]] = {
    BARE: run_bare,
    OURS: run_ours,
    EXAMPLE: run_example,
}
"""By name."""
