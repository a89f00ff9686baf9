"""Real ranks that train small recipes, and how their runs are compared."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.support import TINY, metric_rows
from trainer import extensions
from trainer.parts import read_part
from trainer.run import Run

BATCH, STEPS, FEW = 8, 20, 6
SETTINGS = (
    *TINY,
    f"batch.total={BATCH}",
    f"optimizer.warmup_images={2 * BATCH}",
    "image.flip=true",
    f"train.images={STEPS * BATCH}",
    f"checkpoint.every_images={FEW * BATCH}",
    "checkpoint.keep=10",
    f"logging.every_images={BATCH}",
    "logging.tensorboard=false",
    "ema.paper={decay: 0.9999, per_images: 128}",
    "data.reader_threads=0",
)
STAGES = (0, 1, 2, 3)
HASTY = (
    "{zero_optimization: {param_persistence_threshold: 0, max_reuse_distance: 0, prefetch_bucket_size: 1000}}"
)
"""At ZeRO 3: no parameter is too small to be partitioned, and all are let go as soon as they were used."""
LAST = 12
"""Steps of a training, with a checkpoint after every second one."""
WHOLE = (f"train.images={LAST * BATCH}", f"checkpoint.every_images={2 * BATCH}", "model.dropout=0.1")
Case = dict[str, Any]


def case(name: str, *overrides: str, **more: Any) -> Case:
    return {"name": name, "overrides": list(overrides), **more}


def start(folder: Path, shards: str, world: int, cases: Sequence[Case]) -> list[subprocess.Popen[str]]:
    """Start so many ranks that train cases one after the other; their runs are below `folder`."""
    content = [
        {
            **each,
            "overrides": [
                *SETTINGS,
                f"run={folder / each['name']}",
                f"data.url={shards}",
                *each["overrides"],
            ],
        }
        for each in cases
    ]
    listed = folder / f"cases-{world}.json"
    listed.write_text(json.dumps(content))
    common = dict(os.environ)
    if not torch.cuda.is_available():
        extensions.prepare()
        common |= {**extensions.environment(), "DS_ACCELERATOR": "cpu"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    common["WORLD_SIZE"] = str(world)
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.trainer.layout_program", str(listed), str(folder / f"out-{world}")],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]


def train(folder: Path, shards: str, world: int, cases: Sequence[Case]) -> dict[str, dict[str, Any]]:
    """Train cases to their ends; return what rank 0 found, by name."""
    files = [folder / f"out-{world}.{rank}" for rank in range(world)]
    for file in files:
        file.unlink(missing_ok=True)
    processes = start(folder, shards, world, cases)
    try:
        logs = [process.communicate(timeout=250)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(file.exists() for file in files), "\n".join(log[-4000:] for log in logs)
    found: dict[str, dict[str, Any]] = json.loads(files[0].read_text())
    return found


def weights(run: Run, role: str = "weights", steps: int = STEPS) -> dict[str, Tensor]:
    """The tensors of a role, by file and parameter, of the live checkpoint after so many steps."""
    (name,) = (name for name in run.live_checkpoints() if name.startswith(f"{steps * BATCH:010d}-"))
    manifest = run.manifest(name)
    return {
        f"{entry.path}/{key}": value
        for entry in manifest.files
        if entry.role == role
        for key, value in read_part(run, manifest, entry).items()
    }


def relative_l2(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """L2 distance of all numbers over the norm of the second."""
    assert one.keys() == other.keys()
    assert one
    square = sum(float((one[key].double() - other[key].double()).square().sum()) for key in other)
    return (square / sum(float(value.double().square().sum()) for value in other.values())) ** 0.5


def assert_same_trajectory(
    one: Run, other: Run, steps: int = STEPS, distance: float = 1e-5, loss: float = 1e-4
) -> None:
    for role in ("weights", "ema"):
        assert relative_l2(weights(one, role, steps), weights(other, role, steps)) <= distance
    rows = [[row["loss"] for row in metric_rows(run)][:steps] for run in (one, other)]
    assert len(rows[0]) == len(rows[1]) == steps
    assert max(abs(a / b - 1) for a, b in zip(*rows, strict=True)) <= loss


def loss_scale(power: int) -> str:
    """Override of a recipe in fp16 whose loss scale begins at 2^power and falls with each overflow."""
    return f"deepspeed.config={{fp16: {{initial_scale_power: {power}, hysteresis: 1}}}}"


def assert_overflows_are_passed_over(run: Run) -> None:
    """A run of 2 FEW updates with `loss_scale(24)` has skipped some, which is recorded and no harm."""
    manifest = run.manifest(run.live_checkpoints()[-1])
    assert manifest.skips, "a loss scale of 2^24 must overflow"
    assert manifest.attempt == 1, "and may: that is no harm"
    assert manifest.position - manifest.images == sum(stop - start for start, stop in manifest.skips)
    assert manifest.loss_scale is not None
    assert manifest.loss_scale["cur_scale"] < 2**24
    assert all(value.dtype == torch.float32 for value in weights(run, steps=2 * FEW).values())


def ids(run: Run) -> dict[int, list[int]]:
    """The samples of each update of the run's lineage, by the images before it, over all ranks."""
    found: dict[int, dict[int, list[int]]] = {}
    for file in sorted(Path(run.url).parent.glob(f"{Path(run.url).name}.ids-*")):
        for line in file.read_text().splitlines():
            row = json.loads(line)
            found.setdefault(row["images"], {}).setdefault(row["attempt"], []).extend(row["ids"])
    limits = run.lineage()
    live = {images: max(a for a in by if _is_live(images, limits.get(a, -1))) for images, by in found.items()}
    return {images: sorted(found[images][attempt]) for images, attempt in live.items()}


def _is_live(images: int, limit: int | None) -> bool:
    return limit is None or images < limit


def losses(run: Run) -> dict[int, float]:
    """The loss of each update of the run's lineage, by the images after it."""
    found = {}
    for attempt, limit in sorted(run.lineage().items()):
        rows = {row["images"]: row["loss"] for row in metric_rows(run, [attempt])}
        found |= {images: loss for images, loss in rows.items() if limit is None or images <= limit}
    return found
