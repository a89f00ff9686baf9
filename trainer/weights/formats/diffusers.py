"""Hugging Face's `UNet2DModel`: its names, and its config.json, written and compared.

Nothing here imports diffusers. Source: diffusers 0.42.1, the arguments of `UNet2DModel` with their defaults.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, ValidationError

from data_pipeline.documents import describe_first
from data_pipeline.errors import UserError
from trainer.unet_config import CONVENTIONS, Conventions, UNetConfig
from trainer.weights.names import Kind, Layout, Naming

NAMING: Final = Naming(
    places={
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "class_embed": "class_embedding",
        "stem": "conv_in",
        "down.blocks": "down_blocks.{level}.resnets.{index}.{layer}",
        "down.attentions": "down_blocks.{level}.attentions.{index}.{layer}",
        "down.downsample": "down_blocks.{level}.downsamplers.0.conv",
        "mid.block1": "mid_block.resnets.0.{layer}",
        "mid.attention": "mid_block.attentions.0.{layer}",
        "mid.block2": "mid_block.resnets.1.{layer}",
        "up.blocks": "up_blocks.{turned}.resnets.{index}.{layer}",
        "up.attentions": "up_blocks.{turned}.attentions.{index}.{layer}",
        "up.upsample": "up_blocks.{turned}.upsamplers.0.conv",
        "head.norm": "conv_norm_out",
        "head.conv": "conv_out",
    },
    block={
        "norm1": "norm1",
        "conv1": "conv1",
        "time_proj": "time_emb_proj",
        "norm2": "norm2",
        "conv2": "conv2",
        "shortcut": "conv_shortcut",
    },
    attention={"norm": "group_norm", "query": "to_q", "key": "to_k", "value": "to_v", "out": "to_out.0"},
    layouts={Kind.EMBEDDING: Layout.NO_NULL_ROW},
)
OLD_ATTENTION: Final = replace(
    NAMING,
    attention={"norm": "group_norm", "query": "query", "key": "key", "value": "value", "out": "proj_attn"},
)
"""Older releases named attention otherwise; the files of the google/ddpm-* repositories still do."""


class UNetJson(BaseModel):
    """Content of a config.json: the arguments of `UNet2DModel`, absent ones at their defaults."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 3
    out_channels: int = 3
    center_input_sample: bool = False
    time_embedding_type: str = "positional"
    time_embedding_dim: int | None = None
    freq_shift: int = 0
    flip_sin_to_cos: bool = True
    down_block_types: tuple[str, ...] = (
        "DownBlock2D",
        "AttnDownBlock2D",
        "AttnDownBlock2D",
        "AttnDownBlock2D",
    )
    mid_block_type: str | None = "UNetMidBlock2D"
    up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    layers_per_block: int = 2
    mid_block_scale_factor: float = 1.0
    downsample_padding: int = 1
    downsample_type: str = "conv"
    upsample_type: str = "conv"
    dropout: float = 0.0
    act_fn: str = "silu"
    attention_head_dim: int | None = 8
    norm_num_groups: int = 32
    attn_norm_num_groups: int | None = None
    norm_eps: float = 1e-5
    resnet_time_scale_shift: str = "default"
    add_attention: bool = True
    class_embed_type: str | None = None
    num_class_embeds: int | None = None


_PROFILE_KEYS: Final = ("freq_shift", "flip_sin_to_cos", "downsample_padding", "norm_eps")
"""What the recipe's model.profile decides."""
_PLAIN_TYPES: Final = {"DownBlock2D", "AttnDownBlock2D", "UpBlock2D", "AttnUpBlock2D"}


def unet_json(config: UNetConfig) -> UNetJson:
    """The `UNet2DModel` that computes what our network does.

    Raises:
        UserError: There is none; the recipe's key that it lacks is named.
    """
    _refuse_inexpressible(config)
    return _describe(config, _head_dim(config))


def _describe(config: UNetConfig, head_dim: int | None) -> UNetJson:
    attends = [config.attends(level) for level in range(len(config.widths))]
    return UNetJson(
        sample_size=config.image_size,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        down_block_types=tuple("AttnDownBlock2D" if attend else "DownBlock2D" for attend in attends),
        up_block_types=tuple("AttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)),
        block_out_channels=config.widths,
        layers_per_block=config.num_res_blocks,
        dropout=config.dropout,
        attention_head_dim=head_dim,
        norm_num_groups=config.norm_groups,
        # Without it, scale-shift blocks would leave the middle's attention without normalisation.
        attn_norm_num_groups=config.norm_groups if config.scale_shift_norm else None,
        resnet_time_scale_shift="scale_shift" if config.scale_shift_norm else "default",
        **_knobs(config.conventions),
    )


def compare_unet(content: Mapping[str, Any], config: UNetConfig, where: str) -> None:
    """Check that a config.json describes our network.

    Args:
        content: The file's content.
        config: Our network, from the recipe.
        where: Name of the file for messages.

    Raises:
        UserError: It is ill-typed, or describes another network: the first key that differs is named, with
            what to set.
    """
    try:
        theirs = UNetJson.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{where}: {describe_first(error)}") from error
    _refuse_inexpressible(config)
    # Heads of several widths have no single value; `_same` compares them at each width.
    wanted = _describe(config, None)
    for key in UNetJson.model_fields:
        if key != "dropout" and not _same(key, theirs, wanted, config):
            ours = _show(getattr(wanted, key))
            if key == "attention_head_dim":
                ours = " and ".join(f"{config.heads(width)} at {width}" for width in config.attention_widths)
                ours += " channels"
            found = _show(getattr(theirs, key))
            raise UserError(
                f"{where}: {key} is {found}, the recipe's network has {ours}; {_remedy(key, theirs)}"
            )


def _knobs(conventions: Conventions) -> dict[str, Any]:
    """The arguments that make a profile."""
    return {
        "freq_shift": conventions.frequency_offset,
        "flip_sin_to_cos": conventions.cosine_first,
        # Theirs is one number for both sides; with 0 they pad the end alone.
        "downsample_padding": conventions.downsample_padding[0],
        "norm_eps": conventions.norm_eps,
    }


def _show(value: object) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _same(key: str, theirs: UNetJson, wanted: UNetJson, config: UNetConfig) -> bool:
    """Whether two values of one key mean the same network."""
    match key:
        case "sample_size":
            return theirs.sample_size in (wanted.sample_size, (wanted.sample_size, wanted.sample_size))
        case "attention_head_dim":
            dim = theirs.attention_head_dim
            return all(config.heads(width) * (dim or width) == width for width in config.attention_widths)
        case "attn_norm_num_groups":
            inherited = theirs.norm_num_groups if theirs.resnet_time_scale_shift == "default" else None
            return (theirs.attn_norm_num_groups or inherited) == config.norm_groups
    return bool(getattr(theirs, key) == getattr(wanted, key))


def _remedy(key: str, theirs: UNetJson) -> str:
    """What to set in the recipe for a key that differs."""
    match key:
        case "sample_size":
            return f"set image.size={_show(theirs.sample_size)}"
        case "in_channels":
            return f"set image.channels={theirs.in_channels}"
        case "out_channels":
            return "set diffusion.variance: a learned one has twice the channels"
        case "block_out_channels" if theirs.block_out_channels and theirs.block_out_channels[0] > 0:
            base = theirs.block_out_channels[0]
            multipliers = ",".join(f"{width / base:g}" for width in theirs.block_out_channels)
            return f"set model.base_channels={base} model.channel_multipliers=[{multipliers}]"
        case "down_block_types" | "up_block_types" if _PLAIN_TYPES.issuperset(getattr(theirs, key)):
            return "set model.attention_resolutions: only levels with attention have the types named Attn"
        case "layers_per_block":
            return f"set model.num_res_blocks={theirs.layers_per_block}"
        case "attention_head_dim":
            dim = theirs.attention_head_dim
            return f"set model.head_channels={dim}" if dim else "set model.num_heads=1"
        case "norm_num_groups":
            return f"set model.norm_groups={theirs.norm_num_groups}"
        case "resnet_time_scale_shift" if theirs.resnet_time_scale_shift in ("default", "scale_shift"):
            return (
                f"set model.scale_shift_norm={str(theirs.resnet_time_scale_shift == 'scale_shift').lower()}"
            )
        case _ if key in _PROFILE_KEYS:
            return _fitting_profile(theirs)
    return "our network has no such option"


def _fitting_profile(theirs: UNetJson) -> str:
    combination = {key: getattr(theirs, key) for key in _PROFILE_KEYS}
    for profile, conventions in CONVENTIONS.items():
        if _knobs(conventions) == combination:
            return f"set model.profile={profile}"
    values = ", ".join(f"{key}={value}" for key, value in combination.items())
    return f"no model.profile combines {values}"


def _head_dim(config: UNetConfig) -> int | None:
    """Channels per head; None for one head of any width."""
    widths = config.attention_widths
    if all(config.heads(width) == 1 for width in widths):
        return None
    dims = {width // config.heads(width) for width in widths}
    if len(dims) > 1:
        raise UserError(
            f"model.num_heads={config.heads(widths[0])}: diffusers knows heads of one width only, here they "
            f"are {' and '.join(str(dim) for dim in sorted(dims))} channels wide; it cannot run this network"
        )
    return dims.pop()


def _refuse_inexpressible(config: UNetConfig) -> None:
    if config.block_size != 1:
        raise UserError(f"model.block_size={config.block_size}: diffusers' UNet2DModel has no space-to-depth")
    if config.num_classes is not None:
        raise UserError(f"model.num_classes={config.num_classes}: diffusers' DDPMPipeline gives no labels")
    if config.channel_multipliers[0] != 1:
        raise UserError(
            f"model.channel_multipliers={list(config.channel_multipliers)}: in diffusers' UNet2DModel the "
            "first level is as wide as the stem, so the first multiplier must be 1"
        )
