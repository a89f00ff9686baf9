"""lucidrains' `Unet` (denoising-diffusion-pytorch): another architecture, beside which no bar is set.

Width, multipliers and dropout are the paper's; everything else is its README's example: fused attention,
linear attention at all levels but the innermost. It has fewer parameters than the paper's network and its
answer cannot be compared with ours; its time is given so that readers can place it.
"""

from torch import nn

from benchmarks.peers.base import Peer
from trainer.unet import UNetConfig


def _build(config: UNetConfig) -> nn.Module:
    from denoising_diffusion_pytorch import Unet

    model: nn.Module = Unet(
        dim=config.base_channels,
        dim_mults=config.channel_multipliers,
        channels=config.in_channels,
        dropout=config.dropout,
        flash_attn=True,
    )
    return model


LUCIDRAINS = Peer(
    name="lucidrains",
    distribution="denoising-diffusion-pytorch",
    source="https://github.com/lucidrains/denoising-diffusion-pytorch",
    build=_build,
    # It chooses its attention kernel in a context manager that the compiler cannot carry through.
    fullgraph=False,
)
"""Not the paper's layers."""
