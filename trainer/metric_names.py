"""What each metric of a training row is, in a line; docs/telemetry.md says more."""

import re
from typing import Final, NamedTuple

METRICS: Final = {
    "images": "Training images applied by the optimizer.",
    "loss": "Mean weighted loss of the interval's images.",
    "loss_q0": "Mean loss of the images in the first quarter of the timesteps, those with least noise.",
    "loss_q1": "Mean loss of the images in the second quarter of the timesteps.",
    "loss_q2": "Mean loss of the images in the third quarter of the timesteps.",
    "loss_q3": "Mean loss of the images in the last quarter of the timesteps, those with most noise.",
    "learning_rate": "Learning rate of the next update.",
    "grad_norm": "Mean norm of the gradient before clipping, over the interval's applied updates.",
    "grad_norm_max": "Largest norm of the gradient before clipping among them.",
    "parameter_norm": "Norm of all weights.",
    "ema_norm": "Norm of all averaged weights.",
    "ema_distance": "Norm of averaged weights minus weights, relative to the weights' norm.",
    "skipped_updates": "Updates that were dropped since the run began.",
    "images_per_second": "Training images per second, all ranks together.",
    "step_seconds": "Wall-clock seconds per step.",
    "data_wait_share": "Part of the time that training waited for pictures.",
    "compute_seconds_max": "Own computing of the slowest rank, seconds per step.",
    "compute_seconds_median": "Own computing of the median rank, seconds per step.",
    "straggler_ratio": "Own computing of the slowest rank relative to the median rank.",
    "slowest_rank": "Number of the rank whose own computing took longest.",
    "tflops_per_second": "10^12 floating-point operations of the network per second, all ranks together.",
    "mfu": "Model FLOP/s utilization: the same relative to the peak of all devices.",
    "peak_memory_gib": "GiB that the rank which held most has held.",
    "checkpoint_stall_seconds": "Seconds that training stood still for checkpoints since the attempt began.",
    "checkpoints_given_up": "Checkpoints given up because the store failed, since the attempt began.",
    "storage_retries": "Operations on the run directory that were repeated since the attempt began.",
    "data_requests": "Successful reads of parts of shards since the attempt began.",
    "data_bytes": "Bytes that they brought.",
    "data_retries": "Reads of shards that failed and were repeated since the attempt began.",
    "data_hedges": "Reads of shards that were asked a second time for being slow since the attempt began.",
    "data_rereads": "Members read again for their checksum since the attempt began.",
    "data_substitutions": "Pictures in place of damaged ones since the attempt began.",
    "logger_errors": "Rows that a logger could not deliver since the attempt began.",
}
"""By name without the EMA profile at its end."""

_OF_A_PROFILE: Final = re.compile(r"(ema_norm|ema_distance)_(.+)")


class MetricName(NamedTuple):
    """A metric's name taken apart.

    Attributes:
        base: Name without the EMA profile.
        labels: {"ema": profile}, or nothing.
        description: One line; the words of the name where it is not in `METRICS`.
    """

    base: str
    labels: dict[str, str]
    description: str


def parse_metric_name(name: str) -> MetricName:
    """Take apart the name a row has for a metric, e.g. "ema_norm_main"."""
    match = _OF_A_PROFILE.fullmatch(name)
    base, labels = (match[1], {"ema": match[2]}) if match else (name, {})
    return MetricName(base, labels, METRICS.get(base, f"{base.replace('_', ' ')}."))
