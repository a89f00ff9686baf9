"""The pictures, the S3 server that holds their shards, and the contenders' processes."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import s3fs

from benchmarks.data_build.running import built, scratch_below
from benchmarks.encodings import photographs
from benchmarks.harness import Precision
from benchmarks.process import ANSWER_SECONDS, AnsweringCrew, AnsweringProcess, rank_variables
from benchmarks.trainer.contenders import EXAMPLE
from benchmarks.trainer.job import BATCH, LOG_STEPS, RUN_IN_S3, SMALL, Job, Turn
from data_pipeline.build import BuildOptions
from data_pipeline.index import load_index
from data_pipeline.reader import ShardReader
from data_pipeline.sources.folder import FolderSource
from data_pipeline.split_reader import index_order
from launch.s3server import S3Server

_VAL_FRACTION: Final = 0.05
_SHARD_BYTES: Final = 1 << 19  # several shards, so that some are mixed
_PART: Final = 256  # pictures in memory at a time
_NEVER: Final = 10**9  # images


class Site:
    """A running S3 server with the shards in it, and the same pictures as files.

    Args:
        server: The server.
        place: A folder for everything.
        pictures: How many, both splits together.
        small: For the small network.
        threads: Of torch, of all processes of a contender together.
    """

    def __init__(self, server: S3Server, place: Path, pictures: int, *, small: bool, threads: int) -> None:
        self._server, self._place, self._threads = server, place, threads
        self._model = SMALL if small else ()
        self._shards = f"{server.url}/shards"
        self._folder = place / "pictures"
        self.pictures = self._write(pictures, 16 if small else 32)

    def job(
        self,
        contender: str,
        precision: Precision,
        *,
        ranks: int = 1,
        checkpoint_steps: int | None = None,
        run_in_s3: bool = False,
    ) -> Job:
        """Return what a contender is told.

        Args:
            contender: Who.
            precision: Of the network's arithmetic.
            ranks: Processes that train together.
            checkpoint_steps: Steps from checkpoint to checkpoint; None: there are none.
            run_in_s3: Keep the run directory in the S3 server, too, rather than in a folder.
        """
        out = f"{contender}-{precision}-{ranks}" + ("-s3" if run_in_s3 else "")
        every = _NEVER if checkpoint_steps is None else checkpoint_steps * BATCH
        overrides = (
            *self._model,
            f"batch.total={BATCH}",
            f"data.url={self._shards}",
            f"run={self._server.url if run_in_s3 else self._place}/{out}",
            f"logging.every_images={LOG_STEPS * BATCH}",
            f"checkpoint.every_images={every}",
            "checkpoint.keep=2",  # so that old ones are removed, as in a run that has lasted
            f"train.images={_NEVER}",
        )
        return Job(
            contender=contender,
            precision=precision,
            overrides=overrides,
            pictures=str(self._folder),
            out=str(self._place / out),
            ranks=ranks,
            remark=RUN_IN_S3 if run_in_s3 else "",
        )

    def start(self, job: Job) -> "Crew":
        """The processes for a job, to be entered."""
        env = {
            **self._server.env(),
            "CUDA_VISIBLE_DEVICES": "",  # everyone on the processor
            "OMP_NUM_THREADS": str(max(1, self._threads // job.ranks)),
        }
        return Crew(job, env)

    def _write(self, count: int, size: int) -> int:
        """Build shards of photographs, and write the training split as files, too; return its size."""
        source, local = self._place / "source", self._place / "shards"
        source.mkdir()
        for number, picture in enumerate(photographs(count, size)):
            picture.save(source / f"{number:06d}.png")
        options = BuildOptions(val_fraction=_VAL_FRACTION, shard_bytes=_SHARD_BYTES)
        with scratch_below(self._place):
            index = built(FolderSource(source), local, options, workers=1)
        assert index.rejected == 0
        store = s3fs.S3FileSystem(**_credentials(self._server), skip_instance_cache=True)
        store.put(str(local), self._shards, recursive=True)
        folder = self._folder / "all"  # `ImageFolder` takes folders for classes
        folder.mkdir(parents=True)
        loaded = load_index(str(local))
        reader, written = ShardReader(loaded, "train"), 0
        for shards, members in index_order(loaded, "train", _PART):
            for data in reader.fetch(shards, members):
                (folder / f"{written:06d}.png").write_bytes(data)
                written += 1
        assert written == loaded.index.samples("train")
        return written


class Crew(AnsweringCrew):
    """The processes of one contender, as a context manager.

    Args:
        job: What they train.
        env: Added to this process's environment.
    """

    def __init__(self, job: Job, env: dict[str, str]) -> None:
        self.job = job
        launched = [{}] if job.contender == EXAMPLE else rank_variables(job.ranks)
        processes = [
            AnsweringProcess(
                "benchmarks.trainer.worker",
                f"{job.name}, rank {rank}",
                job.model_dump_json(),
                {**env, **variables},
                Path(f"{job.out}-{rank}.log"),
            )
            for rank, variables in enumerate(launched)
        ]
        super().__init__(processes)

    def steps(self, count: int, *, seconds: float = ANSWER_SECONDS) -> list[Turn]:
        """Let all ranks take so many steps; return what they cost each, by rank.

        Raises:
            Hang: One does not answer in time.
            ChildProcessError: One has ended.
        """
        return [Turn.model_validate(each) for each in self.ask("steps", seconds=seconds, steps=count)]


def _credentials(server: S3Server) -> dict[str, str]:
    env = server.env()
    return {
        "endpoint_url": env["AWS_ENDPOINT_URL"],
        "key": env["AWS_ACCESS_KEY_ID"],
        "secret": env["AWS_SECRET_ACCESS_KEY"],
    }


@contextlib.contextmanager
def site(folder: Path, pictures: int, *, small: bool, threads: int) -> Iterator[Site]:
    """Start a server below a folder and fill it; all is removed again."""
    with tempfile.TemporaryDirectory(prefix="trainer-", dir=folder) as made:
        place = Path(made)
        with S3Server(place / "s3", bucket="trainer") as server:
            yield Site(server, place, pictures, small=small, threads=threads)
