"""The pictures, the store that they lie in, and everyone's format of them."""

import contextlib
import io
import os
import struct
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import botocore.session
import numpy as np
from botocore.config import Config

from benchmarks.data_build.running import built, scratch_below
from benchmarks.data_stream.contenders import CONTENDERS, FOLDER, LITDATA, MOSAIC, STOCK, WITH_OUR_DECODER
from benchmarks.data_stream.job import SIZE, Job
from benchmarks.data_stream.process import ContenderProcess
from benchmarks.encodings import photographs
from data_pipeline.build import BuildOptions
from data_pipeline.encoding import Encoding
from data_pipeline.index import load_index
from data_pipeline.reader import ShardReader
from data_pipeline.sources.folder import FolderSource
from data_pipeline.split_reader import index_order
from launch.s3server import S3Server

DISTINCT = 1500
"""Pictures that are distinct to the eye; all are to the byte."""
VAL_FRACTION = 0.001
_SMALL, _SMALL_VAL_FRACTION = 20_000, 0.1  # so that the validation split of a small run is not empty
_QUALITY = 75
_PART = 1024  # pictures in memory at a time
_PRESIGNED_SECONDS = 86_400


@dataclass(frozen=True)
class DataSet:
    """Shards in the store and in a local folder.

    Attributes:
        url: In the store.
        local: The same shards.
        pictures: In the split "train".
        picture_bytes: Theirs together.
        shards: Names of that split's shards.
    """

    url: str
    local: Path
    pictures: int
    picture_bytes: int
    shards: list[str]


class Site:
    """A running S3 server with the pictures in it.

    Args:
        server: The server.
        place: A folder for everything.
        pictures: How many.
        mosaic: Folder of MosaicML Streaming; None: there is none.
    """

    def __init__(self, server: S3Server, place: Path, pictures: int, mosaic: Path | None) -> None:
        self.server, self.place, self._libraries = server, place, {MOSAIC: mosaic}
        self.missing = [MOSAIC] if mosaic is None else []
        self._source = place / "source"
        write_pictures(self._source, pictures)
        self.data = self.build("shards", self._source, BuildOptions().shard_bytes)

    def env(self, endpoint: str | None = None) -> dict[str, str]:
        """Environment that leads every S3 client to the server, or to what stands before it."""
        endpoint = endpoint or self.server.endpoint
        return {
            **self.server.env(),
            "AWS_ENDPOINT_URL": endpoint,
            "S3_ENDPOINT_URL": endpoint,  # MosaicML's own name for it
        }

    def start(self, job: Job, endpoint: str | None = None) -> ContenderProcess:
        """A process for a job, to be entered."""
        log = self.place / f"{job.contender}.log"
        return ContenderProcess(job, self.env(endpoint), log, self._libraries.get(job.contender))

    def job(
        self, contender: str, data: DataSet | None = None, endpoint: str | None = None, **more: Any
    ) -> Job:
        """Return what a contender is told; `more` overrides."""
        data = data or self.data
        found: dict[str, Any] = {"contender": contender, "url": data.url, "pictures": data.pictures}
        if contender in (STOCK, WITH_OUR_DECODER):
            found["http"] = self._presigned(data, endpoint or self.server.endpoint)
        elif contender in (MOSAIC, LITDATA):
            found["url"] = f"{self.server.url}/{contender}"
        elif contender == FOLDER:
            found["url"] = str(self.place / "train")
        return Job(**(found | more))

    def build(self, name: str, source: Path, shard_bytes: int) -> DataSet:
        """Build shards of a folder's pictures and put them into the store."""
        local = self.place / name
        fraction = VAL_FRACTION if sum(1 for _ in source.iterdir()) >= _SMALL else _SMALL_VAL_FRACTION
        options = BuildOptions(
            size=SIZE, encoding=Encoding.parse("source"), val_fraction=fraction, shard_bytes=shard_bytes
        )
        with scratch_below(self.place):
            index = built(FolderSource(source), local, options, workers=os.cpu_count() or 1)
        assert index.rejected == 0
        self._upload(local, name)
        loaded = load_index(str(local))
        sizes = sum(len(data) for part in self._train(local) for data in part)
        shards = [entry.name for entry in loaded.shards("train")]
        return DataSet(f"{self.server.url}/{name}", local, loaded.index.samples("train"), sizes, shards)

    def part_of_source(self, name: str, pictures: int) -> Path:
        """Return a folder with the first of the pictures."""
        folder = self.place / name
        folder.mkdir()
        for path in sorted(self._source.iterdir())[:pictures]:
            (folder / path.name).hardlink_to(path)
        return folder

    def write_formats(self, contenders: Sequence[str]) -> None:
        """Write the split "train" as files and in the formats of those who have their own."""
        folder = self.place / "train"
        folder.mkdir()
        number = 0
        for part in self._train(self.data.local):
            for data in part:
                (folder / f"{number:06d}.jpg").write_bytes(data)
                number += 1
        for name in contenders:
            if CONTENDERS[name].write is not None:
                out = self.place / name
                with self.start(self.job(name)) as process:
                    process.ask("write", pictures=str(folder), out=str(out))
                self._upload(out, name)

    @staticmethod
    def _train(local: Path) -> Iterator[list[bytes]]:
        """Read the files of the split "train" in the order of the index, some at a time."""
        loaded = load_index(str(local))
        reader = ShardReader(loaded, "train")
        for shards, members in index_order(loaded, "train", _PART):
            yield reader.fetch(shards, members)

    def _upload(self, folder: Path, name: str) -> None:
        client = self._client(self.server.endpoint)
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                key = f"{name}/{path.relative_to(folder).as_posix()}"
                client.put_object(Bucket=self.server.bucket, Key=key, Body=path.read_bytes())

    def _presigned(self, data: DataSet, endpoint: str) -> list[str]:
        """URLs that need no further credentials; they hold at that endpoint only."""
        sign = partial(
            self._client(endpoint).generate_presigned_url, "get_object", ExpiresIn=_PRESIGNED_SECONDS
        )
        prefix = data.url.removeprefix(f"{self.server.url}/")
        return [
            sign(Params={"Bucket": self.server.bucket, "Key": f"{prefix}/{name}"}) for name in data.shards
        ]

    def _client(self, endpoint: str) -> Any:
        env = self.server.env()
        return botocore.session.get_session().create_client(
            "s3",
            endpoint_url=endpoint,
            region_name=env["AWS_DEFAULT_REGION"],
            aws_access_key_id=env["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=env["AWS_SECRET_ACCESS_KEY"],
            config=Config(signature_version="s3v4"),
        )


@contextlib.contextmanager
def site(folder: Path, pictures: int, mosaic: Path | None) -> Iterator[Site]:
    """Start a server below a folder and fill it; all is removed again."""
    with tempfile.TemporaryDirectory(prefix="data-stream-", dir=folder) as made:
        place = Path(made)
        with S3Server(place / "s3", bucket="stream") as server:
            yield Site(server, place, pictures, mosaic)


def write_pictures(folder: Path, count: int) -> None:
    """Write squares of photographs as JPEGs of LSUN's size and quality, each file unlike all others.

    Copies of one picture stand far apart: decoding one right after another is faster than it ever is.
    """
    files = []
    for picture in photographs(min(count, DISTINCT), SIZE):
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=_QUALITY)
        files.append(buffer.getvalue())
    numbers = np.arange(count) % len(files)
    np.random.default_rng(0).shuffle(numbers)
    folder.mkdir()
    for number, which in enumerate(numbers.tolist()):
        (folder / f"{number:06d}.jpg").write_bytes(_with_comment(files[which], number))


def _with_comment(jpeg: bytes, number: int) -> bytes:
    """The same picture with a comment segment."""
    comment = b"%09d" % number
    return b"".join((jpeg[:2], b"\xff\xfe", struct.pack(">H", len(comment) + 2), comment, jpeg[2:]))
