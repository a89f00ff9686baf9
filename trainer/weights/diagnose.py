"""What network foreign tensors seem to be of: turns a misfit into recipe keys to set."""

from collections.abc import Callable, Iterator, Mapping
from itertools import count, takewhile

import torch
from torch import Tensor

from trainer.unet_config import UNetConfig
from trainer.weights.names import Grid, Naming

_MOST = 64
"""More levels or blocks than this are not looked for."""


def remedy(tensors: Mapping[str, Tensor], naming: Naming, config: UNetConfig) -> str:
    """Say in a clause which recipe keys the tensors contradict, as far as names and shapes tell.

    Args:
        tensors: By their name.
        naming: Their names.
        config: The recipe's network.
    """
    seen = dict(_seen(tensors, naming, config))
    if not seen:
        return "the file is damaged, or of a network that is built otherwise"
    wanted = {
        "image.channels": config.in_channels,
        "model.base_channels": config.base_channels,
        "model.channel_multipliers": list(config.channel_multipliers),
        "model.num_res_blocks": config.num_res_blocks,
        "model.attention_resolutions": sorted(config.attention_resolutions, reverse=True),
        "model.scale_shift_norm": config.scale_shift_norm,
        "model.num_classes": config.num_classes,
        "output channels": config.out_channels,
    }
    differing = {key: value for key, value in seen.items() if value != wanted[key]}
    if not differing:
        return "as far as the other tensors tell the recipe's keys are right, so the file is damaged"
    outputs = differing.pop("output channels", None)
    setting = " ".join(f"{key}={_yaml(value)}" for key, value in differing.items())
    clauses = [f"the file looks like {setting}"] if differing else []
    if outputs is not None:
        clauses.append(f"it puts out {outputs} channels, which diffusion.variance and image.channels decide")
    return "; ".join(clauses)


def _yaml(value: object) -> str:
    match value:
        case bool():
            return str(value).lower()
        case list():
            return f"[{','.join(map(str, value))}]"
    return str(value)


def _seen(tensors: Mapping[str, Tensor], naming: Naming, config: UNetConfig) -> Iterator[tuple[str, object]]:
    """Recipe keys and the values that the tensors speak for; nothing, if they are no network at all."""
    blocks = _count(
        lambda index: _has(tensors, naming, f"down.0.blocks.{index}.conv1.weight", Grid(1, 1, frozenset()))
    )
    if not blocks:
        return
    grid = Grid(1, blocks, frozenset())
    levels = _count(lambda level: _has(tensors, naming, f"down.{level}.blocks.0.conv1.weight", grid))
    shapes = {
        ours: _shape(tensors, naming, ours, grid)
        for ours in (
            "stem.weight",
            "down.0.blocks.0.time_proj.weight",
            "head.conv.weight",
            "class_embed.weight",
        )
    }
    widths = [_shape(tensors, naming, f"down.{level}.blocks.0.conv1.weight", grid) for level in range(levels)]
    unit = config.block_size**2
    stem = shapes["stem.weight"]
    if len(stem) == 4 and stem[0] > 0:
        yield "image.channels", stem[1] // unit
        yield "model.base_channels", stem[0]
        if all(width and width[0] % stem[0] == 0 for width in widths):
            yield "model.channel_multipliers", [width[0] // stem[0] for width in widths]
    yield "model.num_res_blocks", blocks
    top = config.image_size // config.block_size
    yield (
        "model.attention_resolutions",
        [
            top >> level
            for level in range(levels)
            if _has(tensors, naming, f"down.{level}.attentions.0.norm.weight", grid)
        ],
    )
    projection = shapes["down.0.blocks.0.time_proj.weight"]
    if projection and widths and widths[0]:
        yield "model.scale_shift_norm", projection[0] == 2 * widths[0][0]
    classes = shapes["class_embed.weight"]
    yield "model.num_classes", classes[0] - 1 if classes else None
    if shapes["head.conv.weight"]:
        yield "output channels", shapes["head.conv.weight"][0] // unit


def _count(holds: Callable[[int], bool]) -> int:
    return len(list(takewhile(lambda number: number < _MOST and holds(number), count())))


def _has(tensors: Mapping[str, Tensor], naming: Naming, ours: str, grid: Grid) -> bool:
    return naming.name(ours, grid) in tensors


def _shape(tensors: Mapping[str, Tensor], naming: Naming, ours: str, grid: Grid) -> tuple[int, ...]:
    """Shape that one of their tensors has here; empty if it is missing or has too few dimensions."""
    if ours.startswith("class_embed.") and "class_embed" not in naming.places:
        return ()
    tensor = tensors.get(naming.name(ours, grid))
    if tensor is None:
        return ()
    try:
        return tuple(naming.layout(ours).to_ours(torch.empty(tensor.shape, device="meta")).shape)
    except (RuntimeError, IndexError):
        return ()
