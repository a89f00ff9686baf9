"""Hugging Face diffusers' `UNet2DModel`, set to the paper's network.

Its guide to speed (source below) names bfloat16, attention by `scaled_dot_product_attention` (its default),
weights in channels_last, `torch.compile` with fullgraph, and answers as tuples. Both memory formats are
measured, because on a processor channels_last need not be the faster one; bars take the better. Its
compiler mode "max-autotune" means CUDA graphs, which do not exist here.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks.harness import Layout
from benchmarks.peers.base import Peer, Twin
from trainer.unet import UNetConfig
from trainer.weights.formats.diffusers import NAMING


class DiffusersNetwork(nn.Module):
    """`UNet2DModel` with the calling convention of all contenders.

    Args:
        config: Of our network.

    Attributes:
        unet: The model itself.
    """

    def __init__(self, config: UNetConfig) -> None:
        from diffusers import UNet2DModel

        super().__init__()
        attends = [resolution in config.attention_resolutions for resolution in config.resolutions]
        self.unet = UNet2DModel(
            sample_size=config.image_size,
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            layers_per_block=config.num_res_blocks,
            block_out_channels=config.widths,
            down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
            up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
            norm_num_groups=config.norm_groups,
            dropout=config.dropout,
            # What makes it the paper's: see the published google/ddpm-cifar10-32.
            downsample_padding=0,
            flip_sin_to_cos=False,
            freq_shift=1,
            norm_eps=1e-6,
            attention_head_dim=None,
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Maps x [B, C, H, W] and t [B] to a prediction like x."""
        return cast(Tensor, self.unet(x, t, return_dict=False)[0])


def _scheduler() -> Any:
    """DDIM over the paper's schedule; all else is the default of `DDIMScheduler`."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")


def ddim_loop(denoise: Callable[[Tensor, Tensor], Tensor], x_T: Tensor, steps: int) -> Tensor:
    """Sample with diffusers' `DDIMScheduler`, as its guide writes the loop.

    Args:
        denoise: (x_t [B, C, H, W], t int64 [B]) -> predicted noise, float32.
        x_T: float32 standard normal.
        steps: Calls of the network.

    Returns:
        The images, like x_T.
    """
    scheduler = _scheduler()
    scheduler.set_timesteps(steps)
    x = x_T
    with torch.inference_mode():
        for t in scheduler.timesteps:
            eps = denoise(x, t.expand(len(x)))
            # The noise that belongs to the clipped estimate, as in our sampler.
            x = scheduler.step(eps, t, x, eta=0.0, use_clipped_model_output=True).prev_sample
    return x


def shipped_pipeline(network: DiffusersNetwork) -> Callable[..., Tensor]:
    """`DDIMPipeline` as the documentation runs it: float32, eager, nothing tuned.

    Args:
        network: With the weights it shall have.

    Returns:
        (batch, seed, steps, further arguments of the pipeline) -> images [B, C, H, W] in [-1, 1].
    """
    from diffusers import DDIMPipeline

    pipeline = DDIMPipeline(unet=network.unet, scheduler=_scheduler())
    pipeline.set_progress_bar_config(disable=True)

    def sample(batch: int, seed: int, steps: int, **more: Any) -> Tensor:
        # As tensors: neither side pays for making files of them.
        output = pipeline(
            batch_size=batch,
            generator=torch.Generator().manual_seed(seed),
            num_inference_steps=steps,
            output_type="pt",
            **more,
        )
        return cast(Tensor, output.images) * 2 - 1

    return sample


DIFFUSERS = Peer(
    name="diffusers",
    distribution="diffusers",
    source="https://huggingface.co/docs/diffusers/optimization/fp16",
    build=DiffusersNetwork,
    twin=Twin(config=lambda config: config, naming=NAMING, atol=5e-5, prefix="unet."),
    layouts=(Layout.CONTIGUOUS, Layout.CHANNELS_LAST),
)
"""Another implementation of the same function."""
