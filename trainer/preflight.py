"""What can be known to be wrong before anything is started: the user hears of it within seconds."""

from data_pipeline.errors import UserError
from data_pipeline.index import LoadedIndex
from trainer.data import open_indexes
from trainer.recipe import Recipe
from trainer.run import Run


def check_inputs(recipe: Recipe, run: Run, ranks: int) -> str:
    """Check data, batch arithmetic and the run directory against the recipe; change nothing.

    Args:
        recipe: The recipe to train.
        run: The run directory, new or existing.
        ranks: Processes of the whole job.

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
    indexes, index_sha = open_indexes(recipe)
    for loaded in indexes:
        _check_data(recipe, loaded)
    if run.has_recipe():
        run.check_recipe(recipe)
    return index_sha


def _check_data(recipe: Recipe, loaded: LoadedIndex) -> None:
    url = loaded.storage.url
    if not sum(entry.samples for entry in loaded.shards(recipe.data.split)):
        raise UserError(f"data.split={recipe.data.split}: holds no picture of {url}; choose another split")
    geometry = loaded.index.geometry
    if (geometry.size, geometry.channels) != (recipe.image.size, recipe.image.channels):
        raise UserError(
            f"image.size={recipe.image.size}, image.channels={recipe.image.channels}: the pictures of "
            f"{url} are {geometry.size}x{geometry.size} with {geometry.channels} channel(s); "
            "give those, or build the data at another size"
        )
