"""Arithmetic of everything that is evaluated: whole float32, whatever the device would rather do."""

import torch


def forbid_tf32() -> None:
    """Keep this process's convolutions from rounding to TF32, torch's default on GPUs (not so for products).

    For the whole process and once: threads share the setting, and a process that evaluates does not train.
    """
    torch.backends.cudnn.allow_tf32 = False
