"""Where metrics go beside the run directory's own segments: TensorBoard, W&B, MLflow, a Prometheus text file.

None of them can stop training or make it wait: tracking services are fed by a thread of their own, and a row
that cannot be delivered is counted and forgotten; the segments in the run directory hold it all the same.
"""

import importlib
import logging
import math
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Protocol

from data_pipeline.errors import UserError
from trainer.manifest import Attempt
from trainer.metric_names import parse_metric_name
from trainer.recipe_sections import LoggingSection, MlflowSection, WandbSection
from trainer.run import Run

log = logging.getLogger(__name__)

_WAITING_ROWS: Final = 1000
"""Rows kept while a service does not answer; more are dropped."""
_CLOSE_SECONDS: Final = 30.0
"""How long the end of training waits for a service to take the last rows."""
_MLFLOW_MOST: Final = 100
"""Parameters per request to MLflow's server."""
_DATABASES: Final = ("sqlite", "postgresql", "mysql", "mssql")
"""What MLflow keeps runs in without a server."""


class Logger(Protocol):
    """Takes the rows of one attempt, on rank 0."""

    errors: int
    """Rows that were not delivered."""

    def log(self, images: int, values: Mapping[str, float]) -> None:
        """Take one row of metrics at this point of the image clock; some may not be finite."""

    def cut(self) -> Callable[[], None]:
        """Close what was logged so far; return what makes it lasting.

        That is called before the checkpoint of this moment is published, from another thread and until it
        succeeds, while further rows may come.
        """

    def close(self) -> None:
        """Training ends."""


def nothing() -> None:
    """What is left to do for a logger whose rows are lasting already."""


def check_loggers(section: LoggingSection) -> None:
    """Check that what the recipe asks for can be used on this machine.

    Raises:
        UserError: A package, a key or a folder is missing.
    """
    if section.wandb is not None:
        _check_wandb_key(section.wandb)
    if section.mlflow is not None:
        _check_mlflow_uri(section.mlflow)
    if section.prometheus and not Path(section.prometheus).parent.is_dir():
        raise UserError(
            f"logging.prometheus={section.prometheus}: there is no such folder; create it or choose another"
        )


def open_loggers(section: LoggingSection, run: Run, attempt: Attempt) -> list[Logger]:
    """Make the loggers that a recipe asks for; `check_loggers` has passed."""
    loggers: list[Logger] = []
    if section.tensorboard:
        loggers.append(TensorBoardLogger(run, attempt.attempt))
    if section.wandb is not None:
        loggers.append(_wandb_logger(section.wandb, run, attempt))
    if section.mlflow is not None:
        loggers.append(_mlflow_logger(section.mlflow, run, attempt))
    if section.prometheus:
        loggers.append(PrometheusLogger(Path(section.prometheus), attempt.run, _short_name(run)))
    return loggers


class TensorBoardLogger:
    """Event files, uploaded to `RUN/tensorboard/<attempt>` with each checkpoint."""

    def __init__(self, run: Run, attempt: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._make_writer = SummaryWriter
        self._run, self._attempt = run, attempt
        self._folder = tempfile.TemporaryDirectory(prefix="ddpm-events-")
        self._events: SummaryWriter | None = None
        self._cut: set[Path] = set()
        self.errors = 0

    def log(self, images: int, values: Mapping[str, float]) -> None:
        """See `Logger`."""
        try:
            if self._events is None:
                self._events = self._make_writer(self._folder.name)
            for name, value in values.items():
                self._events.add_scalar(name, value, global_step=images)
        except OSError as error:  # what its thread met when it wrote, a full disk say
            _count(self, "logging.tensorboard", error)

    def cut(self) -> Callable[[], None]:
        """See `Logger`."""
        if self._events is None:
            return nothing
        self._close_events()
        files = [file for file in sorted(Path(self._folder.name).iterdir()) if file not in self._cut]
        self._cut.update(files)

        def upload() -> None:
            while files:
                self._run.storage.upload(f"tensorboard/{self._attempt:06d}/{files[0].name}", files[0])
                files.pop(0).unlink()

        return upload

    def close(self) -> None:
        """Drop what was not published, with the steps it describes."""
        self._close_events()
        self._folder.cleanup()

    def _close_events(self) -> None:
        events, self._events = self._events, None
        if events is None:
            return
        try:
            events.close()
        except OSError as error:
            _count(self, "logging.tensorboard", error)


class PrometheusLogger:
    """The newest row as a text file for node_exporter's textfile collector, replaced atomically.

    Args:
        file: Where to write it.
        run: The run's identity.
        name: What people call it.
    """

    def __init__(self, file: Path, run: str, name: str) -> None:
        self._file, self._labels = file, {"run": run, "name": name}
        self.errors = 0

    def log(self, images: int, values: Mapping[str, float]) -> None:
        """See `Logger`."""
        import prometheus_client

        # A new registry each time, so that a metric this row lacks does not keep its old value.
        registry = prometheus_client.CollectorRegistry()
        gauges: dict[str, prometheus_client.Gauge] = {}
        for name, value in {"images": float(images), **values}.items():
            base, labels, description = parse_metric_name(name)
            labels = {**self._labels, **labels}
            if base not in gauges:
                gauges[base] = prometheus_client.Gauge(
                    f"ddpm_train_{base}", description, list(labels), registry=registry
                )
            gauges[base].labels(**labels).set(value)
        try:
            prometheus_client.write_to_textfile(str(self._file), registry)
        except OSError as error:
            _count(self, "logging.prometheus", error)

    def cut(self) -> Callable[[], None]:
        """See `Logger`; the file is whole after every row."""
        return nothing

    def close(self) -> None:
        """See `Logger`; the last row stays."""


class Service(Protocol):
    """A connection to a tracking service, used by one thread."""

    def send(self, images: int, values: Mapping[str, float], when: float) -> None:
        """Deliver one row of finite metrics that was logged at `when`, Unix seconds."""

    def end(self) -> None:
        """Tell the service that training has ended."""


class BackgroundLogger:
    """Feeds a tracking service from a thread of its own, so that training never waits for the network.

    Args:
        key: Of the recipe, for messages.
        connect: Opens the connection; tried again at each row until it succeeds.
        failures: How the service's library tells of its errors.
    """

    def __init__(
        self, key: str, connect: Callable[[], Service], failures: tuple[type[Exception], ...]
    ) -> None:
        self._key, self._connect, self._failures = key, connect, failures
        self._rows: queue.Queue[tuple[int, dict[str, float], float] | None] = queue.Queue(_WAITING_ROWS)
        self._service: Service | None = None
        self.errors = 0
        # A daemon: a service that hangs must not keep a finished run from ending.
        self._thread = threading.Thread(target=self._feed, name=key, daemon=True)
        self._thread.start()

    def log(self, images: int, values: Mapping[str, float]) -> None:
        """See `Logger`."""
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        if not self._thread.is_alive():
            _count(self, self._key, "its thread has failed")
            return
        try:
            self._rows.put_nowait((images, finite, time.time()))
        except queue.Full:
            _count(self, self._key, "it takes no more rows")

    def cut(self) -> Callable[[], None]:
        """See `Logger`; the service keeps what it was sent."""
        return nothing

    def close(self) -> None:
        """Wait for the last rows to be delivered, but not for long."""
        try:
            self._rows.put(None, timeout=_CLOSE_SECONDS)
        except queue.Full:
            pass
        else:
            self._thread.join(_CLOSE_SECONDS)
        if self._thread.is_alive():
            log.warning("%s: the last rows were not delivered within %.0f s", self._key, _CLOSE_SECONDS)

    def _feed(self) -> None:
        for images, values, when in iter(self._rows.get, None):
            try:
                if self._service is None:
                    self._service = self._connect()
                self._service.send(images, values, when)
            except self._failures as error:
                _count(self, self._key, error)
        if self._service is not None:
            try:
                self._service.end()
            except self._failures as error:
                log.warning("%s: could not be ended: %s", self._key, _one_line(error))


class _Wandb:
    """One W&B run per run directory: a new attempt goes on with it."""

    def __init__(self, wandb: Any, section: WandbSection, run: Run, attempt: Attempt) -> None:
        self._run = wandb.init(
            project=section.project,
            entity=section.entity,
            mode=section.mode,
            id=attempt.run,
            name=_short_name(run),
            resume="allow",
            config=attempt.recipe,
            allow_val_change=True,
            settings=wandb.Settings(
                console="off", silent=True, init_timeout=_CLOSE_SECONDS, finish_timeout=_CLOSE_SECONDS
            ),
        )
        # Their own step must never fall; images do after a rollback. So images are the axis, as a metric.
        self._run.define_metric("images")
        self._run.define_metric("*", step_metric="images")
        if self._run.offline:
            log.info("logging.wandb: upload with `wandb sync %s`", self._run.settings.sync_dir)
        else:
            log.info("logging.wandb: %s", self._run.url)

    def send(self, images: int, values: Mapping[str, float], when: float) -> None:
        self._run.log({"images": images, **values})

    def end(self) -> None:
        self._run.finish()


def _wandb_logger(section: WandbSection, run: Run, attempt: Attempt) -> BackgroundLogger:
    wandb = _module("wandb", "init")
    # All but the first: their service process has died.
    mailbox = wandb.sdk.mailbox
    failures = (wandb.Error, OSError, mailbox.MailboxClosedError, mailbox.HandleAbandonedError)
    return BackgroundLogger("logging.wandb", lambda: _Wandb(wandb, section, run, attempt), failures)


def _check_wandb_key(section: WandbSection) -> None:
    wandb = _module("wandb", "init")
    mode = wandb.setup(settings=wandb.Settings(silent=True)).settings.mode
    if (section.mode or mode) != "online" or mode != "online":
        return
    try:
        found = wandb.login(prompt=False, verify=False)
    except wandb.Error as error:
        message = f"logging.wandb: {_one_line(error)}; mend it, or logging.wandb.mode=offline"
        raise UserError(message) from error
    if not found:
        raise UserError(
            "logging.wandb: no API key; set WANDB_API_KEY, run `wandb login`, or logging.wandb.mode=offline"
        )


class _Mlflow:
    """One MLflow run per run directory, found again by its tag."""

    TAG: Final = "ddpm.run"

    def __init__(self, mlflow: Any, section: MlflowSection, run: Run, attempt: Attempt) -> None:
        self._entities = mlflow.entities
        self._client = mlflow.MlflowClient(section.tracking_uri)
        experiment = self._experiment(section.experiment)
        found = self._client.search_runs([experiment], f"tags.`{self.TAG}` = '{attempt.run}'", max_results=1)
        if found:
            self._run: str = found[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
            return
        tags = {self.TAG: attempt.run, "ddpm.url": run.url}
        self._run = self._client.create_run(experiment, tags=tags, run_name=_short_name(run)).info.run_id
        params = [self._entities.Param(key, str(value)) for key, value in _flatten(attempt.recipe)]
        for start in range(0, len(params), _MLFLOW_MOST):
            self._client.log_batch(self._run, params=params[start : start + _MLFLOW_MOST])

    def send(self, images: int, values: Mapping[str, float], when: float) -> None:
        stamp = int(when * 1000)
        metrics = [self._entities.Metric(name, value, stamp, images) for name, value in values.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def end(self) -> None:
        self._client.set_terminated(self._run)

    def _experiment(self, name: str) -> str:
        known = self._client.get_experiment_by_name(name)
        return str(known.experiment_id if known is not None else self._client.create_experiment(name))


def _mlflow_logger(section: MlflowSection, run: Run, attempt: Attempt) -> BackgroundLogger:
    mlflow = _module("mlflow", "MlflowClient")
    failures = (mlflow.exceptions.MlflowException,)
    return BackgroundLogger("logging.mlflow", lambda: _Mlflow(mlflow, section, run, attempt), failures)


def _check_mlflow_uri(section: MlflowSection) -> None:
    mlflow = _module("mlflow", "MlflowClient")
    uri = section.tracking_uri or mlflow.get_tracking_uri()
    if uri.partition(":")[0].partition("+")[0] in _DATABASES:
        return  # a client would make its tables, on every node at once
    try:
        mlflow.MlflowClient(uri)
    except mlflow.exceptions.MlflowException as error:
        raise UserError(f"logging.mlflow: {_one_line(error)}") from error


def _module(name: str, attribute: str) -> Any:
    """Import a logger's package; `attribute` tells it from a mere folder, such as W&B's own `./wandb`."""
    try:
        module = importlib.import_module(name)
    except ImportError:
        module = None
    if not hasattr(module, attribute):
        raise UserError(f"logging.{name}: the package is missing; pip install 'ddpm-foundry[{name}]'")
    return module


def _count(logger: Logger, key: str, problem: object) -> None:
    logger.errors += 1
    if logger.errors == 1:
        log.warning("%s: a row was not delivered (more are only counted): %s", key, _one_line(problem))


def _one_line(problem: object) -> str:
    return " ".join(str(problem).split()) or type(problem).__name__


def _short_name(run: Run) -> str:
    return run.url.rstrip("/").rpartition("/")[2]


def _flatten(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
