"""OpenAI's `UNetModel` (guided-diffusion) in the paper's sizes.

One head and no scale-shift normalisation, as in their own reproduction of the paper's networks (README of
improved-diffusion, LSUN bedroom), give it the paper's parameters one for one. What remains different
(padding, order of the sinusoids, eps) our network has as its `openai` profile, with which it is compared;
the cost is the same. Their half precision is float16 by hand, for GPUs: here it gets everyone's bfloat16
autocast.
"""

from dataclasses import replace

from torch import nn

from benchmarks.peers.base import Peer, Twin
from trainer.unet import Profile, UNetConfig
from trainer.weights.formats.openai import NAMING


def _build(config: UNetConfig) -> nn.Module:
    from guided_diffusion.unet import UNetModel

    if config.norm_groups != 32:
        raise ValueError(f"OpenAI's network always has 32 groups, not {config.norm_groups}")
    model: nn.Module = UNetModel(
        image_size=config.image_size,
        in_channels=config.in_channels,
        model_channels=config.base_channels,
        out_channels=config.out_channels,
        num_res_blocks=config.num_res_blocks,
        # Theirs are factors by which the image has shrunk.
        attention_resolutions=[config.image_size // height for height in config.attention_resolutions],
        dropout=config.dropout,
        channel_mult=config.channel_multipliers,
        num_heads=1,
        use_scale_shift_norm=False,
    )
    return model


def _twin(config: UNetConfig) -> UNetConfig:
    return replace(config, profile=Profile.OPENAI, num_heads=1)


OPENAI = Peer(
    name="openai",
    distribution="guided-diffusion-sdk",
    source="https://github.com/openai/guided-diffusion",
    build=_build,
    twin=Twin(config=_twin, naming=NAMING, atol=5e-5),
)
"""The paper's layers with other conventions."""
