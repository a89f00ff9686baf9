"""What one log interval says about training and machines.

During a step everything is only added up, on the device; nobody waits for it and no rank speaks to another.
At the end of the interval `LogWindow.row` reads the sums, and one collective brings them together.
"""

import logging
import math
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.autograd import Variable

from trainer.distributed import Ranks

log = logging.getLogger(__name__)

STRAGGLER_RATIO: Final = 1.2
"""A rank whose own computing takes so many times the median rank's is named."""
_CHUNK: Final = {"cpu": 1 << 18, "cuda": 1 << 24}
"""Numbers squared at a time: float64 copies that stay in a processor's cache; for a GPU fewer kernels."""

Mark = float | torch.cuda.Event
"""A moment on a device's clock."""


class LogWindow:
    """Sums of one log interval on one rank.

    Args:
        device: Where this rank trains.
        num_timesteps: T of the diffusion process.
        flops_per_image: Floating-point operations of one image's forward and backward pass.
        peak_flops: What one device can do per second; None if that is not known, as of CPUs.
        hosts: Name of each rank's machine, by rank.
        clock: Seconds since some moment; what a CPU's computing is timed with, too.
    """

    QUARTILES = 4

    def __init__(
        self,
        device: torch.device,
        num_timesteps: int,
        *,
        flops_per_image: int,
        peak_flops: float | None,
        hosts: Sequence[str],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._device, self._num_timesteps = device, num_timesteps
        self._flops_per_image, self._peak_flops, self._hosts = flops_per_image, peak_flops, hosts
        self._clock = clock
        self._stopwatch = _Stopwatch(device, clock)
        self._named: list[int] = []
        self._begin(clock(), 0.0)

    def add(self, losses: Tensor, t: Tensor, weights: Tensor) -> None:
        """Add the losses float32 [b] of samples, their timesteps int64 [b] and weights float32 [b]."""
        quartile = t * self.QUARTILES // self._num_timesteps
        self._sums.index_add_(0, quartile, losses.double() * weights.double())
        self._weights.index_add_(0, quartile, weights.double())
        self._images += len(losses)

    def note_update(self, grad_norm: float | None) -> None:
        """Count one step of the loop.

        Args:
            grad_norm: Norm of its gradient before clipping; None if the update was dropped.
        """
        self._steps += 1
        if grad_norm is not None:
            self._grad_norms.append(grad_norm)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Count the time spent inside as this rank's own computing; nothing in it may wait for others."""
        start = self._stopwatch.mark()
        yield
        self._stopwatch.add(start)

    def time_backward(self, loss: Tensor) -> None:
        """Count the backward pass of `loss`, which is to begin now, as this rank's own computing.

        Time is taken up to the last gradient. What DeepSpeed does then, before its `backward` returns, is
        reduce them over the ranks; there the fast ones wait for the slowest, which would make all look alike.
        """
        start = self._stopwatch.mark()

        def when_begun(_: Tensor) -> None:
            Variable._execution_engine.queue_callback(lambda: self._stopwatch.add(start))

        loss.register_hook(when_begun)  # type: ignore[no-untyped-call]

    def row(
        self,
        ranks: Ranks,
        wait_seconds: float,
        masters: Sequence[Tensor],
        flats: Mapping[str, Sequence[Tensor]],
    ) -> dict[str, float]:
        """End the interval and begin the next one; all ranks call this together.

        Args:
            ranks: The processes of the job.
            wait_seconds: How long this rank has waited for data since the attempt began.
            masters: This rank's part of the weights: 1-D tensors that overlap with no other rank's.
            flats: By EMA profile, the averages laid out as `masters`; the same profiles on every rank.

        Returns:
            Metrics by name, the same on every rank; docs/telemetry.md describes each.
        """
        now, steps = self._clock(), max(self._steps, 1)
        rest = [self._images, now - self._began, wait_seconds - self._waited]
        # Each rank fills its own column, so that a sum gathers what must not be summed.
        own = torch.zeros(2, ranks.world, dtype=torch.float64)
        own[0, ranks.rank] = self._stopwatch.take() / steps
        own[1, ranks.rank] = _peak_memory(self._device)
        parts = [
            self._sums.cpu(),
            self._weights.cpu(),
            torch.tensor(rest, dtype=torch.float64),
            own.flatten(),
            state_squares(masters, flats),
        ]
        totals = torch.split(ranks.total(torch.cat(parts)), [len(part) for part in parts])
        sums, weights, (images, seconds, waited), each, squares = (total.tolist() for total in totals)
        compute, memory = each[: ranks.world], each[ranks.world :]
        row = {"loss": sum(sums) / max(images, 1.0)}
        row |= {f"loss_q{q}": sums[q] / weights[q] for q in range(self.QUARTILES) if weights[q] > 0}
        row |= self._gradients()
        row |= _norms(squares, list(flats))
        row |= self._speed(images, max(seconds / ranks.world, 1e-9), ranks.world)
        row["data_wait_share"] = waited / max(seconds, 1e-9)
        row |= self._spread(compute, ranks)
        row["peak_memory_gib"] = max(memory) / 2**30
        self._begin(now, wait_seconds)
        return row

    def _begin(self, now: float, wait_seconds: float) -> None:
        self._sums = torch.zeros(self.QUARTILES, dtype=torch.float64, device=self._device)
        self._weights = torch.zeros(self.QUARTILES, dtype=torch.float64, device=self._device)
        self._images = self._steps = 0
        self._grad_norms: list[float] = []
        self._began, self._waited = now, wait_seconds

    def _gradients(self) -> dict[str, float]:
        if not self._grad_norms:
            return {"grad_norm": math.nan, "grad_norm_max": math.nan}
        return {"grad_norm": statistics.fmean(self._grad_norms), "grad_norm_max": max(self._grad_norms)}

    def _speed(self, images: float, seconds: float, world: int) -> dict[str, float]:
        flops = self._flops_per_image * images / seconds
        row = {
            "images_per_second": images / seconds,
            "step_seconds": seconds / max(self._steps, 1),
            "tflops_per_second": flops / 1e12,
        }
        if self._peak_flops is not None:
            row["mfu"] = flops / (world * self._peak_flops)
        return row

    def _spread(self, compute: Sequence[float], ranks: Ranks) -> dict[str, float]:
        spread = Spread.of(compute)
        if ranks.is_main and spread.stragglers != self._named:
            for rank in spread.stragglers:
                log.warning(
                    "rank %d on %s is a straggler: it computes %.3f s per step, %.2f times the median rank",
                    rank,
                    self._hosts[rank],
                    compute[rank],
                    compute[rank] / spread.median,
                )
        self._named = spread.stragglers
        return {
            "compute_seconds_max": spread.longest,
            "compute_seconds_median": spread.median,
            "straggler_ratio": spread.longest / spread.median if spread.median > 0 else math.nan,
            "slowest_rank": float(spread.slowest),
        }


@dataclass(frozen=True)
class Spread:
    """How far apart the ranks' own computing lies.

    Attributes:
        slowest: The rank that computes longest.
        longest: Its seconds per step.
        median: Those of the median rank; of an even number the faster of the two, so that of two ranks one is
            measured against the other and not against a mean it is part of.
        stragglers: Ranks beyond `STRAGGLER_RATIO` times the median.
    """

    slowest: int
    longest: float
    median: float
    stragglers: list[int]

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Spread":
        """Describe the seconds per step of each rank."""
        median, longest = statistics.median_low(seconds), max(seconds)
        stragglers = [rank for rank, own in enumerate(seconds) if own > STRAGGLER_RATIO * median > 0]
        return cls(seconds.index(longest), longest, median, stragglers)


class _Stopwatch:
    """Adds up time between marks on a device's own clock; a GPU's is read only when the sum is asked for."""

    def __init__(self, device: torch.device, clock: Callable[[], float]) -> None:
        self._on_gpu, self._clock = device.type == "cuda", clock
        self._spans: list[tuple[Mark, Mark]] = []

    def mark(self) -> Mark:
        """Return the present moment."""
        if not self._on_gpu:
            return self._clock()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def add(self, start: Mark) -> None:
        """Add the time since `start`."""
        self._spans.append((start, self.mark()))

    def take(self) -> float:
        """Return the sum in seconds and start from zero; waits until a GPU has got so far."""
        spans, self._spans = self._spans, []
        return math.fsum(_seconds(start, stop) for start, stop in spans)


def _seconds(start: Mark, stop: Mark) -> float:
    if isinstance(start, torch.cuda.Event):
        assert isinstance(stop, torch.cuda.Event)
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1e3
    assert not isinstance(stop, torch.cuda.Event)
    return stop - start


def _peak_memory(device: torch.device) -> float:
    """Most bytes this process has held: of the GPU's memory in tensors, else of the host's altogether."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0  # Linux counts in KiB


@torch.no_grad()
def state_squares(masters: Sequence[Tensor], flats: Mapping[str, Sequence[Tensor]]) -> Tensor:
    """Sums of squares from which norms follow once they are added up over the ranks.

    Args:
        masters: 1-D tensors of weights.
        flats: By EMA profile, averages laid out as `masters`.

    Returns:
        float64 [1 + 2 * profiles] on the CPU: of the weights; of each average, and of its difference from
        them.
    """
    device = masters[0].device if masters else torch.device("cpu")
    sums = torch.zeros(1 + 2 * len(flats), dtype=torch.float64, device=device)
    size = _CHUNK[device.type]
    for span, master in enumerate(masters):
        for start in range(0, len(master), size):
            piece = slice(start, start + size)
            weights = master[piece].double()
            sums[0] += weights.dot(weights)
            for profile, averages in enumerate(flats.values()):
                average = averages[span][piece].double()
                sums[1 + 2 * profile] += average.dot(average)
                distance = average - weights
                sums[2 + 2 * profile] += distance.dot(distance)
    return sums.cpu()


def _norms(squares: Sequence[float], profiles: Sequence[str]) -> dict[str, float]:
    parameter_norm = math.sqrt(squares[0])
    row = {"parameter_norm": parameter_norm}
    for profile, average, difference in zip(profiles, squares[1::2], squares[2::2], strict=True):
        row[f"ema_norm_{profile}"] = math.sqrt(average)
        distance = math.sqrt(difference)
        row[f"ema_distance_{profile}"] = distance / parameter_norm if parameter_norm > 0 else math.nan
    return row
