"""What a recipe's data and storage keys open."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline import ImageStream
from data_pipeline.build import BuildOptions, build
from data_pipeline.errors import UserError
from data_pipeline.sources.digits import DigitsSource
from trainer.data import open_indexes, open_stream
from trainer.preflight import check_inputs
from trainer.randomness import flips
from trainer.recipe import Recipe, load_recipe
from trainer.run import Run


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("digits") / "shards"
    build(DigitsSource(), str(folder), BuildOptions(shard_bytes=200_000))
    return str(folder)


def recipe(shards: str, *overrides: str) -> Recipe:
    return load_recipe("quickstart", [f"data.url={shards}", *overrides])


def test_pictures_are_flipped_as_the_positions_generator_says(shards: str, tmp_path: Path) -> None:
    flipped = recipe(shards, "image.flip=true", "seed=5")
    with (
        open_stream(flipped, Run(str(tmp_path / "run")), 0, 1, 0) as mine,
        ImageStream(shards, seed=5, global_batch=flipped.batch.total) as plain,
    ):
        for one, other in itertools.islice(zip(mine, plain, strict=True), 3):
            coin = flips(5, torch.from_numpy(one.positions)).numpy()
            assert 0 < coin.sum() < len(coin)
            expected = np.where(coin[:, None, None, None], other.images[:, :, ::-1], other.images)
            assert np.array_equal(one.images, expected)


def test_further_data_sets_are_mixed_in_and_are_part_of_the_hash(shards: str, tmp_path: Path) -> None:
    mixed = recipe(shards, f"data.also=[{{url: {shards}, weight: 0.5}}]")
    run = Run(str(tmp_path / "run"))
    _, alone_sha = open_indexes(recipe(shards))
    indexes, sha = open_indexes(mixed)
    assert len(indexes) == 2
    assert sha not in (alone_sha, open_indexes(recipe(shards, f"data.also=[{{url: {shards}}}]"))[1])
    assert check_inputs(mixed, run, 1) == sha
    assert mixed.sha256 == recipe(shards).sha256, "the index's hash tells it, not the recipe's"
    with open_stream(mixed, run, 0, 1, 0) as stream:
        assert stream.index_sha == sha
        next(stream)


def test_a_further_data_set_that_does_not_fit_is_named(shards: str, tmp_path: Path) -> None:
    build(DigitsSource(), str(tmp_path / "other"), BuildOptions(size=16))
    mixed = recipe(shards, f"data.also=[{{url: {tmp_path / 'other'}}}]")
    with pytest.raises(UserError, match=r"the pictures of .*other are 16x16"):
        check_inputs(mixed, Run(str(tmp_path / "run")), 1)


def test_blocks_are_kept_in_the_cache_folder(shards: str, tmp_path: Path) -> None:
    cached = recipe(shards, f"data.cache_dir={tmp_path / 'cache'}", "data.cache_gib=0.1")
    with open_stream(cached, Run(str(tmp_path / "run")), 0, 1, 0) as stream:
        next(stream)
    assert list((tmp_path / "cache").glob("??/*-0"))


def test_an_unknown_backend_is_named(shards: str) -> None:
    with pytest.raises(UserError, match=r"storage\.backend.*s3fs.*obstore"):
        recipe(shards, "storage.backend=boto")
