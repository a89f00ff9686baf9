"""From foreign tensors to our parameters; the first one that does not fit is named, with a remedy."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipeline.errors import UserError
from trainer.recipe import Recipe
from trainer.weights.detect import Format, check_assumptions, detect
from trainer.weights.diagnose import remedy
from trainer.weights.formats import openai
from trainer.weights.formats.diffusers import compare_unet
from trainer.weights.formats.diffusers_scheduler import compare_scheduler
from trainer.weights.names import Correspondence, Naming, Network, correspondences, to_ours
from trainer.weights.source import Source, open_source

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Converted:
    """Foreign weights as parameters of our network.

    Attributes:
        source: Where they were read.
        format: The code base they come from.
        weights: float32, by our name, in our order.
        averages: Their moving averages, likewise; the weights themselves, if the source has none.
        has_averages: Whether it has.
    """

    source: Source
    format: Format
    weights: dict[str, Tensor]
    averages: dict[str, Tensor]
    has_averages: bool


def read_foreign(place: str, recipe: Recipe, new_attention_order: bool = False) -> Converted:
    """Read weights of another code base as those of a recipe's network.

    Args:
        place: File or folder, see `open_source`.
        recipe: Tells network and diffusion process.
        new_attention_order: Of OpenAI's weights: queries, keys and values of all heads lie apart.

    Raises:
        UserError: They cannot be opened safely, or are of another network or process; key or first wrong
            tensor is named, and what to set.
    """
    source = open_source(place)
    network = Network.of(recipe.unet_config())
    found = detect(source, network)
    naming = found.naming
    if found.format is Format.OPENAI:
        naming = openai.NEW_ATTENTION_ORDER if new_attention_order else naming
        _check_openai(source, recipe)
    elif new_attention_order:
        raise UserError(f"--new-attention-order: {place} holds weights of {found.format}, not of openai")
    check_assumptions(found.format, network.config, place)
    if found.format is Format.DIFFUSERS:
        if source.unet_json is None:
            raise UserError(
                f"{place}: weights of diffusers come as a folder with config.json; give the folder"
            )
        compare_unet(source.unet_json[0], network.config, source.unet_json[1])
    weights = averages = take(found.tensors, naming, network, place)
    if found.averages:
        averages = take(found.averages, naming, network, f"{place} (averages)")
    if source.scheduler_json is not None:
        compare_scheduler(source.scheduler_json[0], recipe, source.scheduler_json[1])
    return Converted(source, found.format, weights, averages, bool(found.averages))


def _check_openai(source: Source, recipe: Recipe) -> None:
    option = openai.foreign_resampling(source.tensors)
    if option is not None:
        raise UserError(
            f"{source.where}: a network of OpenAI's with {option}; ours resamples by convolutions only, so "
            "it cannot be imported"
        )
    if recipe.diffusion.num_timesteps != 1000:
        log.warning(
            "%s: our network is given the timestep itself; OpenAI's may be trained with rescale_timesteps, "
            "which at %d timesteps is another network",
            source.where,
            recipe.diffusion.num_timesteps,
        )


def take(tensors: Mapping[str, Tensor], naming: Naming, network: Network, where: str) -> dict[str, Tensor]:
    """Our parameters from tensors of one code base, each checked.

    Args:
        tensors: By their name.
        naming: Their names.
        network: Ours.
        where: The file, for messages.

    Returns:
        float32, contiguous, by our name.

    Raises:
        UserError: Naming the first tensor, in our order, that is missing, of another shape, no dense floating
            numbers or not finite; or else the first one that is unexpected.
    """
    if network.config.num_classes is not None and "class_embed" not in naming.places:
        raise UserError(f"{where}: the network has no classes; leave out model.num_classes")
    table = correspondences(naming, network)
    for entry in table:
        problem = _problem(entry, tensors, network.shapes)
        if problem is not None:
            raise UserError(f"{where}: {problem}; {remedy(tensors, naming, network.config)}")
    known = {entry.theirs for entry in table}
    for name in tensors:
        if name not in known:
            raise UserError(
                f"{where}: {name} {list(tensors[name].shape)} is unexpected, the recipe's network has no "
                f"such tensor; {remedy(tensors, naming, network.config)}"
            )
    for entry in table:
        if not bool(torch.isfinite(tensors[entry.theirs]).all()):
            raise UserError(
                f"{where}: {entry.theirs} holds numbers that are not finite; the training diverged before it"
            )
    return to_ours(table, tensors)


def _problem(
    entry: Correspondence, tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]
) -> str | None:
    """What is wrong with one tensor; None if it fits."""
    ours = entry.ours[0] if len(entry.ours) == 1 else f"{entry.ours[0]} and its like"
    if entry.theirs not in tensors:
        return f"{entry.theirs} is missing (our {ours})"
    tensor = tensors[entry.theirs]
    wanted = entry.to_theirs({name: torch.empty(shapes[name], device="meta") for name in entry.ours}).shape
    if tensor.layout != torch.strided or not tensor.is_floating_point():
        return f"{entry.theirs} holds {tensor.dtype} {tensor.layout}, no plain floating numbers (our {ours})"
    if tensor.shape != wanted:
        return (
            f"{entry.theirs} is {list(tensor.shape)}, the recipe's network wants {list(wanted)} "
            f"(our {ours} {list(shapes[entry.ours[0]])})"
        )
    return None
