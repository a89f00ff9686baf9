"""What a dry run says equals what training does: batches, steps, files, reads."""

import io
import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from data_pipeline.build import BuildOptions, build
from data_pipeline.errors import UserError
from data_pipeline.index import load_index
from data_pipeline.local_files import LocalFiles
from data_pipeline.order import Order, rank_slice
from data_pipeline.reader import RangeRequest, ShardReader
from data_pipeline.sources.digits import DigitsSource
from data_pipeline.sources.folder import FolderSource
from tests.support import TINY, make_run, publish_checkpoint
from trainer import checkpoint as checkpoints
from trainer.batches import plan_batches
from trainer.clock import is_due, learning_rate
from trainer.collectives import bytes_sent
from trainer.data import open_stream
from trainer.dry_run import DryRun, dry_run
from trainer.dry_run_report import notes, report
from trainer.ema import PartitionedEma
from trainer.forecast import ASSUMED_UTILISATION
from trainer.partition import of_whole_model
from trainer.parts import write_part
from trainer.recipe import Recipe, load_recipe
from trainer.run import Run
from trainer.traffic import DataPlan, plan_data
from trainer.unet import UNet


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Many small shards, so that there are several windows."""
    out = str(tmp_path_factory.mktemp("digits") / "shards")
    build(DigitsSource(), out, BuildOptions(shard_bytes=60_000))
    return out


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Pictures that are large beside what a rank may read ahead."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "in").mkdir()
    for number in range(200):
        noise = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "in" / f"{number}.png")
    build(FolderSource(folder / "in"), str(folder / "out"), BuildOptions(size=64, shard_bytes=200_000))
    return str(folder / "out")


def tiny(*overrides: str) -> Recipe:
    return load_recipe("quickstart", [*TINY, *overrides])


def text_of(plan: DryRun) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(report(plan))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@settings(deadline=None)
@given(total=st.integers(1, 100), ranks=st.integers(1, 40), micro=st.one_of(st.none(), st.integers(1, 100)))
def test_batches_are_divided_as_training_divides_them(total: int, ranks: int, micro: int | None) -> None:
    micro = None if micro is None else min(micro, total)
    recipe = tiny(f"batch.total={total}", f"batch.micro={'null' if micro is None else micro}")
    if ranks > total:
        with pytest.raises(UserError, match="raise it"):
            plan_batches(recipe, ranks)
        return
    plan = plan_batches(recipe, ranks)
    shares = [rank_slice(total, rank, ranks) for rank in range(ranks)]
    # As `Trainer` divides its part of a batch.
    chunks = [np.array_split(np.arange(s.stop - s.start), plan.micro_steps) for s in shares]
    assert plan.micro_batch == max(len(chunk) for own in chunks for chunk in own)
    assert plan.micro_batch <= (micro or total)
    assert plan.padding == sum(len(chunk) == 0 for own in chunks for chunk in own)
    assert plan.ranks_with_most * plan.most + (ranks - plan.ranks_with_most) * plan.least == total
    assert 0 < plan.balance <= 1


@pytest.mark.parametrize("start", [0, 130, 1_000])
@pytest.mark.parametrize(("images", "every"), [(1_000, 100), (1_040, 130), (999, 7), (50, 1_000)])
def test_the_schedule_is_the_one_that_training_runs(
    tmp_path: Path, start: int, images: int, every: int
) -> None:
    ema = ["ema.main={half_life_images: null, half_life_share: null, std: 0.1}"]
    same = ["batch.total=13", "optimizer.warmup_images=100", *ema]
    pace = [f"checkpoint.every_images={every}", f"logging.every_images={2 * every}"]
    recipe = tiny(f"train.images={images}", *pace, *same)
    run = make_run(str(tmp_path), recipe_overrides=same, images_list=(start,) if start else ())
    seen, updates, saves, rows, published = start, 0, 0, 0, start or None
    while seen < images:  # as `Trainer.run_until` goes on
        before, seen, updates = seen, seen + 13, updates + 1
        rows += is_due(2 * every, before, seen)
        if is_due(every, before, seen):
            saves, published = saves + 1, seen
    if published != seen and updates:
        saves += 1
    schedule = dry_run(recipe, run, 1).schedule
    assert (schedule.start_images, schedule.images, schedule.updates) == (start, seen, updates)
    assert (schedule.checkpoints, schedule.log_rows, schedule.snapshots) == (saves, rows, saves)
    warm = schedule.warmup_updates
    section = recipe.optimizer
    assert (
        learning_rate(section, 13 * (warm - 1)) < section.learning_rate == learning_rate(section, 13 * warm)
    )


def test_a_checkpoint_takes_what_its_files_take(tmp_path: Path) -> None:
    ranks = 3
    recipe = tiny("deepspeed.zero_stage=0", "ema.paper={decay: 0.9999, per_images: 128}")
    run = Run(str(tmp_path))
    network = UNet(recipe.unet_config())
    weights = dict(network.named_parameters())
    entries = [write_part(run, "x", "weights.safetensors", weights, "weights").entry]
    for profile in recipe.ema:
        entries.append(write_part(run, "x", f"ema-{profile}", weights, "ema", profile).entry)
    for rank in range(ranks):
        part = of_whole_model(network, torch.optim.Adam(network.parameters()), rank, ranks)
        slices = part.slices(PartitionedEma(recipe.ema, part.masters).flats)
        entries.append(checkpoints.write_state(run, "x", rank, slices).entry)
    written = dry_run(recipe, None, ranks).written

    def content(role: str) -> list[int]:
        return [
            entry.bytes - header(tmp_path / "checkpoints" / "x" / entry.path)
            for entry in entries
            if entry.role == role
        ]

    assert sum(content("weights")) == written.weights
    assert sum(content("ema")) == written.averages
    assert sum(content("state")) == written.state
    assert max(content("state")) == written.state_of_rank
    assert written.checkpoint == written.weights + written.averages + written.state
    assert written.kept == recipe.checkpoint.keep * written.checkpoint


def header(file: Path) -> int:
    """Bytes before the numbers of a safetensors file."""
    with file.open("rb") as opened:
        return 8 + int(struct.unpack("<Q", opened.read(8))[0])


@pytest.mark.parametrize(
    ("data", "ranks", "rank", "settings"),
    [
        ("digits", 1, 0, ()),
        ("digits", 3, 2, ()),
        ("digits", 16, 5, ()),
        ("digits", 2, 0, ("data.window_shards=1",)),
        ("photos", 1, 0, ("data.prefetch_mib=1",)),
        ("photos", 5, 4, ("data.prefetch_mib=1",)),
    ],
)
def test_reads_are_those_of_a_real_stream(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    data: str,
    ranks: int,
    rank: int,
    settings: Sequence[str],
) -> None:
    """A real stream reads three windows; what its planner asked for the last two is what is said of them."""
    url = request.getfixturevalue(data)
    shape = (
        ("image={size: 64, channels: 3, flip: false}", "model.attention_resolutions=[]")
        if data == "photos"
        else ()
    )
    recipe = tiny(f"data.url={url}", "batch.total=32", "data.window_shards=4", *shape, *settings)
    samples = [entry.samples for entry in load_index(url).shards("train")]
    order = Order(samples, recipe.seed, recipe.data.window_shards)
    mine = rank_slice(32, rank, ranks)
    first_end = order.window_end(0)
    end = order.window_end(order.window_end(first_end))
    planned: list[tuple[int, list[RangeRequest]]] = []
    real = ShardReader.plan

    def recorded(self: ShardReader, shards: Any, *rest: Any) -> list[RangeRequest]:
        requests = real(self, shards, *rest)
        planned.append((len(shards), requests))
        return requests

    with monkeypatch.context() as patch:
        patch.setattr(ShardReader, "plan", recorded)
        with open_stream(recipe, Run(str(tmp_path)), rank, ranks, 0) as stream:
            while stream.position < end:
                next(stream)
            assert stream.counts.requests > 0

    def pictures(until: int) -> int:
        return sum(mine.start <= position % 32 < mine.stop for position in range(until))

    # The first window is left out: of it the first batch is read by itself.
    before, upto = pictures(first_end), pictures(end)
    requests, taken = [], 0
    for number, of_segment in planned:
        if before <= taken < upto:
            requests += of_segment
        taken += number
    monkeypatch.setattr("trainer.traffic._some", lambda _: [rank])

    def said(windows: int) -> DataPlan:
        monkeypatch.setattr("trainer.traffic._WINDOWS", windows)
        return plan_data(recipe, ranks, ranks)

    first, three = said(1), said(3)

    def last_two(name: str) -> float:
        return getattr(three, name) * upto - getattr(first, name) * before  # type: ignore[no-any-return]

    assert last_two("requests") == pytest.approx(len(requests))
    assert last_two("bytes") == pytest.approx(sum(one.stop - one.start for one in requests))
    assert last_two("record_requests") == pytest.approx(len({one.shard for one in requests}))
    held = sum(int(one.records["size"].sum()) for one in requests)
    assert last_two("picture_bytes") == pytest.approx(held)
    assert (three.sources[0].parts > 1) == ((data, ranks) == ("photos", 1))


def test_a_cache_reads_each_block_once(digits: str, tmp_path: Path) -> None:
    settings = [f"data.url={digits}", "batch.total=32", "data.window_shards=2"]
    plain = plan_data(tiny(*settings), 16, 16)
    cached = plan_data(tiny(*settings, f"data.cache_dir={tmp_path}"), 16, 16)
    assert cached.cached
    assert cached.requests < plain.requests / 2
    shards = load_index(digits).shards("train")
    order = Order([entry.samples for entry in shards], 0, 2)
    window, _ = order.locate(np.arange(order.window_end(order.window_end(0))))
    # Shards are smaller than a block: each is read once, whole.
    touched = np.unique(window)
    assert cached.requests * len(window) == pytest.approx(len(touched))
    assert cached.bytes * len(window) == pytest.approx(sum(shards[shard].bytes for shard in touched))


def test_mixed_data_sets(digits: str, tmp_path: Path) -> None:
    other = str(tmp_path / "other")
    build(DigitsSource(), other)
    also = f"data.also=[{{url: {other}, weight: 0.5}}]"
    plan = plan_data(tiny(f"data.url={digits}", also, "data.window_shards=2"), 4, 4)
    assert [source.url for source in plan.sources] == [digits, other]
    assert sum(source.share for source in plan.sources) == 1
    assert plan.sources[0].share == pytest.approx(2 / 3, abs=1 / 1024)
    assert plan.pictures == 2 * load_index(digits).index.samples("train")


def test_little_is_read_and_nothing_is_written(
    digits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny(f"data.url={digits}", f"run={tmp_path / 'run'}", "data.window_shards=2")
    read: list[str] = []
    real = LocalFiles.read

    def counted(self: LocalFiles, path: str, *rest: Any) -> bytes:
        read.append(Path(path).name)
        return real(self, path, *rest)

    monkeypatch.setattr(LocalFiles, "read", counted)
    plan = dry_run(recipe, Run(recipe.run), 4, 2)
    assert not (tmp_path / "run").exists()
    assert plan.data is not None
    assert sum(name.endswith(".idx") for name in read) == plan.data.reads <= 8
    assert read.count("index.json") == 2
    assert len(read) == 2 + plan.data.reads


def test_without_data_its_part_is_left_out() -> None:
    plan = dry_run(tiny(), None, 2)
    assert plan.data is None
    assert "left out: give data.url" in text_of(plan)


def test_speed_is_told_seen_or_reckoned(digits: str, tmp_path: Path) -> None:
    settings = [f"data.url={digits}", "batch.total=64", "data.window_shards=2", "train.images=6400"]
    recipe = tiny(*settings)
    assert dry_run(recipe, None, 2).speed.images_per_second is None
    assert "give --images-per-second" in text_of(dry_run(recipe, None, 2))

    reckoned = dry_run(recipe, None, 3, peak=1e12)
    # The slowest rank has 22 images.
    seconds = 22 * reckoned.arithmetic.executed / (ASSUMED_UTILISATION * 1e12)
    assert reckoned.speed.images_per_second == pytest.approx(64 / seconds)
    assert "an assumption" in reckoned.speed.basis

    told = dry_run(recipe, None, 2, images_per_second=100.0, peak=1e12)
    assert told.speed.seconds == 64
    assert told.data is not None
    per_picture = told.data.requests + told.data.record_requests
    assert told.speed.requests_per_second == pytest.approx(100 * per_picture)
    assert told.speed.read_seconds == pytest.approx(2 * recipe.data.requests / (100 * per_picture))
    assert told.speed.sent_per_second == pytest.approx(told.sent * 100 / 64)

    run = make_run(str(tmp_path / "run"), recipe_overrides=settings, images_list=())
    for start, speeds in ((0, [500.0, 400.0]), (128, [350.0, 320.0, None])):
        rows = [json.dumps({"schema": "metrics/1", "images_per_second": speed}) for speed in speeds]
        run.storage.create(f"metrics/000001/{start:010d}.jsonl", "\n".join(rows).encode())
    index_sha = load_index(digits).sha256
    publish_checkpoint(run, recipe, 1, 192, UNet(recipe.unet_config()), index_sha)  # by one rank
    seen = dry_run(recipe, run, 1)
    assert seen.speed.images_per_second == 320.0
    assert seen.schedule.start_images == 192
    assert seen.speed.seconds == pytest.approx((6400 - 192) / 320)
    scaled = dry_run(recipe, run, 3)
    assert scaled.speed.images_per_second == pytest.approx(320 * 64 / 22)
    assert "an assumption" in scaled.speed.basis


def test_mistakes_are_those_of_training(digits: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"batch\.total=64 is less than the 65 ranks"):
        dry_run(tiny(), None, 65)
    with pytest.raises(UserError, match=r"image\.size=16"):
        dry_run(tiny(f"data.url={digits}", "image.size=16", "model.attention_resolutions=[8]"), None, 1)
    with pytest.raises(UserError, match="no finished data set here"):
        dry_run(tiny(f"data.url={tmp_path}"), None, 1)
    with pytest.raises(UserError, match="was trained on another index"):
        dry_run(tiny(f"data.url={digits}"), make_run(str(tmp_path / "other")), 1)
    with pytest.raises(UserError, match=r"deepspeed\.config\.zero_optimization: overlap_com: "):
        dry_run(
            tiny("deepspeed.config={zero_optimization: {overlap_com: true}}", f"data.url={digits}"), None, 1
        )
    run = make_run(str(tmp_path / "run"), images_list=())
    for data in ("", f"data.url={digits}"):
        with pytest.raises(UserError, match="seed: 0 -> 7"):
            dry_run(tiny("seed=7", *([data] if data else [])), run, 1)
    assert dry_run(tiny("seed=7", f"data.url={digits}"), run, 1, allowed=["seed"]).batch.ranks == 1


def test_what_ranks_send() -> None:
    whole = 4 * sum(parameter.numel() for parameter in UNet(tiny().unet_config()).parameters())

    def sent(stage: int, ranks: int, steps: int = 1) -> float:
        return bytes_sent(tiny(f"deepspeed.zero_stage={stage}"), ranks, steps) / whole

    assert [sent(stage, 1) for stage in range(4)] == [0] * 4
    assert [sent(stage, 2) for stage in range(4)] == [1, 1.5, 1.5, 1]
    # Parameters as small as all of these are gathered once by ZeRO 3.
    assert [sent(stage, 2, 3) for stage in range(4)] == [1, 1.5, 3.5, 2]


def test_json_holds_everything(digits: str) -> None:
    plan = dry_run(tiny(f"data.url={digits}", "data.window_shards=2"), None, 2, images_per_second=10)
    content = json.loads(plan.to_json())
    assert content["schema"] == "dry-run/1"
    assert content["memory"][0]["device"] == plan.memory[0].device
    again = DryRun.from_json(plan.to_json(), "here")
    assert again == plan


def test_people_are_told_what_looks_wrong(digits: str) -> None:
    uneven = dry_run(tiny("batch.total=10", "batch.micro=1"), None, 4)
    assert uneven.batch.padding == 2
    found = " ".join(notes(uneven))
    assert "2 ranks of 4 have 2 images instead of 3 and wait: 16.7%" in found
    assert "no GPU is visible here" in found
    assert "2 pictures of weight zero per update" in text_of(uneven)

    large = dry_run(load_recipe("quickstart", ["batch.total=4096"]), None, 1, gpu_gib=1.0)
    assert any("do not fit" in note for note in notes(large))
    assert 0 < large.micro_batches[1] < 4096 < large.micro_batches[16]

    busy = dry_run(tiny(f"data.url={digits}", "data.window_shards=2"), None, 64, images_per_second=1e5)
    assert any("5,500" in note for note in notes(busy))
    recipe = tiny("train.max_minutes=10", "batch.total=4096", f"data.url={digits}", "data.window_shards=2")
    slow = dry_run(recipe, None, 1, images_per_second=0.01)
    said = " ".join(notes(slow))
    assert "train.max_minutes=10" in said
    assert "a crash may cost" in said
    assert "larger than an epoch" in said


def test_the_report_names_the_recipes_stage() -> None:
    plan = dry_run(tiny("deepspeed.zero_stage=2"), None, 2)
    text = text_of(plan)
    assert "2 *" in text
    assert f"{plan.parameters:,} parameters" in text
