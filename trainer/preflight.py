"""What can be known to be wrong before anything is started: the user hears of it within seconds."""

from collections.abc import Collection
from typing import Final

import torch

from data_pipeline.errors import UserError
from data_pipeline.index import LoadedIndex
from trainer.data import open_indexes
from trainer.loggers import check_loggers
from trainer.recipe import Recipe
from trainer.recipe_sections import Precision
from trainer.run import Run

_GPU_ONLY: Final = (Precision.FP16, Precision.TF32)


def check_inputs(
    recipe: Recipe, run: Run, ranks: int, allowed: Collection[str] = (), *, on_gpu: bool | None = None
) -> str:
    """Check data, batch arithmetic and the run directory against the recipe; change nothing.

    Args:
        recipe: The recipe to train.
        run: The run directory, new or existing.
        ranks: Processes of the whole job.
        allowed: Keys of the recipe that may differ from those of the run so far.
        on_gpu: Whether it trains on GPUs; default: where there are some.

    Returns:
        The hash of the training data's indexes.

    Raises:
        UserError: Naming the first key that does not fit.
    """
    if not recipe.data.url:
        raise UserError(
            "data.url: no training data given; add data.url=FOLDER_OR_URL (see `ddpm data build`)"
        )
    if ranks > recipe.batch.total:
        raise UserError(f"batch.total={recipe.batch.total} is less than the {ranks} ranks; raise it")
    on_gpu = torch.cuda.is_available() if on_gpu is None else on_gpu
    if not on_gpu and recipe.precision in _GPU_ONLY:
        raise UserError(f"precision={recipe.precision}: a CPU cannot train in it; use bf16 or fp32")
    check_loggers(recipe.logging)
    indexes, index_sha = open_indexes(recipe)
    for loaded in indexes:
        _check_data(recipe, loaded)
    if run.has_recipe():
        run.check_recipe(recipe, allowed)
    return index_sha


def _check_data(recipe: Recipe, loaded: LoadedIndex) -> None:
    url = loaded.storage.url
    if not loaded.samples(recipe.data.split):
        raise UserError(f"data.split={recipe.data.split}: holds no picture of {url}; choose another split")
    geometry = loaded.index.geometry
    if (geometry.size, geometry.channels) != (recipe.image.size, recipe.image.channels):
        raise UserError(
            f"image.size={recipe.image.size}, image.channels={recipe.image.channels}: the pictures of "
            f"{url} are {geometry.size}x{geometry.size} with {geometry.channels} channel(s); "
            "give those, or build the data at another size"
        )
