"""What the vendor says a device can compute: the denominator of model FLOP/s utilization."""

import re
from dataclasses import dataclass
from typing import Final

import torch

from trainer.recipe_sections import Precision


@dataclass(frozen=True)
class _Peaks:
    """10^12 floating-point operations per second, products summed in float32; None: not in hardware.

    Tensor cores' rates are those of dense matrices. Where a data sheet has the rate "with sparsity" only, it
    is halved.
    """

    fp32: float
    tf32: float | None
    bf16: float | None
    fp16: float


_HOPPER_SXM: Final = _Peaks(67, 989 / 2, 1979 / 2, 1979 / 2)
_HOPPER_NVL: Final = _Peaks(60, 835 / 2, 1671 / 2, 1671 / 2)

# By the device's name as torch.cuda.get_device_name has it, without "NVIDIA" or "Tesla". Whole names only: an
# A10G is no A10, a laptop's RTX 4090 no RTX 4090. Sources: NVIDIA's data sheets of that name; of RTX cards
# the tables in the white papers "NVIDIA Ampere GA102 GPU Architecture" and "NVIDIA Ada GPU Architecture"
# (appendix A each); of the B200 "NVIDIA HGX B200"; of the H100 PCIe the data sheet before the H100 NVL's.
_PEAKS: Final = (
    (r"T4", _Peaks(8.1, None, None, 65)),
    (r"V100-SXM2-(16|32)GB", _Peaks(15.7, None, None, 125)),
    (r"V100-PCIE-(16|32)GB", _Peaks(14, None, None, 112)),
    (r"A10", _Peaks(31.2, 62.5, 125, 125)),
    (r"A100-(SXM4|PCIE)-(40|80)GB|A100 80GB PCIe", _Peaks(19.5, 156, 312, 312)),
    (r"GeForce RTX 3090", _Peaks(35.6, 35.6, 71, 71)),
    (r"GeForce RTX 4090", _Peaks(82.6, 82.6, 165.2, 165.2)),
    (r"L4", _Peaks(30.3, 120 / 2, 242 / 2, 242 / 2)),
    (r"L40S", _Peaks(91.6, 366 / 2, 733 / 2, 733 / 2)),
    (r"H100 PCIe", _Peaks(51, 756 / 2, 1513 / 2, 1513 / 2)),
    (r"H100 80GB HBM3", _HOPPER_SXM),
    (r"H100 NVL", _HOPPER_NVL),
    (r"H200", _HOPPER_SXM),
    (r"H200 NVL", _HOPPER_NVL),
    (r"B200", _Peaks(75, 2200 / 2, 4500 / 2, 4500 / 2)),
)


def peak_flops(device_name: str, precision: Precision) -> float | None:
    """Return the peak of a device by name.

    Args:
        device_name: As `torch.cuda.get_device_name` has it, e.g. "NVIDIA A100-SXM4-80GB".
        precision: What the network computes in.

    Returns:
        Floating-point operations per second; None if the device is not in the table or lacks the precision.
    """
    model = re.sub(r"^(NVIDIA |Tesla )+", "", device_name)
    for pattern, peaks in _PEAKS:
        if re.fullmatch(pattern, model):
            tera: float | None = getattr(peaks, precision.value, None)  # nobody's fp64 is in the table
            return None if tera is None else tera * 1e12
    return None


def device_peak_flops(device: torch.device, precision: Precision) -> float | None:
    """Return the peak of a device of this machine; None for CPUs, and as `peak_flops` does."""
    if device.type != "cuda":
        return None
    return peak_flops(torch.cuda.get_device_name(device), precision)
