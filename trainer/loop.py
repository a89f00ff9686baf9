"""The training loop: Algorithm 1 of the paper over the rooms of this package.

Every rank runs `train`. The trajectory is a function of recipe, index and stream position alone:
sample n brings its own timestep, noise and flip, whichever rank meets it.
"""

import logging
import math
import socket
import time
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from data_pipeline.device import DeviceBatch, DeviceStream
from data_pipeline.errors import UserError
from data_pipeline.order import rank_slice
from data_pipeline.progress import Progress
from data_pipeline.stream import StreamCounts
from trainer import checkpoint as checkpoints
from trainer.clock import adam_epsilon, is_due, learning_rate
from trainer.data import open_stream
from trainer.diffusion.losses import training_losses
from trainer.distributed import Ranks
from trainer.ema import PartitionedEma
from trainer.engine import Engine
from trainer.guards import SkipBudget
from trainer.manifest import ANY_DATA, Attempt, AttemptEnd, FileEntry, Manifest, Topology
from trainer.preflight import check_inputs
from trainer.randomness import Purpose, bits, normal
from trainer.recipe import Recipe
from trainer.retention import Retention
from trainer.run import Run
from trainer.stop import StopReason, StopRequest
from trainer.telemetry import MetricsLog
from trainer.timestep_source import TimestepSource
from trainer.unet import UNet
from trainer.weights import assemble

log = logging.getLogger(__name__)


@dataclass
class TrainState:
    """Where the run is; saved in every manifest."""

    images: int = 0
    position: int = 0
    updates: int = 0
    budget: SkipBudget = field(default_factory=SkipBudget)


@dataclass(frozen=True)
class Session:
    """What one attempt starts from."""

    attempt: Attempt
    parent: Manifest | None


def open_session(recipe: Recipe, run: Run, world: int) -> Session:
    """Check storage, data and recipe, find the newest verified checkpoint and claim the next attempt.

    Run by rank 0 alone.

    Raises:
        UserError: Data or run directory cannot be used, or the run was started with something else.
    """
    index_sha = check_inputs(recipe, run, world)
    run.storage.prove_create_only()
    run.adopt_recipe(recipe)
    parent = checkpoints.newest_verified(run)
    if parent is not None and parent.index_sha not in (ANY_DATA, index_sha):
        raise UserError(
            f"data.url={recipe.data.url}: the run {run.url} was trained on another index "
            f"({parent.index_sha[:12]}, this one is {index_sha[:12]}); give the same shards or another run"
        )
    claim = run.claim_attempt(parent.name if parent else None, socket.gethostname(), recipe, index_sha)
    start = f"checkpoint {parent.name}" if parent else "random weights"
    log.info("attempt %d of run %s starts from %s", claim.attempt, run.url, start)
    return Session(claim, parent)


def train(recipe: Recipe, run: Run, ranks: Ranks, stop: StopRequest) -> StopReason:
    """Train until the recipe's images are seen or a stop is asked for; resume if the run exists.

    Returns:
        `StopReason.REQUESTED` if the run is to be resumed, else it is finished.

    Raises:
        UserError: Data, recipe or run directory cannot be used.
        DivergedError: Gradients stay non-finite.
        StorageFault: The store failed for longer than the retries last.
    """
    session = ranks.on_main(lambda: open_session(recipe, run, ranks.world))
    trainer = Trainer(recipe, run, ranks, session)
    stop.start_budget(recipe.train.max_minutes)
    try:
        return trainer.run_until(stop)
    finally:
        trainer.close()


class Trainer:
    """One rank's part of one attempt."""

    def __init__(self, recipe: Recipe, run: Run, ranks: Ranks, session: Session) -> None:
        self.recipe, self.run, self.ranks, self.session = recipe, run, ranks, session
        self.device = ranks.device
        self.diffusion, self.loss = recipe.build_diffusion(), recipe.loss.config()
        self.micro_steps = micro_steps(recipe, ranks.world)
        # The generator makes the initial weights equal on every rank.
        model = UNet(recipe.unet_config(), torch.Generator().manual_seed(recipe.seed))
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self.engine = Engine(recipe, model, self.device, self.micro_steps)
        self.ema = PartitionedEma(recipe.ema, self.engine.masters)
        self.timesteps = TimestepSource(recipe, self.device)
        self.state = self._load(session.parent)
        self.published = session.parent
        self.stream = open_stream(recipe, run, ranks.rank, ranks.world, self.state.position)
        self.window = LogWindow(self.device, self.diffusion.num_timesteps)
        self.retention = Retention(run, recipe.checkpoint.keep)
        self.metrics = MetricsLog(
            run, session.attempt.attempt, self.state.images, tensorboard=recipe.logging.tensorboard
        )

    def run_until(self, stop: StopRequest) -> StopReason:
        """Train to the end or to the first step boundary at which any rank wants to stop."""
        recipe, state = self.recipe, self.state
        reason = StopReason.NONE
        silent = not self.ranks.is_main
        with Progress("train", recipe.train.images, "img", start=state.images, silent=silent) as progress:
            batches = iter(DeviceStream(self.stream, self.device))
            while state.images < recipe.train.images:
                reason = StopReason(self.ranks.maximum(stop.reason()))
                if reason is not StopReason.NONE:
                    break
                before = state.images
                self.step(next(batches))
                if is_due(recipe.logging.every_images, before, state.images):
                    self.log_metrics(progress)
                if is_due(recipe.checkpoint.every_images, before, state.images):
                    self.save()
        if self.published is None or self.published.images != state.images:
            self.save()
        self._end("requeue" if reason is StopReason.REQUESTED else "finished")
        return reason

    def step(self, batch: DeviceBatch) -> None:
        """One optimizer update over the global batch: Algorithm 1, lines 2 to 5."""
        recipe, state = self.recipe, self.state
        positions, pictures = batch.positions, batch.images
        if recipe.model.dropout > 0:
            images = torch.tensor([state.images])
            seed = bits(recipe.seed, Purpose.DROPOUT, images, words=2, draw=self.ranks.rank)[0].tolist()
            torch.manual_seed(seed[0] | seed[1] << 32)
        seen = []
        for number, chunk in enumerate(np.array_split(np.arange(len(positions)), self.micro_steps), start=1):
            # A rank with fewer images than micro-steps joins the collective with a picture of weight zero.
            select = slice(0, 1) if len(chunk) == 0 else slice(int(chunk[0]), int(chunk[-1]) + 1)
            losses, t, weights = self.losses(pictures[select], positions[select])
            if len(chunk) == 0:
                weights = torch.zeros_like(weights)
            self.engine.backward((weights * losses).sum() / recipe.batch.total)
            if len(chunk) > 0:
                seen.append((losses.detach(), t, weights))
            if number < self.micro_steps:
                self.engine.micro_step_done()
        outcome = self.engine.update(
            learning_rate(recipe.optimizer, state.images), adam_epsilon(recipe.optimizer, state.updates)
        )
        start = state.position
        state.position += recipe.batch.total
        if not outcome.applied:
            log.warning("update at position %d dropped: gradients are not finite", start)
            state.budget.dropped(start, state.position)
            return
        state.budget.applied()
        self.window.grad_norm = outcome.grad_norm
        for step_losses, step_t, weights in seen:
            self.window.add(step_losses, step_t, weights)
            self.timesteps.observe(step_t, step_losses)
        self.ema.update(state.images, recipe.batch.total)
        self.timesteps.after_update(state.images, state.images + recipe.batch.total, self.ranks)
        state.images += recipe.batch.total
        state.updates += 1

    def losses(self, pictures: Tensor, n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The recipe's loss of each sample, by default L_simple (eq. 14).

        Args:
            pictures: uint8 [b, H, W, C], flipped where they are to be.
            n: int64 [b] stream positions, which key all randomness.

        Returns:
            float32 [b] losses, int64 [b] timesteps, and float32 [b] weights of the losses in the objective.
        """
        recipe = self.recipe
        # Scaling: paper, section 3.3.
        x0 = pictures.permute(0, 3, 1, 2).float() / 127.5 - 1.0
        t, weights = self.timesteps.draw(n)
        noise = normal(recipe.seed, Purpose.NOISE, n, tuple(x0.shape[1:]))
        x_t = self.diffusion.q_sample(x0, t, noise)
        output = self.engine.forward(x_t, t)
        losses = training_losses(self.diffusion, output, x0, x_t, t, noise, self.loss)
        return losses, t, weights

    def log_metrics(self, progress: Progress) -> None:
        """Reduce the window's metrics over the ranks and write one row."""
        totals = self.ranks.total(self.window.totals(self.stream.wait_seconds))
        row = self.window.row(totals, self.ranks.world)
        row["learning_rate"] = learning_rate(self.recipe.optimizer, self.state.images)
        row["skipped_updates"] = float(
            sum(b - a for a, b in self.state.budget.skips) // self.recipe.batch.total
        )
        row["storage_retries"] = float(self.run.storage.retries)
        # Of all ranks, since the attempt began.
        counts = self.ranks.total(torch.tensor(self.stream.counts, dtype=torch.float64)).tolist()
        row |= {f"data_{name}": count for name, count in zip(StreamCounts._fields, counts, strict=True)}
        if self.ranks.is_main:
            self.metrics.log(self.state.images, row)
        wait = f"{100 * row['data_wait_share']:.1f}%"
        progress.update(self.state.images, loss=f"{row['loss']:.4f}", wait=wait)
        self.window.reset(self.stream.wait_seconds)

    def save(self) -> None:
        """Publish a checkpoint: all ranks write their parts, rank 0 the manifest."""
        began = time.monotonic()
        name, run = self._name(), self.run
        slices = self.engine.slices(self.ema.flats)
        entries = [checkpoints.write_state(run, name, self.ranks.rank, slices)]
        averages = self._whole_averages()
        timesteps = self.timesteps.tensors(self.ranks)
        if self.ranks.is_main:
            if timesteps:
                file = checkpoints.TIMESTEPS_FILE
                entries.append(checkpoints.write_part(run, name, file, timesteps, "timesteps"))
            weights = dict(self.engine.module.named_parameters())
            entries.append(checkpoints.write_part(run, name, checkpoints.WEIGHTS_FILE, weights, "weights"))
            for profile, tensors in averages.items():
                file = checkpoints.ema_file(profile)
                entries.append(checkpoints.write_part(run, name, file, tensors, "ema", ema=profile))
        files = [entry for part in self.ranks.gather(entries) for entry in part]
        self.published = self.ranks.on_main(lambda: self._publish(files))
        log.info("checkpoint %s published in %.2f s", name, time.monotonic() - began)

    def close(self) -> None:
        """Stop reading ahead and release the engine."""
        self.stream.close()
        self.metrics.close()
        self.engine.close()

    def _name(self) -> str:
        return self._manifest([]).name

    def _manifest(self, files: list[FileEntry]) -> Manifest:
        state, attempt = self.state, self.session.attempt
        return Manifest(
            run=attempt.run,
            attempt=attempt.attempt,
            images=state.images,
            position=state.position,
            updates=state.updates,
            skips=state.budget.skips,
            recipe_sha=attempt.recipe_sha,
            index_sha=attempt.index_sha,
            topology=Topology(
                world=self.ranks.world, zero_stage=self.recipe.deepspeed.zero_stage, device=self.device.type
            ),
            files=files,
        )

    def _publish(self, files: list[FileEntry]) -> Manifest:
        manifest = self._manifest(files)
        self.metrics.publish(self.state.images)  # first: a checkpoint's history must not be lost
        checkpoints.publish(self.run, manifest)
        self.retention.apply()
        return manifest

    def _whole_averages(self) -> dict[str, dict[str, Tensor]]:
        """Return each profile's whole tensors on rank 0; all ranks take part."""
        layouts = self.ranks.gather(self.engine.layout())
        averages = {}
        for profile, flats in self.ema.flats.items():
            gathered = [self.ranks.gather_to_main(flat) for flat in flats]
            if self.ranks.is_main:
                pieces = [
                    (name, start, stop, gathered[index][rank][offset : offset + stop - start])
                    for rank, layout in enumerate(layouts)
                    for name, start, stop, index, offset in layout
                ]
                averages[profile] = assemble(self.shapes, pieces)
        return averages

    def _load(self, parent: Manifest | None) -> TrainState:
        if parent is None:
            return TrainState()
        checkpoints.load_state(self.run, parent, self.engine.slices(self.ema.flats))
        parts = {entry.role: entry for entry in parent.files}
        self.engine.resume(checkpoints.read_part(self.run, parent, parts["weights"]), parent.updates)
        if self.timesteps.is_loss_aware and "timesteps" in parts:  # imported weights come without
            self.timesteps.load(checkpoints.read_part(self.run, parent, parts["timesteps"]))
        return TrainState(parent.images, parent.position, parent.updates, SkipBudget(list(parent.skips)))

    def _end(self, outcome: str) -> None:
        end = AttemptEnd.model_validate(
            {
                "attempt": self.session.attempt.attempt,
                "outcome": outcome,
                "images": self.state.images,
                "checkpoint": self.published.name if self.published else None,
            }
        )
        self.ranks.on_main(lambda: self.run.end_attempt(end))


class LogWindow:
    """Sums of one log interval, kept on the device until they are asked for."""

    QUARTILES = 4

    def __init__(self, device: torch.device, num_timesteps: int) -> None:
        self._device, self._num_timesteps = device, num_timesteps
        self.grad_norm = math.nan
        self.reset(0.0)

    def reset(self, wait_seconds: float) -> None:
        """Begin a new interval; `wait_seconds` is the stream's total so far."""
        self._sums = torch.zeros(self.QUARTILES, dtype=torch.float64, device=self._device)
        self._weights = torch.zeros(self.QUARTILES, dtype=torch.float64, device=self._device)
        self._images = 0
        self._began, self._waited = time.monotonic(), wait_seconds

    def add(self, losses: Tensor, t: Tensor, weights: Tensor) -> None:
        """Add the losses float32 [b] of samples, their timesteps int64 [b] and weights float32 [b]."""
        quartile = t * self.QUARTILES // self._num_timesteps
        self._sums.index_add_(0, quartile, losses.double() * weights.double())
        self._weights.index_add_(0, quartile, weights.double())
        self._images += len(losses)

    def totals(self, wait_seconds: float) -> Tensor:
        """Return what is to be summed over ranks: quartile sums and weights, images, seconds, waiting."""
        rest = [self._images, time.monotonic() - self._began, wait_seconds - self._waited]
        return torch.cat([self._sums.cpu(), self._weights.cpu(), torch.tensor(rest, dtype=torch.float64)])

    def row(self, totals: Tensor, world: int) -> dict[str, float]:
        """Turn the totals over `world` ranks into named metrics."""
        sums, weights = totals[: self.QUARTILES], totals[self.QUARTILES : 2 * self.QUARTILES]
        images, seconds, waited = totals[-3:].tolist()
        row = {
            "loss": float(sums.sum()) / max(images, 1.0),
            "grad_norm": self.grad_norm,
            "images_per_second": images * world / max(seconds, 1e-9),
            "data_wait_share": waited / max(seconds, 1e-9),
        }
        for index in range(self.QUARTILES):
            if weights[index] > 0:
                row[f"loss_q{index}"] = float(sums[index] / weights[index])
        return row


def micro_steps(recipe: Recipe, world: int) -> int:
    """Forward and backward passes per update: enough that no rank holds more than `batch.micro` images."""
    share = rank_slice(recipe.batch.total, 0, world)
    largest: int = share.stop - share.start
    return math.ceil(largest / min(recipe.batch.micro or largest, largest))
