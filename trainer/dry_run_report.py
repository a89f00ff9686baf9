"""A dry run for people: sections with units, and sentences about what is assumed and what looks wrong."""

from collections.abc import Iterator
from typing import Final

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from trainer.dry_run import USABLE_SHARE, DryRun
from trainer.memory import RankMemory

S3_PREFIX: Final = 5500
"""GETs per second that Amazon S3 promises for one prefix of keys ("Optimizing Amazon S3 performance")."""
FAST_NETWORK: Final = 12.5e9
"""Bytes per second of a 100 Gbit/s network."""
LONG_LOSS_SECONDS: Final = 6 * 3600.0
_GIB: Final = 2**30
_MIB: Final = 2**20
_NAME_WIDTH: Final = 20
_COLUMNS: Final = {
    "parameters": "weights",
    "gradients": "grads",
    "masters": "masters",
    "moments": "Adam",
    "averages": "EMA",
    "communication": "buckets",
    "activations": "activ.",
    "transient": "trans.",
}
"""Fields of `RankMemory` and what the table calls them."""
Row = tuple[str, str]


def report(plan: DryRun) -> RenderableType:
    """Lay out a dry run for a terminal."""
    parts: list[RenderableType] = [Text(_headline(plan), style="bold")]
    for title, rows in (
        ("batch", _batch(plan)),
        ("training", _training(plan)),
        ("run directory", _written(plan)),
        ("data", _data(plan)),
        ("each rank", _rank(plan)),
    ):
        parts += ["", Text(title, style="bold"), _section(rows)]
    parts += ["", _memory(plan), Text(_cards(plan)), "", Text("notes", style="bold")]
    return Group(*parts, *(Text(f"- {note}") for note in notes(plan)))


def notes(plan: DryRun) -> list[str]:
    """Say what is assumed or left out, and what looks wrong, a sentence each."""
    return [*_about_memory(plan), *_about_batches(plan), *_about_speed(plan), *_about_data(plan)]


def _section(rows: Iterator[Row]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(width=_NAME_WIDTH, no_wrap=True)
    for name, value in rows:
        table.add_row(f"  {name}", Text(value))
    return table


def _headline(plan: DryRun) -> str:
    nodes = f" on {plan.nodes} nodes" if plan.nodes > 1 else ""
    ranks = _count(plan.batch.ranks, "rank")
    return (
        f"{plan.parameters:,} parameters, {plan.precision}, {ranks}{nodes}; run {plan.run or '(none given)'}"
    )


def _batch(plan: DryRun) -> Iterator[Row]:
    batch = plan.batch
    each = f"{batch.most}" if batch.most == batch.least else f"{batch.least} or {batch.most}"
    yield "an update", f"{_count(batch.total, 'image')}: {_count(batch.ranks, 'rank')} x {each}"
    steps = _count(batch.micro_steps, "micro-step")
    yield "a rank", f"{steps} of at most {_count(batch.micro_batch, 'image')}"
    if batch.padding:
        yield "padding", f"{_count(batch.padding, 'picture')} of weight zero per update"


def _training(plan: DryRun) -> Iterator[Row]:
    schedule, speed, arithmetic, total = plan.schedule, plan.speed, plan.arithmetic, plan.batch.total
    start = f"from {schedule.start_images:,} " if schedule.start_images else ""
    yield "images", f"{start}to {schedule.images:,} in {_count(schedule.updates, 'update')}"
    warmup = schedule.warmup_updates
    yield "warm-up", f"{_count(warmup, 'update')}, {warmup * total:,} images"
    again = "" if arithmetic.executed == arithmetic.training else ", some of it computed twice"
    forward, both = arithmetic.forward / 1e9, arithmetic.executed / 1e9
    yield "an image", f"{forward:,.2f} GFLOP forward, {both:,.2f} with backward{again}"
    yield "all images", f"{arithmetic.remaining / 1e18:,.4g} EFLOP"
    if speed.images_per_second is None or speed.seconds is None:
        yield "speed", speed.basis
        return
    yield "speed", f"{_number(speed.images_per_second)} images/s: {speed.basis}"
    yield "an update takes", f"{1e3 * total / speed.images_per_second:,.1f} ms"
    hours = speed.seconds * plan.batch.ranks / 3600
    yield "ETA", f"{_duration(speed.seconds)}, {hours:,.1f} hours of one GPU"


def _written(plan: DryRun) -> Iterator[Row]:
    written, schedule = plan.written, plan.schedule
    every = plan.speed.checkpoint_seconds
    pace = f", one in {_duration(every)}" if every else ""
    yield "checkpoints", f"{schedule.checkpoints:,} to come{pace}"
    parts = {"weights": written.weights, "EMA": written.averages, "state": written.state}
    each = ", ".join(f"{name} {_size(size)}" for name, size in parts.items())
    rate = f"; {written.checkpoint / every / 1e6:,.1f} MB/s on average" if every else ""
    yield "each", f"{_size(written.checkpoint)}: {each} (a rank {_size(written.state_of_rank)}){rate}"
    yield "kept", f"{_size(written.kept)}, at most {_size(written.most)} at a time"
    if written.snapshots:
        moments = _count(schedule.snapshots, "snapshot")
        yield "kept for good", f"{_size(written.snapshots)} of power-function averages in {moments}"
    yield "rows of metrics", f"{schedule.log_rows:,}"


def _data(plan: DryRun) -> Iterator[Row]:
    data, speed = plan.data, plan.speed
    if data is None:
        yield "pictures", "left out: give data.url=FOLDER_OR_URL"
        return
    updates = data.pictures / plan.batch.total
    yield "pictures", f"{data.pictures:,} of {data.picture_bytes / 1e3:,.1f} kB"
    yield "an epoch", f"{updates:,.1f} updates; {data.epochs:,.2f} epochs in all"
    for source in data.sources if len(data.sources) > 1 else ():
        yield "of which", f"{source.share:.1%} from {source.url} ({source.pictures:,} pictures)"
    yield "a window", f"{data.sources[0].window_pictures:,} pictures are mixed at a time"
    through = ", by the nodes' cache" if data.cached else ""
    ratio = data.bytes / data.picture_bytes
    yield "a picture", f"{data.requests:.4f} reads of {ratio:.2f} times its bytes{through}"
    yield "its records", f"{data.record_requests:.4f} reads of {data.record_bytes:,.0f} bytes, first epoch"
    if speed.requests_per_second is None or speed.bytes_per_second is None or speed.read_seconds is None:
        return
    megabytes = speed.bytes_per_second / 1e6
    yield "the store answers", f"{speed.requests_per_second:,.1f} requests/s, {megabytes:,.1f} MB/s"
    in_flight = data.in_flight * plan.batch.ranks
    yield "a read may take", f"{_number(1e3 * speed.read_seconds)} ms, {in_flight:,} at a time"


def _rank(plan: DryRun) -> Iterator[Row]:
    host, ranks = plan.host, plan.batch.ranks // plan.nodes
    if plan.batch.ranks > 1:
        per_second = plan.speed.sent_per_second
        pace = "" if per_second is None else f", {per_second / 1e6:,.1f} MB/s on average"
        yield "sends", f"{_size(plan.sent)} per update{pace}"
    pictures = f"at most {_size(host.coded)} coded and {_size(host.decoded)} decoded pictures"
    offloaded = f", {_size(host.offloaded)} offloaded" if host.offloaded else ""
    copies = f", {_size(host.copies)} of state for checkpoints"
    total = _size(ranks * (host.coded + host.decoded + host.offloaded + host.copies))
    yield "holds on the host", f"{pictures}{offloaded}{copies}; a node's {_count(ranks, 'rank')}: {total}"


def _memory(plan: DryRun) -> Table:
    images = _count(plan.batch.micro_batch, "image")
    unit, name = (_GIB, "GiB") if max(row.device for row in plan.memory) >= _GIB else (_MIB, "MiB")
    table = Table(
        title=f"{name} of a GPU, {images} at a time", title_justify="left", box=SIMPLE_HEAD, padding=0
    )
    table.add_column("ZeRO")
    for header in _COLUMNS.values():
        table.add_column(header, justify="right")
    table.add_column("GPU", justify="right", style="bold")
    table.add_column("host", justify="right")
    for number, row in enumerate(plan.memory):
        mark = " *" if number == plan.layout else ""
        sizes = [*(getattr(row, field) for field in _COLUMNS), row.device, row.host]
        table.add_row(f"{_stage(row)}{mark}", *(f"{size / unit:,.2f}" for size in sizes))
    return table


def _cards(plan: DryRun) -> str:
    cards = ", ".join(f"{most:,} on {card} GiB" for card, most in plan.micro_batches.items())
    return f"* the recipe's. Largest batch.micro there, with {USABLE_SHARE:.0%} of a card: {cards}"


def _about_memory(plan: DryRun) -> Iterator[str]:
    own = plan.memory[plan.layout]
    yield (
        "memory is what eager PyTorch holds; compiled blocks may keep less. CUDA, NCCL and cuDNN themselves "
        "are not counted"
    )
    if plan.gpu_gib is None:
        yield "no GPU is visible here, so its memory and its speed are not known"
        return
    usable = plan.gpu_gib * _GIB * USABLE_SHARE
    if own.device > usable:
        fitting = [_stage(row) for row in plan.memory if row.device <= usable]
        remedy = f"ZeRO {fitting[0]} would; " if fitting else ""
        yield (
            f"{_size(own.device)} do not fit well in this GPU's {plan.gpu_gib:.0f} GiB: {remedy}lower "
            "batch.micro or set model.checkpoint_activations=true"
        )


def _about_batches(plan: DryRun) -> Iterator[str]:
    batch = plan.batch
    if batch.balance < 1:
        waiting = _count(batch.ranks - batch.ranks_with_most, "rank")
        yield (
            f"{waiting} of {batch.ranks} have {batch.least} images instead of {batch.most} and wait: "
            f"{1 - batch.balance:.1%} of all computing; batch.total={batch.ranks * batch.most} would be even"
        )


def _about_speed(plan: DryRun) -> Iterator[str]:
    schedule, speed = plan.schedule, plan.speed
    if not schedule.updates:
        yield f"the run has seen {schedule.start_images:,} images: nothing is left to train"
    if plan.max_minutes is not None:
        yield f"train.max_minutes={plan.max_minutes:g} ends an attempt before, if it takes longer"
    if speed.checkpoint_seconds is not None and speed.checkpoint_seconds > LONG_LOSS_SECONDS:
        lost = _duration(speed.checkpoint_seconds)
        yield f"a crash may cost {lost} of training: lower checkpoint.every_images"
    if speed.sent_per_second is not None and speed.sent_per_second > FAST_NETWORK:
        seconds = plan.sent / FAST_NETWORK
        most = f"{1e3 * seconds:,.0f} ms an update: at most {plan.batch.total / seconds:,.0f} images/s"
        gigabytes = speed.sent_per_second / 1e9
        yield f"at this speed each rank sends {gigabytes:,.1f} GB/s; over 100 Gbit/s that alone takes {most}"


def _about_data(plan: DryRun) -> Iterator[str]:
    data, speed = plan.data, plan.speed
    if data is None:
        return
    if data.pictures < plan.batch.total:
        yield f"a batch is larger than an epoch of {data.pictures:,} pictures"
    for source in data.sources:
        if source.parts > 1 and not data.cached:
            yield (
                f"{source.url}: a rank's pictures of a window are read in {source.parts:.1f} parts, which "
                "makes more and smaller reads: raise data.prefetch_mib or set data.cache_dir"
            )
    if speed.requests_per_second is not None and speed.requests_per_second > S3_PREFIX:
        yield (
            f"{speed.requests_per_second:,.0f} requests/s are more than the {S3_PREFIX:,} that Amazon S3 "
            "promises for one prefix: set data.cache_dir, or spread the shards"
        )


def _stage(row: RankMemory) -> str:
    return f"{row.zero_stage}{' + offload' if row.offload_optimizer else ''}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _size(size: float) -> str:
    return f"{size / _GIB:,.2f} GiB" if size >= _GIB else f"{size / _MIB:,.1f} MiB"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60}:{minutes % 60:02d} h"
