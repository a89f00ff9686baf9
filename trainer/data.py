"""What a recipe trains on: its data sets opened, and the stream of them."""

from pathlib import Path

import numpy as np
import torch

from data_pipeline.block_cache import BlockCache
from data_pipeline.index import LoadedIndex, load_index
from data_pipeline.mixture import Mixture
from data_pipeline.storage import Storage
from data_pipeline.stream import ImageStream, Mirror, WeightedSource, identity
from data_pipeline.substitutes import Substitutions
from trainer.randomness import flips
from trainer.recipe import Recipe
from trainer.run import Run


def sources(recipe: Recipe) -> list[WeightedSource]:
    """Return the recipe's data sets with their weights, that of `data.url` first."""
    data, storage = recipe.data, recipe.storage
    weighted = [(data.url, data.weight), *((other.url, other.weight) for other in data.also)]
    return [
        WeightedSource(Storage(url, backend=storage.backend, request_timeout=storage.request_timeout), weight)
        for url, weight in weighted
    ]


def open_indexes(recipe: Recipe) -> tuple[list[LoadedIndex], str]:
    """Read the indexes of the recipe's data sets.

    Returns:
        The indexes, and the hash that stands for all of them and their shares in manifests.

    Raises:
        UserError: One is not there or not readable, or a weight is out of range.
    """
    weighted = sources(recipe)
    loaded = [load_index(source.url) for source in weighted]
    shares = Mixture([source.weight for source in weighted], recipe.seed).shares
    return loaded, identity(loaded, shares)


def open_stream(recipe: Recipe, run: Run, rank: int, world: int, position: int) -> ImageStream:
    """Open one rank's stream of training pictures, flipped as the recipe says.

    Raises:
        UserError: As `ImageStream`, or the cache's folder cannot be used.
    """
    data = recipe.data
    cache = (
        BlockCache(Path(data.cache_dir).expanduser(), int(data.cache_gib * 2**30)) if data.cache_dir else None
    )
    return ImageStream(
        sources(recipe),
        split=data.split,
        seed=recipe.seed,
        global_batch=recipe.batch.total,
        rank=rank,
        world=world,
        position=position,
        window_shards=data.window_shards,
        channels=recipe.image.channels,
        image_size=recipe.image.size,
        mirror=_coin(recipe.seed) if recipe.image.flip else None,
        prefetch_batches=data.prefetch_batches,
        prefetch_bytes=data.prefetch_mib << 20,
        threads=data.reader_threads,
        requests=data.requests,
        cache=cache,
        substitutions=Substitutions(run.storage.child("substitutions"), data.damage_budget),
    )


def _coin(seed: int) -> Mirror:
    def mirror(positions: np.ndarray) -> np.ndarray:
        return flips(seed, torch.from_numpy(positions)).numpy()

    return mirror
