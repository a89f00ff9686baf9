"""Names of the PyTorch port of the paper's code whose files carry the published weights.

Source: github.com/pesser/pytorch_diffusion at 304bdff, the attributes of its modules (names only).
"""

from typing import Final

from trainer.weights.formats import tensorflow
from trainer.weights.names import Kind, Layout, Naming

NAMING: Final = Naming(
    places={
        "time_embed.0": "temb.dense.0",
        "time_embed.2": "temb.dense.1",
        "stem": "conv_in",
        "down.blocks": "down.{level}.block.{index}.{layer}",
        "down.attentions": "down.{level}.attn.{index}.{layer}",
        "down.downsample": "down.{level}.downsample.conv",
        "mid.block1": "mid.block_1.{layer}",
        "mid.attention": "mid.attn_1.{layer}",
        "mid.block2": "mid.block_2.{layer}",
        "up.blocks": "up.{level}.block.{index}.{layer}",
        "up.attentions": "up.{level}.attn.{index}.{layer}",
        "up.upsample": "up.{level}.upsample.conv",
        "head.norm": "norm_out",
        "head.conv": "conv_out",
    },
    # The layers of a block are called as in the code it ports.
    block=tensorflow.NAMING.block,
    attention=tensorflow.NAMING.attention,
    layouts={Kind.PROJECTION: Layout.OUT_IN_1_1},
)
