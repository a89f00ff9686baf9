"""What can be known to be wrong before anything is started: the user hears of it within seconds."""

from collections.abc import Collection
from typing import Final

import torch

from data_pipeline.errors import UserError
from data_pipeline.index import LoadedIndex
from trainer.batches import plan_batches
from trainer.data import open_indexes
from trainer.deepspeed_check import check_config
from trainer.loggers import check_loggers
from trainer.manifest import ANY_DATA, DamagedCheckpointError
from trainer.recipe import Recipe
from trainer.recipe_sections import Precision
from trainer.run import CheckpointGoneError, Run

_GPU_ONLY: Final = (Precision.FP16, Precision.TF32)
_SINCE_AMPERE: Final = (Precision.BF16, Precision.TF32)
_AMPERE: Final = (8, 0)
"""The first compute capability with tensor cores for these."""


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
    plan_batches(recipe, ranks)
    on_gpu = torch.cuda.is_available() if on_gpu is None else on_gpu
    if not on_gpu and recipe.precision in _GPU_ONLY:
        raise UserError(f"precision={recipe.precision}: a CPU cannot train in it; use bf16 or fp32")
    if on_gpu:
        _check_gpu(recipe.precision)
    check_config(recipe)
    check_loggers(recipe.logging)
    indexes, index_sha = open_indexes(recipe)
    for loaded in indexes:
        _check_data(recipe, loaded)
    if run.has_recipe():
        run.check_recipe(recipe, allowed)
        _check_index(recipe, run, index_sha)
    return index_sha


def _check_index(recipe: Recipe, run: Run, index_sha: str) -> None:
    """Refuse data that the run was not trained on, by what its newest readable checkpoint says."""
    for name in reversed(run.live_checkpoints()):
        try:
            trained_on = run.manifest(name).index_sha
        except (DamagedCheckpointError, CheckpointGoneError):
            continue
        if trained_on not in (ANY_DATA, index_sha):
            raise UserError(
                f"data.url={recipe.data.url}: the run {run.url} was trained on another index "
                f"({trained_on[:12]}, this one is {index_sha[:12]}); give the same shards or another run"
            )
        return


def _check_gpu(precision: Precision) -> None:
    """Refuse what this machine's GPU, if it has one, would only emulate, slowly, or leave out silently."""
    if precision not in _SINCE_AMPERE or not torch.cuda.is_available() or torch.version.hip is not None:
        return
    capability = torch.cuda.get_device_capability()
    if capability < _AMPERE:
        name = torch.cuda.get_device_name()
        raise UserError(
            f"precision={precision}: {name} (compute capability {capability[0]}.{capability[1]}) cannot "
            "compute in it, GPUs since 8.0 can; use fp16 or fp32"
        )


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
