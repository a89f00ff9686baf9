"""Results in the run directory: published once each, never rewritten, found by listing.

The folder `RUN/eval/<spec>-<hash12>/` holds `protocol.json` (what the numbers mean), `held-out.json` (the
same metrics of real pictures), `reference.safetensors` (statistics of the reference pictures), for each
checkpoint `<checkpoint>.json` (its result) and `<checkpoint>-samples.png` (its first pictures), and
`best.json` (the lowest distance so far; a report, overwritten).
"""

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import ClassVar, Final

from pydantic import BaseModel, ConfigDict, Field

from data_pipeline.documents import Document
from data_pipeline.errors import UserError
from data_pipeline.storage import Storage
from eval.metrics.rate_distortion import Number
from eval.protocol import PictureSet, Protocol
from trainer.manifest import is_checkpoint_name
from trainer.run import Run


class Metric(BaseModel):
    """One number.

    Attributes:
        value: The number; NaN, in JSON null, if the checkpoint's output is not finite.
        sd: Standard deviation over the parts it is the mean of, if it is one.
        splits: Number of these parts.
        standard_error: Of the value.
        low: Lower end of its 95 % interval.
        high: Upper end.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    value: Number
    sd: Number | None = None
    splits: int | None = None
    standard_error: Number | None = None
    low: Number | None = None
    high: Number | None = None


class HeldOut(Document):
    """`held-out.json`: the metrics of real pictures the model never saw, the mark to reach.

    Attributes:
        protocol_sha256: Hash of the protocol.
        pictures: Which pictures.
        samples: How many were used.
        requested: How many the protocol asks for; more than `samples` if the split is smaller.
        metrics: By name, as in `Result`.
        warnings: What a reader of the numbers must know.
        seconds: Wall time.
    """

    SCHEMA: ClassVar[str] = "held-out/1"

    protocol_sha256: str
    pictures: PictureSet
    samples: int
    requested: int
    metrics: dict[str, Metric]
    warnings: list[str]
    seconds: float


class Environment(BaseModel):
    """What computed a result; equal numbers are promised for an equal environment only."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    torch: str
    device: str
    processes: int
    threads: int


class Result(Document):
    """`<checkpoint>.json`: the metrics of one checkpoint under one protocol.

    Attributes:
        checkpoint: Its name.
        images: Training images it has seen.
        attempt: The attempt that wrote it.
        manifest_sha256: Hash of its manifest: the checkpoint's identity.
        protocol: Folder name `<spec>-<hash12>`.
        protocol_sha256: Full hash of the protocol.
        samples: N, pictures generated.
        metrics: By name: `FD-<network>` and `CS-<network>`, or `FID` and `IS`.
        held_out: The same metrics of real held-out pictures (a copy of `held-out.json`'s).
        held_out_samples: How many these were.
        warnings: What a reader of the numbers must know.
        seconds: Wall time of the evaluation.
        seconds_sampling: Of these, drawing pictures (in the main process).
        seconds_features: Of these, resize and feature network (in the main process).
        storage_retries: Storage operations repeated during the evaluation.
        grid: File name of the sample grid.
        environment: What computed it.
        time: When (UTC), for people.
    """

    SCHEMA: ClassVar[str] = "result/1"

    checkpoint: str
    images: int
    attempt: int
    manifest_sha256: str
    protocol: str
    protocol_sha256: str
    samples: int
    metrics: dict[str, Metric]
    held_out: dict[str, Metric]
    held_out_samples: int
    warnings: list[str]
    seconds: float
    seconds_sampling: float
    seconds_features: float
    storage_retries: int
    grid: str
    environment: Environment
    time: datetime = Field(default_factory=lambda: datetime.now(UTC))


class Best(Document):
    """`best.json`: the live checkpoint of the lowest distance. A minimum over many is biased low.

    Attributes:
        metric: Name of the distance.
        value: Its value.
        checkpoint: Name of the checkpoint.
        images: Training images it has seen.
        results: Among how many results.
        grid: File name of its sample grid.
    """

    SCHEMA: ClassVar[str] = "best/1"

    metric: str
    value: float
    checkpoint: str
    images: int
    results: int
    grid: str


PROTOCOL_FILE: Final = "protocol.json"
HELD_OUT_FILE: Final = "held-out.json"
BEST_FILE: Final = "best.json"


class ResultBook:
    """The results of one protocol in one run.

    Args:
        run: The run.
        protocol: What the numbers mean.
        directory: Folder under `RUN/eval/` if it is known; it bears the hash the protocol had when written.
    """

    def __init__(self, run: Run, protocol: Protocol, directory: str | None = None) -> None:
        self.run, self.protocol = run, protocol
        self.directory = directory or protocol.directory
        self.storage: Storage = run.storage.child("eval", self.directory)

    @property
    def url(self) -> str:
        """Folder of these results."""
        return self.storage.url

    def open(self) -> None:
        """Publish the protocol, so that the folder explains itself.

        Raises:
            UserError: The file that is there is another protocol's, or damaged.
        """
        if self.storage.create(PROTOCOL_FILE, self.protocol.to_json()):
            return
        where = f"{self.url}/{PROTOCOL_FILE}"
        found = Protocol.from_json(self.storage.read(PROTOCOL_FILE), where)
        if found.sha256 != self.protocol.sha256:  # not the bytes: an older file lacks what is None since
            raise UserError(f"{where}: is not its folder's protocol; it was changed, move the folder away")

    def checkpoints(self) -> list[str]:
        """Names of the checkpoints with a result, by images."""
        names = (name.removesuffix(".json") for name in self.storage.list() if name.endswith(".json"))
        return [name for name in names if is_checkpoint_name(name)]

    def result(self, checkpoint: str) -> Result:
        """Read one result.

        Raises:
            FileNotFoundError: There is none.
        """
        path = f"{checkpoint}.json"
        return Result.from_json(self.storage.read(path), f"{self.url}/{path}")

    def results(self) -> list[Result]:
        """All results, by images."""
        return [self.result(name) for name in self.checkpoints()]

    def publish(self, result: Result, files: Mapping[str, bytes]) -> Result:
        """Publish a result, its files first; what another worker published earlier stands.

        Args:
            result: The numbers.
            files: Content by name, the sample grid among them.

        Returns:
            The published result.
        """
        for name, content in files.items():
            self.storage.create(name, content)
        if self.storage.create(f"{result.checkpoint}.json", result.to_json()):
            return result
        return self.result(result.checkpoint)

    def held_out(self) -> HeldOut | None:
        """Read the row of real held-out pictures, if it has been computed."""
        try:
            return HeldOut.from_json(self.storage.read(HELD_OUT_FILE), f"{self.url}/{HELD_OUT_FILE}")
        except FileNotFoundError:
            return None

    def best(self) -> Best | None:
        """Find the live checkpoint of the lowest distance among the results; None without results.

        Of equal values the earlier checkpoint is taken.
        """
        metric = self.protocol.features.distance_name
        finite = (result for result in self.results() if math.isfinite(result.metrics[metric].value))
        results = sorted(finite, key=lambda result: result.metrics[metric].value)
        found = next((result for result in results if self.run.is_live(result.checkpoint)), None)
        if found is None:
            return None
        return Best(
            metric=metric,
            value=found.metrics[metric].value,
            checkpoint=found.checkpoint,
            images=found.images,
            results=len(results),
            grid=found.grid,
        )

    def update_best(self) -> None:
        """Write `best.json` anew from all results."""
        best = self.best()
        if best is not None:
            self.storage.write(BEST_FILE, best.to_json())

    def pending(self) -> list[str]:
        """Names of the live checkpoints without a result, oldest first."""
        done = set(self.checkpoints())
        return [name for name in self.run.live_checkpoints() if name not in done]


def books(run: Run) -> list[ResultBook]:
    """Results of every protocol this run has been evaluated under, by name."""
    folder = run.storage.child("eval")
    found = []
    for directory in folder.list():
        path = f"{directory}/{PROTOCOL_FILE}"
        if folder.exists(path):
            protocol = Protocol.from_json(folder.read(path), f"{folder.url}/{path}")
            found.append(ResultBook(run, protocol, directory))
    return found
