"""Segments of metrics, whom else the rows go to, and that the documentation names every metric."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.support import metric_rows
from trainer.metric_names import METRICS, parse_metric_name
from trainer.run import Run
from trainer.telemetry import MetricsLog


class Listener:
    """Remembers what it is told, and cannot deliver every second row."""

    def __init__(self) -> None:
        self.errors = 0
        self.heard: list[object] = []

    def log(self, images: int, values: Mapping[str, float]) -> None:
        self.heard.append((images, dict(values)))
        self.errors += len(self.heard) % 2

    def cut(self) -> Callable[[], None]:
        return lambda: self.heard.append("published")

    def close(self) -> None:
        self.heard.append("closed")


def test_rows_become_segments_with_the_checkpoints(tmp_path: Path) -> None:
    run = Run(str(tmp_path / "run"))
    log = MetricsLog(run, 3, images=100)
    log.cut(100)
    log.flush()
    assert run.storage.list("metrics") == [], "no rows, no segment"
    log.log(110, {"loss": 0.5, "grad_norm": math.nan})
    log.log(120, {"loss": 0.25, "grad_norm": math.inf})
    log.cut(120)
    log.flush()
    log.log(130, {"loss": 0.125})
    log.cut(140)
    log.flush()
    log.log(150, {"loss": 9.0})
    log.close()
    assert run.storage.list("metrics/000003") == ["0000000100.jsonl", "0000000120.jsonl"]
    rows = metric_rows(run, [3])
    assert [(row["images"], row["loss"]) for row in rows] == [(110, 0.5), (120, 0.25), (130, 0.125)]
    assert all(row["schema"] == "metrics/1" for row in rows)
    assert [row["grad_norm"] for row in rows[:2]] == [None, None], "JSON knows neither NaN nor infinity"
    text = run.storage.read("metrics/000003/0000000100.jsonl").decode()
    assert [json.loads(line)["images"] for line in text.splitlines()] == [110, 120]
    assert text.endswith("}\n")


def test_segments_are_never_replaced(tmp_path: Path) -> None:
    run = Run(str(tmp_path / "run"))
    for loss in (1.0, 2.0):
        log = MetricsLog(run, 1, images=0)
        log.log(10, {"loss": loss})
        log.cut(10)
        log.flush()
    assert [row["loss"] for row in metric_rows(run)] == [1.0]


def test_loggers_hear_of_everything_and_their_errors_are_a_metric(tmp_path: Path) -> None:
    run, listener, other = Run(str(tmp_path / "run")), Listener(), Listener()
    log = MetricsLog(run, 1, 0, [listener, other])
    log.log(10, {"loss": 0.5})
    log.log(20, {"loss": math.inf})
    log.cut(20)
    log.flush()
    log.cut(30)
    log.flush()
    log.log(40, {"loss": 0.5})
    log.close()
    assert listener.heard == other.heard
    assert listener.heard == [
        (10, {"loss": 0.5, "logger_errors": 0.0}),
        (20, {"loss": math.inf, "logger_errors": 2.0}),
        "published",
        (40, {"loss": 0.5, "logger_errors": 2.0}),
        "closed",
    ]
    assert [row["logger_errors"] for row in metric_rows(run)] == [0.0, 2.0]


def test_names_are_taken_apart() -> None:
    assert parse_metric_name("ema_distance_half-life.1") == (
        "ema_distance",
        {"ema": "half-life.1"},
        METRICS["ema_distance"],
    )
    assert parse_metric_name("loss_q3") == ("loss_q3", {}, METRICS["loss_q3"])
    assert parse_metric_name("ema_norm_") == ("ema_norm_", {}, "ema norm .")


def test_every_metric_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "telemetry.md").read_text()
    assert [name for name in METRICS if f"`{name}`" not in text and f"`{name}_PROFILE`" not in text] == []
