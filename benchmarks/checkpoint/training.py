"""A training that there are checkpoints of: the recipe's network on one batch in memory."""

import socket
from collections.abc import Mapping
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Record
from benchmarks.network import Batch
from benchmarks.trainer.job import BATCH, RECIPE, SMALL
from trainer.clock import adam_epsilon, learning_rate
from trainer.distributed import Ranks
from trainer.ema import PartitionedEma
from trainer.manifest import Attempt, Manifest, Topology
from trainer.recipe import Recipe, load_recipe
from trainer.run import Run
from trainer.saving import CheckpointWriter
from trainer.saving import Job as WriterJob
from trainer.telemetry import MetricsLog
from trainer.unet import UNet

_OVERRIDES: Final = (
    "precision=bf16",
    f"batch.total={BATCH}",
    # At the recipe's rate, 0 at first, weights and averages would be the same numbers for hours.
    "optimizer.warmup_images=0",
    "checkpoint.keep=2",  # so that old ones are withdrawn, as in a run that has lasted
)


class Job(Record):
    """What a process is to train.

    Attributes:
        small: The small network.
    """

    small: bool

    def recipe(self, zero_stage: int) -> Recipe:
        """The recipe, with one EMA profile, its state divided so."""
        overrides = [*_OVERRIDES, *(SMALL if self.small else ()), f"deepspeed.zero_stage={zero_stage}"]
        return load_recipe(RECIPE, overrides)


class Training:
    """One rank's network, engine and averages.

    Args:
        recipe: What to train.
        ranks: The processes of the job.
        weights: To begin with, whole; default: random ones.
    """

    def __init__(self, recipe: Recipe, ranks: Ranks, weights: Mapping[str, Tensor] | None = None) -> None:
        from trainer.engine import Engine  # late, as all that imports DeepSpeed

        self.recipe, self.ranks = recipe, ranks
        config = recipe.unet_config()
        network = UNet(config, torch.Generator().manual_seed(recipe.seed))
        if weights is not None:
            network.load_state_dict(weights)
        self.shapes = {name: parameter.shape for name, parameter in network.named_parameters()}
        self.engine = Engine(recipe, network, ranks, micro_steps=1)
        self.ema = PartitionedEma(recipe.ema, self.engine.partition.masters)
        self._batch = Batch.draw(config, recipe.batch.total // ranks.world)
        self.updates = 0

    @property
    def images(self) -> int:
        """Applied so far."""
        return self.updates * self.recipe.batch.total

    @property
    def deepspeed(self) -> Any:
        """DeepSpeed's own engine."""
        return self.engine._engine

    def step(self) -> None:
        """Forward, backward, Adam, average."""
        optimizer, batch = self.recipe.optimizer, self._batch
        loss = F.mse_loss(self.engine.forward(batch.x_t, batch.t), batch.noise)
        self.engine.backward(loss / self.ranks.world)
        rate = learning_rate(optimizer, self.images)
        outcome = self.engine.update(rate, adam_epsilon(optimizer, self.updates), lambda norm: True)
        assert outcome.applied, "an update was dropped"
        self.ema.update(self.images, self.recipe.batch.total)
        self.updates += 1


class Publishing:
    """Our checkpoints of a training, in a new run; all ranks make and use it together.

    Args:
        training: Whose.
        url: Of the run.
        kind: Who writes.
    """

    def __init__(self, training: Training, url: str, kind: type[CheckpointWriter] = CheckpointWriter) -> None:
        self._training, self.run = training, Run(url)
        self._attempt = training.ranks.on_main(self._claim)
        self.metrics = MetricsLog(self.run, self._attempt.attempt, training.images)
        recipe = training.recipe
        self.writer = kind(
            self.run,
            training.ranks,
            training.engine.partition,
            training.ema.flats,
            training.shapes,
            recipe.checkpoint,
            recipe.ema,
            self.metrics,
        )

    def job(self) -> WriterJob:
        """What the writer is to write now: a checkpoint, and a row of metrics that goes before it."""
        training, attempt = self._training, self._attempt
        self.metrics.log(training.images, {"updates": float(training.updates)})
        draft = Manifest(
            run=attempt.run,
            attempt=attempt.attempt,
            images=training.images,
            position=training.images,
            updates=training.updates,
            recipe_sha=attempt.recipe_sha,
            index_sha=attempt.index_sha,
            topology=Topology(
                world=training.ranks.world,
                zero_stage=training.engine.zero_stage,
                device=training.ranks.device.type,
            ),
        )
        return WriterJob(draft, {}, checkpoint=True, snapshot=False)

    def publish(self) -> None:
        """Write one checkpoint and wait for it."""
        self.writer.start(self.job())
        self.wait()

    def wait(self) -> None:
        """Wait for what is on its way.

        Raises:
            ValueError: It was given up.
        """
        self.writer.wait()
        if self.writer.given_up:
            raise ValueError("a checkpoint could not be written: there is nothing to compare")

    def _claim(self) -> Attempt:
        self.run.adopt_recipe(self._training.recipe)
        return self.run.claim_attempt(None, socket.gethostname(), self._training.recipe, "")
