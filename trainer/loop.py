"""The training loop: Algorithm 1 of the paper over the rooms of this package.

Every rank runs `train`. The trajectory is a function of recipe, index and stream position alone:
sample n brings its own timestep, noise and flip, whichever rank meets it.
"""

import gc
import logging
import math
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data_pipeline.device import DeviceBatch, DeviceStream
from data_pipeline.errors import StorageFault
from data_pipeline.progress import Progress
from data_pipeline.stream import StreamCounts
from trainer.batches import micro_steps
from trainer.clock import adam_epsilon, is_due, learning_rate
from trainer.data import open_stream
from trainer.diffusion.losses import training_losses
from trainer.distributed import Ranks
from trainer.ema import PartitionedEma
from trainer.engine import Engine
from trainer.flops import training_flops_per_image
from trainer.guards import DivergedError, RollBackError
from trainer.log_window import LogWindow
from trainer.loggers import open_loggers
from trainer.manifest import AttemptEnd, DamagedCheckpointError, Manifest, Topology
from trainer.parts import read_part
from trainer.peak_flops import device_peak_flops
from trainer.profiler import StepProfiler
from trainer.randomness import Purpose, bits, normal
from trainer.recipe import Recipe
from trainer.recipe_sections import Precision
from trainer.restore import load_state, read_weights
from trainer.run import Run
from trainer.saving import CheckpointWriter, Job, NotPublishedError
from trainer.session import Session, open_session, roll_back
from trainer.snapshots import snapshot_is_due
from trainer.stop import StopReason, StopRequest
from trainer.telemetry import MetricsLog
from trainer.timestep_source import TimestepSource
from trainer.unet import UNet

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """What concerns one start of training and no recipe.

    Attributes:
        allowed: Keys of the recipe that may differ from those of the run so far.
        profile: Steps of the attempt to profile; None for none.
    """

    allowed: tuple[str, ...] = ()
    profile: range | None = None


def train(
    recipe: Recipe, run: Run, ranks: Ranks, stop: StopRequest, options: Options = Options()
) -> StopReason:
    """Train until the recipe's images are seen or a stop is asked for; resume if the run exists.

    Returns:
        `StopReason.REQUESTED` if the run is to be resumed, else it is finished.

    Raises:
        UserError: Data, recipe or run directory cannot be used.
        DivergedError: Too many updates were dropped, and going back did not help.
        StorageFault: The store failed for longer than the retries last.
    """
    damaged: list[str] = []
    session = ranks.on_main(lambda: open_session(recipe, run, ranks.world, options.allowed))
    stop.start_budget(recipe.train.max_minutes)
    while True:
        try:
            trainer = Trainer(recipe, run, ranks, session, options)
        except DamagedCheckpointError as error:
            assert session.parent is not None, "nothing else is loaded"
            damaged.append(session.parent.name)
            log.warning("checkpoint %s is passed over: %s", damaged[-1], error)
            session = ranks.on_main(
                lambda: open_session(recipe, run, ranks.world, options.allowed, refused=damaged)
            )
            continue
        ended = _attempt(ranks, trainer, stop)
        if isinstance(ended, StopReason):
            return ended
        # The next attempt makes a state of its own; DeepSpeed's engine holds this one and refers to itself.
        del trainer
        gc.collect()
        session = ranks.on_main(lambda: _roll_back(recipe, run, session, ended))  # noqa: B023 (called at once)


def _attempt(ranks: Ranks, trainer: "Trainer", stop: StopRequest) -> StopReason | RollBackError:
    """Train one attempt; return why it ended. Whatever it held is released."""
    try:
        return trainer.run_until(stop)
    except RollBackError as trouble:
        trainer.writer.wait()
        # What led here stays readable, though it is no part of the run's lineage any more.
        trainer.metrics.cut(trainer.state.images)
        ranks.on_main(lambda: _flush(trainer.metrics))
        return trouble.with_traceback(None)
    finally:
        trainer.close()


def _flush(metrics: MetricsLog) -> None:
    try:
        metrics.flush()
    except StorageFault as error:
        log.warning("metrics of the attempt that is rolled back are lost: %s", error)


def _roll_back(recipe: Recipe, run: Run, session: Session, trouble: RollBackError) -> Session:
    try:
        return roll_back(recipe, run, session, trouble)
    except DivergedError:
        run.fail_attempt(session.attempt.attempt)
        raise


class Trainer:
    """One rank's part of one attempt."""

    def __init__(
        self, recipe: Recipe, run: Run, ranks: Ranks, session: Session, options: Options = Options()
    ) -> None:
        self.recipe, self.run, self.ranks, self.session = recipe, run, ranks, session
        self.device = ranks.device
        self.diffusion, self.loss = recipe.build_diffusion(), recipe.loss.config()
        self.micro_steps = micro_steps(recipe, ranks.world)
        self.dtype = torch.float64 if recipe.precision is Precision.FP64 else torch.float32
        model = self._network(session.parent)
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self.engine = Engine(recipe.for_ranks(ranks.world), model, ranks, self.micro_steps)
        self.ema = PartitionedEma(recipe.ema, self.engine.partition.masters)
        self.timesteps = TimestepSource(recipe, self.device)
        self.state = session.state(recipe)
        try:
            self._load(session.parent)
        except DamagedCheckpointError:
            self.engine.close()
            raise
        self.stream = open_stream(recipe, run, ranks.rank, ranks.world, self.state.position)
        self.window = LogWindow(
            self.device,
            self.diffusion.num_timesteps,
            flops_per_image=training_flops_per_image(recipe.unet_config()),
            peak_flops=device_peak_flops(self.device, recipe.precision),
            hosts=ranks.gather(socket.gethostname()),
        )
        self.profiler = StepProfiler(run, session.attempt.attempt, ranks.rank, options.profile)
        loggers = open_loggers(recipe.logging, run, session.attempt) if ranks.is_main else []
        self.metrics = MetricsLog(run, session.attempt.attempt, self.state.images, loggers)
        self.writer = CheckpointWriter(
            run,
            ranks,
            self.engine.partition,
            self.ema.flats,
            self.shapes,
            recipe.checkpoint,
            recipe.ema,
            self.metrics,
        )
        self._saved = session.parent.images if session.parent else None

    def run_until(self, stop: StopRequest) -> StopReason:
        """Train to the end or to the first step boundary at which any rank wants to stop.

        Raises:
            RollBackError: Too many updates were dropped.
        """
        recipe, state = self.recipe, self.state
        reason = StopReason.NONE
        silent = not self.ranks.is_main
        progress = Progress("train", recipe.train.images, "img", start=state.images, silent=silent)
        with progress, self.profiler as profiler:
            batches = iter(DeviceStream(self.stream, self.device))
            while state.images < recipe.train.images and reason is StopReason.NONE:
                before = state.images
                with profiler.span("wait for data"):
                    batch = next(batches)
                reason = self.step(batch, StopReason.FAULT if self.writer.has_failed else stop.reason())
                if is_due(recipe.logging.every_images, before, state.images):
                    self.log_metrics(progress)
                if is_due(recipe.checkpoint.every_images, before, state.images):
                    is_last = state.images >= recipe.train.images or reason is not StopReason.NONE
                    self.save(snapshot=is_last or snapshot_is_due(recipe, before, state.images))
                elif snapshot_is_due(recipe, before, state.images):
                    self.save(checkpoint=False, snapshot=True)
                profiler.step()
        self.finish()
        assert reason is not StopReason.FAULT, "what could not be written is raised when it is waited for"
        self._end("requeue" if reason is StopReason.REQUESTED else "finished")
        return reason

    def step(self, batch: DeviceBatch, wish: StopReason = StopReason.NONE) -> StopReason:
        """One optimizer update over the global batch: Algorithm 1, lines 2 to 5.

        Args:
            batch: This rank's part of it.
            wish: Whether this rank wants to stop after it.

        Returns:
            The weightiest of all ranks' wishes.

        Raises:
            RollBackError: One update too many was dropped.
        """
        recipe, state = self.recipe, self.state
        self._seed_dropout()
        seen = self._forward_and_backward(batch)
        loss, reason = self._agree(seen, wish)
        objections: list[str] = []

        def allow(norm: float) -> bool:
            objections.extend(filter(None, [state.guard.objection(loss, norm)]))
            return not objections

        rate = learning_rate(recipe.optimizer, state.images)
        with self.profiler.span("reduce, clip, update"):
            outcome = self.engine.update(rate, adam_epsilon(recipe.optimizer, state.updates), allow)
        start = state.position
        state.position += recipe.batch.total
        if not outcome.applied:
            self._drop(start, loss, objections)
            return reason
        state.guard.applied(loss, outcome.grad_norm)
        self.window.note_update(outcome.grad_norm)
        for losses, t, weights in seen:
            self.window.add(losses, t, weights)
            self.timesteps.observe(t, losses)
        with self.profiler.span("average"):
            self.ema.update(state.images, recipe.batch.total)
        self.timesteps.after_update(state.images, state.images + recipe.batch.total, self.ranks)
        state.images += recipe.batch.total
        state.updates += 1
        return reason

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
        x0 = pictures.permute(0, 3, 1, 2).to(self.dtype) / 127.5 - 1.0
        t, weights = self.timesteps.draw(n)
        noise = normal(recipe.seed, Purpose.NOISE, n, tuple(x0.shape[1:])).to(self.dtype)
        x_t = self.diffusion.q_sample(x0, t, noise)
        output = self.engine.forward(x_t, t)
        losses = training_losses(self.diffusion, output, x0, x_t, t, noise, self.loss)
        return losses, t, weights

    def log_metrics(self, progress: Progress) -> None:
        """Reduce the window's metrics over the ranks and write one row."""
        masters, averages = self.engine.partition.masters, self.ema.flats
        row = self.window.row(self.ranks, self.stream.wait_seconds, masters, averages)
        row["learning_rate"] = learning_rate(self.recipe.optimizer, self.state.images)
        row["skipped_updates"] = float(
            sum(b - a for a, b in self.state.guard.skips) // self.recipe.batch.total
        )
        row["checkpoint_stall_seconds"] = self.writer.stalled_seconds
        row["checkpoints_given_up"] = float(self.writer.given_up)
        row["storage_retries"] = float(self.run.storage.retries)
        # Of all ranks, since the attempt began.
        counts = self.ranks.total(torch.tensor(self.stream.counts, dtype=torch.float64)).tolist()
        row |= {f"data_{name}": count for name, count in zip(StreamCounts._fields, counts, strict=True)}
        if self.ranks.is_main:
            self.metrics.log(self.state.images, row)
        wait = f"{100 * row['data_wait_share']:.1f}%"
        progress.update(self.state.images, loss=f"{row['loss']:.4f}", wait=wait)

    def save(self, *, checkpoint: bool = True, snapshot: bool = False) -> None:
        """Begin to write a checkpoint, or a snapshot of the averages, or both, of this moment.

        Raises:
            UserError: What came before could not be written, for a reason that time does not mend.
        """
        self.writer.start(Job(self._draft(), self.timesteps.tensors(self.ranks), checkpoint, snapshot))
        if checkpoint:
            self._saved = self.state.images

    def finish(self) -> None:
        """Publish this moment, unless that has been done.

        Raises:
            NotPublishedError: The store failed for too long.
            UserError: It refuses for a reason that time does not mend.
        """
        if self._saved != self.state.images:
            self.save(snapshot=True)
        given_up = self.writer.given_up
        self.writer.wait()
        if self.writer.given_up > given_up:
            raise NotPublishedError(f"{self.run.url}: the last checkpoint could not be published")

    def close(self) -> None:
        """Stop reading ahead and release the engine."""
        self.stream.close()
        self.writer.close()
        self.metrics.close()
        self.engine.close()

    def _forward_and_backward(self, batch: DeviceBatch) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Add up this rank's gradient; return losses, timesteps and weights of each micro-step."""
        positions, pictures = batch.positions, batch.images
        seen = []
        for number, chunk in enumerate(np.array_split(np.arange(len(positions)), self.micro_steps), start=1):
            # A rank with fewer images than micro-steps joins the collective with a picture of weight zero.
            select = slice(0, 1) if len(chunk) == 0 else slice(int(chunk[0]), int(chunk[-1]) + 1)
            with self.profiler.span("forward"), self.window.computing():
                losses, t, weights = self.losses(pictures[select], positions[select])
            if len(chunk) == 0:
                weights = torch.zeros_like(weights)
            loss = (weights * losses).sum() / self.recipe.batch.total
            with self.profiler.span("backward"):
                self.window.time_backward(loss)
                self.engine.backward(loss)
            if len(chunk) > 0:
                seen.append((losses.detach(), t, weights))
            if number < self.micro_steps:
                self.engine.micro_step_done()
        return seen

    def _agree(
        self, seen: Sequence[tuple[Tensor, Tensor, Tensor]], wish: StopReason
    ) -> tuple[float, StopReason]:
        """Return the global batch's mean loss and the ranks' weightiest wish to stop, in one collective.

        This waits for the device, as DeepSpeed does right after it: the guard must know before Adam does.
        """
        mine = sum(float((weights * losses).sum(dtype=torch.float64)) for losses, _, weights in seen)
        wishes = [float(wish is reason) for reason in StopReason]
        total = self.ranks.total(torch.tensor([mine, *wishes], dtype=torch.float64)).tolist()
        weightiest = max(reason for reason, count in zip(StopReason, total[1:], strict=True) if count)
        return total[0] / self.recipe.batch.total, weightiest

    def _drop(self, start: int, loss: float, objections: Sequence[str]) -> None:
        """Record an update that was not applied."""
        self.window.note_update(None)
        if self.engine.may_lower_scale and math.isfinite(loss) and not objections:
            self.state.guard.overflowed(start)
        else:
            self.state.guard.dropped(start, objections[0] if objections else "its gradient is not finite")

    def _seed_dropout(self) -> None:
        """Key the dropout masks of the next update by (seed, images, rank)."""
        if self.recipe.model.dropout > 0:
            images = torch.tensor([self.state.images])
            words = bits(self.recipe.seed, Purpose.DROPOUT, images, words=2, draw=self.ranks.rank)[0].tolist()
            torch.manual_seed(words[0] | words[1] << 32)

    def _network(self, parent: Manifest | None) -> UNet:
        """Make the network, with the parent's weights or initial ones that are equal on every rank."""
        model = UNet(self.recipe.unet_config(), torch.Generator().manual_seed(self.recipe.seed)).to(
            self.dtype
        )
        if parent is not None:
            model.load_state_dict(read_weights(self.run, parent, self.ranks))
        return model

    def _load(self, parent: Manifest | None) -> None:
        """Fill moments, masters and averages from the parent."""
        if parent is None:
            return
        began = time.monotonic()
        read = load_state(self.run, parent, self.engine.partition.targets(self.ema.flats), self.ranks)
        log.info(
            "state of checkpoint %s: %.1f MB in %.2f s", parent.name, read / 1e6, time.monotonic() - began
        )
        self.engine.resume(parent.updates, parent.loss_scale)
        parts = {entry.role: entry for entry in parent.files}
        if self.timesteps.is_loss_aware and "timesteps" in parts:  # imported weights come without
            self.timesteps.load(read_part(self.run, parent, parts["timesteps"]))

    def _draft(self) -> Manifest:
        """The manifest of this moment, without files."""
        state, attempt = self.state, self.session.attempt
        return Manifest(
            run=attempt.run,
            attempt=attempt.attempt,
            images=state.images,
            position=state.position,
            updates=state.updates,
            skips=state.guard.skips,
            guard=state.guard.state,
            loss_scale=self.engine.loss_scale,
            recipe_sha=attempt.recipe_sha,
            index_sha=attempt.index_sha,
            topology=Topology(
                world=self.ranks.world, zero_stage=self.engine.zero_stage, device=self.device.type
            ),
        )

    def _end(self, outcome: str) -> None:
        published = self.writer.published or self.session.parent
        end = AttemptEnd.model_validate(
            {
                "attempt": self.session.attempt.attempt,
                "outcome": outcome,
                "images": self.state.images,
                "checkpoint": published.name if published else None,
            }
        )
        self.ranks.on_main(lambda: self.run.end_attempt(end))
