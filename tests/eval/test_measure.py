"""Every metric of one stream, from the recipe to the published result."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from data_pipeline.errors import UserError
from eval.plan import make_plan
from eval.results import Result, ResultBook, books
from eval.service import Service, WatchOptions
from eval.team import Team
from launch.cli import app
from tests.eval.helpers import start_run
from tests.support import tiny_recipe

METRICS = "[held-out,bits,neighbours,interval,infinity,manifold,kernel,score,distance]"
NAMES = [
    "FD-{}",
    "FD-{}-val",
    "CS-{}",
    "KID-{}",
    "KID-subsets-{}",
    "precision-{}",
    "recall-{}",
    "density-{}",
    "coverage-{}",
    "FD-{}-infinity",
    "FD-{}-interval",
    "memorised-{}",
    "memorised-expected-{}",
    "memorised-z-{}",
    "bits/dim-train",
    "rate-train",
    "distortion-train",
    "rmse-train",
    "bits/dim-val",
    "rate-val",
    "distortion-val",
    "rmse-val",
]


def test_every_metric_of_one_stream(
    tmp_path: Path, data_url: str, small_network_option: str, team: Team
) -> None:
    overrides = (
        f"evaluation.quick.metrics={METRICS}",
        "evaluation.quick.bits={images: 5, draws: 2}",
        "evaluation.quick.samples=32",
    )
    run = start_run(tmp_path / "run", data_url, images=(64,), overrides=overrides)
    found: list[Result] = []
    options = WatchOptions(features=small_network_option, save_images=tmp_path / "pictures")
    Service(run.url, options, team).once(None, found.append)
    (book,) = books(run)
    label = book.protocol.features.distance_name.partition("-")[2]
    metrics = found[0].metrics
    assert list(metrics) == [name.format(label) for name in NAMES]
    assert all(np.isfinite(metric.value) for metric in metrics.values())
    _check_consistency(metrics, label)
    fewer = set(NAMES[:11]) - {"FD-{}-infinity", "FD-{}-val"}  # 14 held-out pictures
    assert set(found[0].held_out) == {name.format(label) for name in fewer}
    held_out = book.held_out()
    assert held_out is not None
    assert "infinity: left out, needs 30 pictures and has 14" in held_out.warnings
    name = found[0].checkpoint
    curve = json.loads(book.storage.read(f"{name}-bits-train.json"))
    assert (curve["schema"], curve["images"], curve["draws"]) == ("bits/1", 5, 2)
    pictures = sorted((tmp_path / "pictures" / book.directory / name).iterdir())
    assert [path.name for path in pictures] == [f"{number:06d}.png" for number in range(32)]
    grid = np.asarray(Image.open(Path(book.url, f"{name}-samples.png")))
    first = np.asarray(Image.open(pictures[0]))
    np.testing.assert_array_equal(grid[2:50:6, 2:50:6], first)  # enlarged sixfold
    text = CliRunner().invoke(app, ["eval", "status", run.url], catch_exceptions=False).stdout
    assert f"KID-{label}" in text


def _check_consistency(metrics: dict, label: str) -> None:
    distance, interval = metrics[f"FD-{label}"].value, metrics[f"FD-{label}-interval"]
    assert interval.value == pytest.approx(distance, rel=1e-9)
    assert interval.low < distance < interval.high
    for split in ("train", "val"):
        whole = metrics[f"bits/dim-{split}"].value
        parts = metrics[f"rate-{split}"].value + metrics[f"distortion-{split}"].value
        assert whole == pytest.approx(parts, rel=1e-6)
    assert metrics[f"memorised-{label}"].value == 0  # an untrained network copies nothing


def test_metrics_the_network_cannot_give() -> None:
    for metrics, message in (
        ("[score]", "needs `distance`"),
        ("[distance,infinity]", "samples=8: `infinity` needs 30; raise it or leave the metric out"),
        ("[distance,spatial]", "effnetlite0 gives no spatial features; use features: inception-state="),
    ):
        recipe = tiny_recipe([f"evaluation.quick.metrics={metrics}"])
        with pytest.raises(UserError, match=message):
            make_plan(recipe, "quick", "0" * 64)


def test_unnamed_metrics_keep_an_old_protocols_name() -> None:
    plain = make_plan(tiny_recipe(), "quick", "0" * 64).protocol
    named = make_plan(tiny_recipe(["evaluation.quick.metrics=[score,distance]"]), "quick", "0" * 64).protocol
    assert named.directory == plain.directory


def test_on_request_only(tmp_path: Path, data_url: str, small_network_option: str, team: Team) -> None:
    overrides = ("evaluation.quick.automatic=false",)
    run = start_run(tmp_path / "run", data_url, images=(64,), overrides=overrides)
    with pytest.raises(UserError, match="no automatic specification"):
        Service(run.url, WatchOptions(features=small_network_option), team).set_up()
    (task,) = Service(run.url, WatchOptions(("quick",), small_network_option), team).set_up() or []
    assert isinstance(task.book, ResultBook)
