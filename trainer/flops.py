"""How much arithmetic the network is: counted from the operations it really runs, on shapes alone.

A multiplication with its addition counts as two operations. Counted are convolutions, products of matrices
and attention, all together far beyond everything else in the network. Nothing is computed: the network is
run on torch's meta device, where tensors have shapes and no numbers.
"""

import dataclasses
import functools

import torch
from torch.utils.flop_counter import FlopCounterMode

from trainer.unet import UNet
from trainer.unet_config import UNetConfig


@functools.cache
def flops_per_image(config: UNetConfig) -> int:
    """Return the floating-point operations of one image's forward pass."""
    with torch.no_grad():
        return _count(config, backward=False)


@functools.cache
def training_flops_per_image(config: UNetConfig) -> int:
    """Return the operations of one image's forward and backward pass; the optimizer's are not among them.

    Recomputing activations does not count (`executed_flops_per_image` counts it): this is the numerator of
    model FLOP/s utilization, which a slower way of training the same network must not raise.
    """
    return executed_flops_per_image(dataclasses.replace(config, checkpoint_activations=False))


@functools.cache
def executed_flops_per_image(config: UNetConfig) -> int:
    """Return the operations that training with one image takes, those of recomputed activations included."""
    return _count(config, backward=True)


def _count(config: UNetConfig, *, backward: bool) -> int:
    with torch.device("meta"):
        network = UNet(config)
        images = torch.empty(1, config.in_channels, config.image_size, config.image_size)
        t = torch.zeros(1, dtype=torch.int64)
        labels = None if config.num_classes is None else torch.zeros(1, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        output = network(images, t, labels)
        if backward:
            output.sum().backward()
    return int(counter.get_total_flops())
