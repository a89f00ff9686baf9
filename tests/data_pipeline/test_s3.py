"""The same data set on a real S3 server."""

import itertools
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline import ImageStream
from data_pipeline.build import BuildOptions, build, find_built
from data_pipeline.index import load_index
from data_pipeline.reader import ShardReader
from data_pipeline.sources.folder import FolderSource


def test_s3_holds_and_streams_the_same_as_a_folder(s3_prefix: str, tmp_path: Path) -> None:
    pictures, folder = tmp_path / "in", tmp_path / "out"
    pictures.mkdir()
    noise = np.random.default_rng(1).integers(0, 256, (150, 16, 16, 3), dtype=np.uint8)
    for number, array in enumerate(noise):
        Image.fromarray(array).save(pictures / f"{number:03d}.png")
    source, options = FolderSource(pictures), BuildOptions(shard_bytes=51_200, val_fraction=0.2)
    build(source, s3_prefix, options)
    build(source, str(folder), options)
    remote, local = load_index(s3_prefix), load_index(str(folder))
    assert remote.sha256 == local.sha256
    assert remote.storage.list() == sorted(file.name for file in folder.iterdir())
    assert find_built(source, s3_prefix, options) == remote.index
    streams = [
        ImageStream(url, seed=1, global_batch=50, channels=3, image_size=16, window_shards=2)
        for url in (s3_prefix, str(folder))
    ]
    with streams[0], streams[1]:
        for one, other in itertools.islice(zip(*streams, strict=True), 8):
            assert np.array_equal(one.positions, other.positions)
            assert np.array_equal(one.images, other.images)
    some = np.array([0, 3, 0]), np.array([5, 0, 6])
    ranged = ShardReader(remote, "train").fetch(*some)
    assert ranged == ShardReader(local, "train").fetch(*some)
