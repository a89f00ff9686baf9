"""Arithmetic of everything that is evaluated: whole float32, whatever the device would rather do."""

from contextlib import AbstractContextManager

import torch


def full_float32() -> AbstractContextManager[None]:
    """Keep convolutions from rounding to TF32, torch's default on GPUs (not so for matrix products)."""
    manager: AbstractContextManager[None] = torch.backends.cudnn.flags(
        enabled=torch.backends.cudnn.enabled, allow_tf32=False
    )
    return manager
