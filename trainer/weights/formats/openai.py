"""Names of OpenAI's improved-diffusion and guided-diffusion.

Their blocks carry one running number per way; a group of the same number holds block, attention and
resampling one after another. Source: github.com/openai/guided-diffusion at 22e0df8 (names only).
"""

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Final

from trainer.weights.names import Kind, Layout, Naming

NAMING: Final = Naming(
    places={
        "time_embed.0": "time_embed.0",
        "time_embed.2": "time_embed.2",
        "class_embed": "label_emb",
        "stem": "input_blocks.0.0",
        "down.blocks": "input_blocks.{number}.0.{layer}",
        "down.attentions": "input_blocks.{number}.1.{layer}",
        "down.downsample": "input_blocks.{number}.0.op",
        "mid.block1": "middle_block.0.{layer}",
        "mid.attention": "middle_block.1.{layer}",
        "mid.block2": "middle_block.2.{layer}",
        "up.blocks": "output_blocks.{number}.0.{layer}",
        "up.attentions": "output_blocks.{number}.1.{layer}",
        "up.upsample": "output_blocks.{number}.{after}.conv",
        "head.norm": "out.0",
        "head.conv": "out.2",
    },
    block={
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "shortcut": "skip_connection",
    },
    attention={"norm": "norm", "query": "qkv", "key": "qkv", "value": "qkv", "out": "proj_out"},
    layouts={Kind.PROJECTION: Layout.OUT_IN_1, Kind.EMBEDDING: Layout.NO_NULL_ROW},
)
"""Query, key and value of each head in turn: all of improved-diffusion, guided-diffusion's default."""

NEW_ATTENTION_ORDER: Final = replace(NAMING, fused_per_head=False)
"""guided-diffusion with `use_new_attention_order`: all queries, keys, values. The tensors look alike."""


def foreign_resampling(names: Iterable[str]) -> str | None:
    """Name the option by which a state dict resamples in a way our network does not know, if it does.

    Args:
        names: Names of the state dict.

    Returns:
        Their option and its value; None if the network resamples by convolutions, or not at all.
    """
    names = list(names)
    if any(name.endswith(".0.op.weight") for name in names):
        return None
    numbers = {int(found[1]) for name in names if (found := re.match(r"input_blocks\.(\d+)\.", name))}
    if not numbers:
        return None
    # A pooling layer has no tensors: it leaves a gap in the numbers.
    if numbers != set(range(max(numbers) + 1)):
        return "conv_resample=False"
    middle_upsampling = any(
        re.match(r"output_blocks\.\d+\.[12]\.in_layers\.0\.weight", name) for name in names
    )
    return "resblock_updown=True" if middle_upsampling else None
