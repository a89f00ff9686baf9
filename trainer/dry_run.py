"""`ddpm train --dry-run`: what a training will need and do, said before it starts.

Everything comes from the code that trains: the division of batches, the requests of the reader, the network
itself. Nothing is written and no picture is read. Where a figure rests on an assumption, `Speed.basis` and
`DryRun.notes` say so.
"""

import contextlib
import math
import tempfile
from collections.abc import Collection, Iterator
from typing import ClassVar, Final

from pydantic import BaseModel, ConfigDict

from data_pipeline.documents import Document
from trainer.batches import BatchPlan, plan_batches
from trainer.collectives import bytes_sent
from trainer.flops import executed_flops_per_image, flops_per_image, training_flops_per_image
from trainer.forecast import History, forecast_speed
from trainer.memory import RankMemory, largest_micro_batch, memory_by_stage, network_of
from trainer.preflight import check_inputs
from trainer.recipe import Recipe
from trainer.run import PIN_LIFETIME_SECONDS, Run
from trainer.snapshots import power_profiles
from trainer.traffic import DataPlan, plan_data

CARDS_GIB: Final = (16, 24, 40, 80)
"""Memory of GPUs for which the largest micro batch is told."""
USABLE_SHARE: Final = 0.9
"""Of a GPU's memory; the rest is for CUDA, libraries and what the allocator cannot reuse. An assumption."""
_BATCHES_IN_USE: Final = 2  # beyond those prefetched: one is trained on, one on its way to the device


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class Schedule(_Part):
    """The course of training; images are those applied by the optimizer.

    Attributes:
        start_images: Where it begins: at the newest checkpoint of an existing run.
        images: Where it ends; a whole number of updates.
        updates: From there to here.
        warmup_updates: Updates of the whole training with a learning rate below the full one.
        log_rows: Rows of metrics still to come.
        checkpoints: Checkpoints still to come.
        snapshots: Moments still to come at which power-function averages are kept for good.
    """

    start_images: int
    images: int
    updates: int
    warmup_updates: int
    log_rows: int
    checkpoints: int
    snapshots: int


class Written(_Part):
    """Bytes in the run directory, without the files' headers (below 1 %).

    Attributes:
        weights: Of one checkpoint: weights.safetensors.
        averages: Of one checkpoint: all EMA profiles' files.
        state: Of one checkpoint: all ranks' parts together.
        state_of_rank: Of one checkpoint: the largest of them.
        checkpoint: All of one checkpoint.
        kept: Of the checkpoints that `checkpoint.keep` leaves.
        most: With those whose files wait for their readers and the one that is being written.
        snapshots: Of all snapshots still to come.
    """

    weights: int
    averages: int
    state: int
    state_of_rank: int
    checkpoint: int
    kept: int
    most: int
    snapshots: int


class Arithmetic(_Part):
    """Floating-point operations, a multiplication with its addition counted as two.

    Attributes:
        forward: Of one image.
        training: Of one image, forward and backward.
        executed: The same with what `model.checkpoint_activations` computes again.
        remaining: Of all images still to come, executed.
    """

    forward: int
    training: int
    executed: int
    remaining: int


class Speed(_Part):
    """How fast, and what follows; None where nothing is known.

    Attributes:
        images_per_second: All ranks together.
        basis: Where that number comes from.
        seconds: Until training ends.
        checkpoint_seconds: From one checkpoint to the next.
        requests_per_second: Reads that the store answers, all ranks together, in the first epoch.
        bytes_per_second: What they bring.
        read_seconds: How long a read may take, on average, if a rank's reads at the same time shall keep up.
        sent_per_second: Bytes that each rank sends to others, on average.
    """

    images_per_second: float | None
    basis: str
    seconds: float | None = None
    checkpoint_seconds: float | None = None
    requests_per_second: float | None = None
    bytes_per_second: float | None = None
    read_seconds: float | None = None
    sent_per_second: float | None = None


class Host(_Part):
    """Bytes of the host's memory for one rank, beside Python and its libraries.

    Attributes:
        coded: Most of coded pictures, read ahead.
        decoded: Of decoded batches.
        offloaded: By the optimizer's offloading.
        copies: Of the state, from which checkpoints are written.
    """

    coded: int
    decoded: int
    offloaded: int
    copies: int


class DryRun(Document):
    """What `ddpm train --dry-run` finds.

    Attributes:
        run: The run directory; empty if none is given.
        precision: What the network computes in.
        parameters: Numbers in the network.
        nodes: Machines of the job.
        batch: How a batch is divided.
        schedule: The course of training.
        written: What is written.
        arithmetic: Operations.
        memory: Of a rank on a GPU, at each stage that the recipe allows.
        layout: Which of them is the recipe's own.
        micro_batches: Largest `batch.micro` at the recipe's stage, by GiB of the GPU.
        sent: Bytes that each rank sends for one update, at the recipe's stage.
        host: Of one rank.
        data: What the store is asked; None without `data.url`.
        speed: How fast it goes.
        max_minutes: What the recipe allows an attempt.
        gpu_gib: Memory of the GPU that is here; None without one.
    """

    SCHEMA: ClassVar[str] = "dry-run/1"

    run: str
    precision: str
    parameters: int
    nodes: int
    batch: BatchPlan
    schedule: Schedule
    written: Written
    arithmetic: Arithmetic
    memory: list[RankMemory]
    layout: int
    micro_batches: dict[int, int]
    sent: int
    host: Host
    data: DataPlan | None
    speed: Speed
    max_minutes: float | None
    gpu_gib: float | None


def dry_run(
    recipe: Recipe,
    run: Run | None,
    ranks_per_node: int,
    nodes: int = 1,
    *,
    images_per_second: float | None = None,
    peak: float | None = None,
    gpu_gib: float | None = None,
    allowed: Collection[str] = (),
) -> DryRun:
    """Plan a training on GPUs without starting it.

    Args:
        recipe: What to train.
        run: The run directory, new or existing; None if none is given.
        ranks_per_node: Processes on each node, each with a GPU.
        nodes: Machines.
        images_per_second: Of all ranks together, if known.
        peak: Floating-point operations per second of one GPU in the recipe's precision, if known.
        gpu_gib: Memory of one GPU, if known.
        allowed: Keys of the recipe that may differ from those of the run so far.

    Raises:
        UserError: What `trainer.preflight.check_inputs` finds.
        StorageFault: The store failed for longer than the retries last.
    """
    ranks = ranks_per_node * nodes
    batch = plan_batches(recipe, ranks)
    _check(recipe, run, ranks, allowed)
    history = History.of(run)
    schedule = _schedule(recipe, history.images)
    arithmetic = _arithmetic(recipe, schedule)
    memory = memory_by_stage(recipe, ranks, batch.micro_steps, batch.micro_batch)
    data = plan_data(recipe, ranks, ranks_per_node) if recipe.data.url else None
    section = recipe.for_ranks(ranks).deepspeed
    layouts = [(row.zero_stage, row.offload_optimizer) for row in memory]
    layout = layouts.index((section.zero_stage, section.offload_optimizer))
    sent = bytes_sent(recipe, ranks, batch.micro_steps)
    rate, basis = forecast_speed(batch, arithmetic.executed, history, told=images_per_second, peak=peak)
    speed = Speed(images_per_second=None, basis=basis)
    if rate is not None:
        speed = _speed(recipe, schedule, data, batch, sent, rate, basis)
    written = _written(recipe, ranks, schedule, speed)
    return DryRun(
        run=run.url if run else "",
        precision=recipe.precision.value,
        parameters=network_of(recipe.unet_config(), recipe.precision).numel,
        nodes=nodes,
        batch=batch,
        schedule=schedule,
        written=written,
        arithmetic=arithmetic,
        memory=memory,
        layout=layout,
        micro_batches=_micro_batches(recipe, memory[layout], gpu_gib),
        sent=sent,
        host=_host(recipe, batch, memory[layout], written),
        data=data,
        speed=speed,
        max_minutes=recipe.train.max_minutes,
        gpu_gib=gpu_gib,
    )


def _micro_batches(recipe: Recipe, memory: RankMemory, gpu_gib: float | None) -> dict[int, int]:
    cards = {*CARDS_GIB, *([round(gpu_gib)] if gpu_gib else [])}
    return {
        card: largest_micro_batch(recipe, memory, int(USABLE_SHARE * card * 2**30)) for card in sorted(cards)
    }


def _host(recipe: Recipe, batch: BatchPlan, memory: RankMemory, written: Written) -> Host:
    image, data = recipe.image, recipe.data
    pictures = (data.prefetch_batches + _BATCHES_IN_USE) * batch.most
    return Host(
        coded=data.prefetch_mib << 20,
        decoded=pictures * image.size**2 * image.channels,
        offloaded=memory.host,
        copies=written.state_of_rank,
    )


def _check(recipe: Recipe, run: Run | None, ranks: int, allowed: Collection[str]) -> None:
    """Look for mistakes as training does; what is not given yet is not looked at."""
    if not recipe.data.url:
        if run is not None and run.has_recipe():
            run.check_recipe(recipe, allowed)
        return
    with _some_run(run) as place:
        check_inputs(recipe, place, ranks, allowed, on_gpu=True)


@contextlib.contextmanager
def _some_run(run: Run | None) -> Iterator[Run]:
    """The run, or an empty folder in its place."""
    if run is not None:
        yield run
        return
    with tempfile.TemporaryDirectory(prefix="ddpm-dry-run-") as folder:
        yield Run(folder)


def _schedule(recipe: Recipe, start: int) -> Schedule:
    batch, section = recipe.batch.total, recipe.checkpoint
    updates = math.ceil(max(recipe.train.images - start, 0) / batch)
    end = start + updates * batch

    def due(every: int) -> int:
        return min(updates, end // every - start // every)

    # One more at the end of the attempt, wherever that is.
    checkpoints = due(section.every_images) + (updates > 0 and end % section.every_images >= batch)
    every = section.snapshot_every_images or section.every_images
    snapshots = due(every) + (updates > 0 and end % every >= batch) if power_profiles(recipe.ema) else 0
    return Schedule(
        start_images=start,
        images=end,
        updates=updates,
        warmup_updates=math.ceil(recipe.optimizer.warmup_images / batch),
        log_rows=due(recipe.logging.every_images),
        checkpoints=checkpoints,
        snapshots=snapshots,
    )


def _arithmetic(recipe: Recipe, schedule: Schedule) -> Arithmetic:
    config = recipe.unet_config()
    executed = executed_flops_per_image(config)
    return Arithmetic(
        forward=flops_per_image(config),
        training=training_flops_per_image(config),
        executed=executed,
        remaining=executed * (schedule.images - schedule.start_images),
    )


def _written(recipe: Recipe, ranks: int, schedule: Schedule, speed: Speed) -> Written:
    network = network_of(recipe.unet_config(), recipe.precision)
    whole, roles = network.master_itemsize * network.numel, 3 + len(recipe.ema)
    averages = whole * len(recipe.ema)
    part = min(network.part(ranks, recipe.deepspeed.zero_stage), network.numel)
    one = whole + averages + whole * roles
    keep = recipe.checkpoint.keep
    # Files of a checkpoint withdrawn go when a later one is published, if its readers' time is over by then.
    waiting = 1
    if speed.checkpoint_seconds:
        waiting = max(1, math.ceil(PIN_LIFETIME_SECONDS / speed.checkpoint_seconds))
    return Written(
        weights=whole,
        averages=averages,
        state=whole * roles,
        state_of_rank=network.master_itemsize * part * roles,
        checkpoint=one,
        kept=keep * one,
        most=(keep + waiting + 1) * one,
        snapshots=schedule.snapshots * whole * len(power_profiles(recipe.ema)),
    )


def _speed(
    recipe: Recipe,
    schedule: Schedule,
    data: DataPlan | None,
    batch: BatchPlan,
    sent: int,
    rate: float,
    basis: str,
) -> Speed:
    per_picture = data.requests + data.record_requests if data else None
    return Speed(
        images_per_second=rate,
        basis=basis,
        seconds=(schedule.images - schedule.start_images) / rate,
        checkpoint_seconds=max(recipe.checkpoint.every_images, batch.total) / rate,
        requests_per_second=per_picture * rate if per_picture else None,
        bytes_per_second=(data.bytes + data.record_bytes) * rate if data else None,
        read_seconds=data.in_flight * batch.ranks / (per_picture * rate) if data and per_picture else None,
        sent_per_second=sent * rate / batch.total,
    )
