"""Every logger for real: what it was told is read back, and its failures stop nothing."""

import contextlib
import logging
import math
import shutil
import socket
import struct
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import mlflow
import psutil
import pytest
import wandb
from prometheus_client.parser import text_string_to_metric_families
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from data_pipeline.errors import UserError
from tests.support import tiny_recipe
from trainer import loggers
from trainer.loggers import BackgroundLogger, PrometheusLogger, TensorBoardLogger, check_loggers, open_loggers
from trainer.manifest import Attempt
from trainer.metric_names import METRICS
from trainer.recipe import load_recipe
from trainer.run import Run

ROWS = ((10, {"loss": 0.5, "ema_norm_a.b": 2.0, "grad_norm": math.nan}), (20, {"loss": 0.25}))


def start(run: Run, *settings: str) -> tuple[list[loggers.Logger], Attempt]:
    """The loggers of a new attempt."""
    recipe = tiny_recipe([f"run={run.url}", "logging.tensorboard=false", *settings])
    attempt = run.claim_attempt(None, "test-host", recipe, "0" * 64)
    check_loggers(recipe.logging)
    return open_loggers(recipe.logging, run, attempt), attempt


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(str(tmp_path / "runs" / "first"))


@pytest.fixture
def wandb_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """W&B as after a reboot, writing to this folder; its service is stopped in the end."""
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    wandb.teardown()
    yield tmp_path / "wandb"
    with contextlib.suppress(ConnectionError):  # a test has killed it
        wandb.teardown()


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port on which nobody answers, kept from others."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


def test_tensorboard_events_come_with_the_checkpoints(run: Run) -> None:
    (logger,), attempt = start(run, "logging.tensorboard=true")
    assert isinstance(logger, TensorBoardLogger)
    logger.cut()()
    assert run.storage.list("tensorboard") == [], "nothing was logged yet"
    for images, values in ROWS:
        logger.log(images, values)
        logger.cut()()
    logger.log(30, {"loss": 7.0})
    logger.close()
    folder = f"tensorboard/{attempt.attempt:06d}"
    assert len(run.storage.list(folder)) == 2
    events = EventAccumulator(f"{run.url}/{folder}")
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(10, 0.5), (20, 0.25)]
    assert [(event.step, event.value) for event in events.Scalars("ema_norm_a.b")] == [(10, 2.0)]


def test_tensorboard_that_cannot_write_stops_nothing(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    (logger,), _ = start(run, "logging.tensorboard=true")
    assert isinstance(logger, TensorBoardLogger)
    shutil.rmtree(logger._folder.name)
    Path(logger._folder.name).write_text("in the way")
    for images, values in ROWS:
        logger.log(images, values)
    assert logger.errors == len(ROWS), "the fault must have happened"
    logger.cut()()
    assert caplog.text.count("logging.tensorboard: a row was not delivered") == 1
    Path(logger._folder.name).unlink()
    logger.log(*ROWS[0])
    logger.close()
    assert logger.errors == len(ROWS), "and it goes on when it can"


def test_prometheus_reads_the_newest_row(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "ddpm.prom"
    (logger,), attempt = start(run, f"logging.prometheus={file}")
    logger.log(*ROWS[0])
    families = {family.name: family for family in text_string_to_metric_families(file.read_text())}
    labels = {"run": attempt.run, "name": "first"}
    loss, ema = families["ddpm_train_loss"], families["ddpm_train_ema_norm"]
    assert (loss.type, loss.documentation) == ("gauge", METRICS["loss"])
    assert [(sample.labels, sample.value) for sample in loss.samples] == [(labels, 0.5)]
    assert [(sample.labels, sample.value) for sample in ema.samples] == [({**labels, "ema": "a.b"}, 2.0)]
    assert families["ddpm_train_images"].samples[0].value == 10.0
    assert math.isnan(families["ddpm_train_grad_norm"].samples[0].value)
    logger.log(20, {"loss": 0.25, "ema_norm_a-b": 1.0, "ema_norm_a_b": 3.0, "brand_new": 1.0})
    families = {family.name: family for family in text_string_to_metric_families(file.read_text())}
    assert "ddpm_train_grad_norm" not in families, "a metric that is gone must not keep its value"
    assert families["ddpm_train_loss"].samples[0].value == 0.25
    values = {sample.labels["ema"]: sample.value for sample in families["ddpm_train_ema_norm"].samples}
    assert values == {"a-b": 1.0, "a_b": 3.0}
    assert families["ddpm_train_brand_new"].documentation == "brand new."
    logger.close()
    assert [entry.name for entry in tmp_path.iterdir() if entry.is_file()] == ["ddpm.prom"], "no scratch file"


def test_prometheus_file_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "collector"
    logger = PrometheusLogger(folder / "ddpm.prom", "1", "first")
    logger.log(*ROWS[0])
    logger.log(*ROWS[1])
    assert logger.errors == 2
    assert [record.getMessage().count("logging.prometheus") for record in caplog.records] == [1]
    folder.mkdir()
    logger.log(*ROWS[1])
    assert logger.errors == 2


def wandb_records(file: Path) -> list[Record]:
    """The records of a .wandb file: LevelDB's log format after a header of seven bytes."""
    data, place, found, pending = file.read_bytes(), 7, [], b""
    while place < len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        pending += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            found.append(Record.FromString(pending))
            pending = b""
    return found


def test_wandb_goes_on_with_its_run(run: Run, wandb_folder: Path) -> None:
    settings = ("logging.wandb.project=pictures", "logging.wandb.mode=offline")
    for images, values in ((10, ROWS[0][1]), (5, {"loss": 0.125})):
        (logger,), attempt = start(run, *settings)
        logger.log(images, values)
        logger.log(images - 1, {"loss": 1.0})  # images may fall
        logger.cut()()
        logger.close()
        assert logger.errors == 0
    wandb.teardown()  # its service may still be writing
    records = [wandb_records(file) for file in sorted(wandb_folder.glob("offline-run-*/*.wandb"))]
    assert len(records) == 2
    for part in records:
        (started,) = (record.run for record in part if record.HasField("run"))
        assert (started.run_id, started.project, started.display_name) == (attempt.run, "pictures", "first")
        config = {item.key: item.value_json for item in started.config.update}
        assert config["run"] == f'"{run.url}"'
        assert '"base_channels":8' in config["model"].replace(" ", "")
        axes = [record.metric for record in part if record.HasField("metric")]
        assert [axis.step_metric for axis in axes if axis.glob_name == "*"] == ["images"]
        assert any(record.HasField("exit") for record in part), "the run was ended"
    rows = [
        {(item.key or item.nested_key[0]): item.value_json for item in record.history.item}
        for part in records
        for record in part
        if record.HasField("history")
    ]
    assert [(row["images"], row["loss"]) for row in rows] == [
        ("10", "0.5"),
        ("9", "1"),
        ("5", "0.125"),
        ("4", "1"),
    ]
    assert rows[0]["ema_norm_a.b"] == "2"
    assert "grad_norm" not in rows[0], "what is not finite is left out"


def test_wandb_that_dies_stops_nothing(
    run: Run, wandb_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (logger,), _ = start(run, "logging.wandb.project=p", "logging.wandb.mode=offline")
    logger.log(*ROWS[0])
    victims = wait_for_service()
    for victim in victims:
        victim.kill()
    psutil.wait_procs(victims)
    for _ in range(5):
        logger.log(*ROWS[1])
    logger.close()
    assert logger.errors > 0
    assert caplog.text.count("logging.wandb: a row was not delivered") == 1


def wait_for_service() -> list[psutil.Process]:
    """W&B's process, as soon as it is there."""
    while True:
        found = [child for child in psutil.Process().children(recursive=True) if "wandb" in child.name()]
        if found:
            return found


def test_wandb_that_does_not_answer_stops_nothing(
    run: Run,
    wandb_folder: Path,
    closed_port: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(loggers, "_CLOSE_SECONDS", 2.0)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{closed_port}")
    (logger,), _ = start(run, "logging.wandb.project=p")
    assert isinstance(logger, BackgroundLogger)
    logger.log(*ROWS[0])
    logger.close()
    logger._thread.join()
    assert logger.errors == 1
    assert "connection refused" in caplog.text


@pytest.mark.parametrize(("key", "message"), [("", "no API key"), ("short", "40")])
def test_wandb_without_a_key(
    wandb_folder: Path, monkeypatch: pytest.MonkeyPatch, key: str, message: str
) -> None:
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    with pytest.raises(UserError, match=message) as caught:
        check_loggers(tiny_recipe(["logging.wandb.project=p"]).logging)
    assert "logging.wandb.mode=offline" in str(caught.value)
    assert "\n" not in str(caught.value)
    check_loggers(tiny_recipe(["logging.wandb.project=p", "logging.wandb.mode=offline"]).logging)


def test_wandb_offline_by_its_own_variable(wandb_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_loggers(tiny_recipe(["logging.wandb.project=p"]).logging)


def test_mlflow_goes_on_with_its_run(run: Run, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    settings = ("logging.mlflow.experiment=pictures", f"logging.mlflow.tracking_uri={uri}")
    other = Run(str(tmp_path / "runs" / "second"))
    rows = (run, 10, ROWS[0][1]), (run, 5, {"loss": 0.125}), (other, 10, {"loss": 9.0})
    for place, images, values in rows:
        (logger,), _ = start(place, *settings)
        logger.log(images, values)
        logger.cut()()
        logger.close()
        assert logger.errors == 0
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("pictures")
    assert experiment is not None
    found = {item.info.run_name: item for item in client.search_runs([experiment.experiment_id])}
    assert sorted(found) == ["first", "second"]
    first = found["first"]
    history = client.get_metric_history(first.info.run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(10, 0.5), (5, 0.125)]
    assert first.data.metrics == {"loss": 0.5, "ema_norm_a.b": 2.0}
    assert first.info.status == "FINISHED"
    assert first.data.tags["ddpm.run"] == run.attempts()[0].run
    assert first.data.params["optimizer.learning_rate"] == str(tiny_recipe().optimizer.learning_rate)
    assert len(first.data.params) > 60


def test_mlflow_that_does_not_answer_stops_nothing(
    run: Run, closed_port: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    uri = f"http://127.0.0.1:{closed_port}"
    (logger,), _ = start(run, "logging.mlflow.experiment=e", f"logging.mlflow.tracking_uri={uri}")
    for row in ROWS:
        logger.log(*row)
    logger.close()
    assert logger.errors == 2
    assert caplog.text.count("logging.mlflow: a row was not delivered") == 1


@pytest.mark.parametrize("uri", ["nonsense://host", "{tmp_path}/mlruns"])
def test_mlflow_at_an_impossible_place(tmp_path: Path, uri: str) -> None:
    uri = uri.format(tmp_path=tmp_path)
    with pytest.raises(UserError, match=r"logging\.mlflow: ") as caught:
        check_loggers(
            tiny_recipe(["logging.mlflow.experiment=e", f"logging.mlflow.tracking_uri={uri}"]).logging
        )
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # Python's own way to say that it cannot be imported
    recipe = tiny_recipe(["logging.wandb.project=p"] if name == "wandb" else ["logging.mlflow.experiment=e"])
    with pytest.raises(UserError) as caught:
        check_loggers(recipe.logging)
    assert str(caught.value) == f"logging.{name}: the package is missing; pip install 'ddpm-foundry[{name}]'"


def test_a_folder_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B writes to ./wandb, which Python takes for a package where none is installed."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(UserError, match=r"pip install 'ddpm-foundry\[wandb\]'"):
        check_loggers(tiny_recipe(["logging.wandb.project=p"]).logging)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("logging.prometheus=/tmp/metrics.txt", r"\*\.prom"),
        ("logging.mlflow={experiment: e, tracking_uri: 'https://me:secret@host'}", "holds a password"),
        ("logging.wandb={}", r"logging\.wandb\.project"),
        ("logging.wandb={project: p, mode: sometimes}", r"logging\.wandb\.mode"),
    ],
)
def test_mistakes_in_the_recipe(setting: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_recipe("quickstart", [setting])
    assert "secret" not in str(caught.value)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    place = tmp_path / "absent" / "ddpm.prom"
    with pytest.raises(UserError, match=f"logging.prometheus={place}: "):
        check_loggers(tiny_recipe([f"logging.prometheus={place}"]).logging)


class Hanging:
    """A service that does not answer until it may."""

    def __init__(self) -> None:
        self.asked, self.may = threading.Event(), threading.Event()
        self.rows: list[int] = []

    def send(self, images: int, values: Mapping[str, float], when: float) -> None:
        self.asked.set()
        self.may.wait()
        self.rows.append(images)

    def end(self) -> None:
        self.rows.append(-1)


def test_nobody_waits_for_a_service_that_hangs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loggers, "_WAITING_ROWS", 2)
    monkeypatch.setattr(loggers, "_CLOSE_SECONDS", 0.01)
    service = Hanging()
    logger = BackgroundLogger("logging.test", lambda: service, (ConnectionError,))
    logger.log(1, {})
    service.asked.wait()
    for images in (2, 3, 4, 5):
        logger.log(images, {})
    assert logger.errors == 2, "one under way, two waiting"
    logger.close()
    assert "logging.test: the last rows were not delivered" in caplog.text
    service.may.set()
    logger._rows.put(None)
    logger._thread.join()
    assert service.rows == [1, 2, 3, -1]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_error_nobody_knows_is_counted_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    def connect() -> Hanging:
        raise ArithmeticError("a bug")

    logger = BackgroundLogger("logging.test", connect, (ConnectionError,))
    logger.log(1, {})
    logger._thread.join()
    with caplog.at_level(logging.WARNING):
        logger.log(2, {})
        logger.log(3, {})
    assert logger.errors == 2
    assert caplog.text.count("its thread has failed") == 1
    logger.close()
