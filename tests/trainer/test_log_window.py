"""A log interval in closed form, norms of divided state, and two real ranks of which one is slow."""

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trainer import log_window
from trainer.distributed import Environment, Ranks
from trainer.log_window import STRAGGLER_RATIO, LogWindow, Spread, state_squares
from trainer.metric_names import METRICS, parse_metric_name
from trainer.peak_flops import device_peak_flops, peak_flops
from trainer.recipe_sections import Precision

CPU = torch.device("cpu")


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Work(torch.autograd.Function):
    """Takes two seconds forward and five backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, clock: Clock) -> Tensor:
        ctx.clock = clock
        clock.now += 2
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        ctx.clock.now += 5
        return grad * 2, None


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Ranks(Environment(0, 1, 0))
    dist.destroy_process_group()


def make_window(clock: Clock, peak: float | None = None, device: torch.device = CPU) -> LogWindow:
    return LogWindow(device, 1000, flops_per_image=7 * 10**9, peak_flops=peak, hosts=["a"], clock=clock)


def test_an_interval_in_closed_form(ranks: Ranks) -> None:
    clock = Clock()
    window = make_window(clock, peak=1e12)
    t = torch.tensor([0, 249, 250, 999, 999])
    losses, weights = torch.tensor([1.0, 3.0, 5.0, 7.0, 9.0]), torch.tensor([1.0, 3.0, 1.0, 0.5, 0.5])
    window.add(losses[:2], t[:2], weights[:2])
    window.note_update(2.0)
    window.add(losses[2:], t[2:], weights[2:])
    window.note_update(6.0)
    window.note_update(None)
    clock.now += 10
    row = window.row(ranks, 4.0, [torch.tensor([3.0, 4.0])], {"x.y": [torch.tensor([3.0, 0.0])]})
    assert row["loss"] == pytest.approx((1 + 9 + 5 + 3.5 + 4.5) / 5)
    assert (row["loss_q0"], row["loss_q1"], row["loss_q3"]) == pytest.approx((10 / 4, 5.0, 8.0))
    assert "loss_q2" not in row, "no image had such a timestep"
    assert (row["grad_norm"], row["grad_norm_max"]) == (4.0, 6.0)
    assert (row["images_per_second"], row["data_wait_share"]) == pytest.approx((0.5, 0.4))
    assert row["step_seconds"] == pytest.approx(10 / 3), "a dropped update takes its time as well"
    assert (row["tflops_per_second"], row["mfu"]) == pytest.approx((3.5e-3, 3.5e-3))
    assert (row["parameter_norm"], row["ema_norm_x.y"], row["ema_distance_x.y"]) == (5.0, 3.0, 0.8)
    assert 0.05 < row["peak_memory_gib"] < 1000

    clock.now += 1
    window.add(torch.tensor([2.0]), torch.tensor([500]), torch.tensor([1.0]))
    window.note_update(1.0)
    clock.now += 1
    row = window.row(ranks, 5.0, [torch.zeros(1)], {"x.y": [torch.ones(1)]})
    assert (row["loss"], row["loss_q2"], row["grad_norm_max"]) == (2.0, 2.0, 1.0)
    assert (row["images_per_second"], row["step_seconds"], row["data_wait_share"]) == (0.5, 2.0, 0.5)
    assert math.isnan(row["ema_distance_x.y"])
    assert {parse_metric_name(name).base for name in row} <= METRICS.keys()


def test_an_interval_of_nothing_and_an_unknown_peak(ranks: Ranks) -> None:
    row = make_window(Clock()).row(ranks, 0.0, [], {"main": []})
    assert (row["loss"], row["images_per_second"], row["data_wait_share"]) == (0.0, 0.0, 0.0)
    assert row["parameter_norm"] == row["ema_norm_main"] == 0.0
    assert math.isnan(row["grad_norm"])
    assert math.isnan(row["straggler_ratio"])
    assert "mfu" not in row


def test_steps_read_nothing_from_the_device() -> None:
    """Tensors of the meta device have no numbers: whatever asks the host for one fails."""
    window = make_window(Clock(), device=torch.device("meta"))
    batch = torch.empty(8, device="meta")
    with pytest.raises((RuntimeError, NotImplementedError)):
        float(batch.sum())
    with window.computing():
        window.add(batch, torch.empty(8, dtype=torch.int64, device="meta"), batch)
    window.note_update(1.0)


def test_own_computing_ends_with_the_last_gradient(ranks: Ranks) -> None:
    clock = Clock()
    window = make_window(clock)
    for _ in range(4):
        x = torch.ones(3, requires_grad=True)
        clock.now += 1000  # data
        with window.computing():
            loss = Work.apply(x, clock).sum()
        clock.now += 1000
        window.time_backward(loss)
        (loss * 8).backward()  # type: ignore[no-untyped-call]
        clock.now += 1000  # the reduction over ranks
        assert x.grad is not None
        assert x.grad.tolist() == [16.0] * 3, "being timed changes no gradient"
        window.note_update(1.0)
    row = window.row(ranks, 0.0, [], {})
    assert (row["compute_seconds_max"], row["compute_seconds_median"]) == (7.0, 7.0)
    assert (row["straggler_ratio"], row["slowest_rank"], row["step_seconds"]) == (1.0, 0.0, 3007.0)
    with pytest.raises(ZeroDivisionError), window.computing():
        clock.now += 1 / 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chunk", [3, 1 << 18])
def test_norms_of_divided_state(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, chunk: int) -> None:
    monkeypatch.setattr(log_window, "_CHUNK", {"cpu": chunk})
    generator = torch.Generator().manual_seed(0)
    weights, one, two = (torch.randn(20, generator=generator, dtype=dtype) for _ in range(3))
    originals = weights.clone(), one.clone(), two.clone()
    parts = []
    for a, b, c in ((0, 7, 11), (11, 11, 20)):
        w, x, y = ([tensor[a:b], tensor[b:c]] for tensor in (weights, one, two))
        parts.append(state_squares(w, {"one": x, "two": y}))
    exact = weights.double(), one.double(), one.double() - weights, two.double(), two.double() - weights
    expected = torch.stack([(tensor**2).sum() for tensor in exact])
    torch.testing.assert_close(sum(parts), expected, rtol=1e-14, atol=0)
    for tensor, original in zip((weights, one, two), originals, strict=True):
        assert torch.equal(tensor, original), "measuring must change nothing"


@pytest.mark.parametrize(
    ("seconds", "median", "slowest", "stragglers"),
    [
        ([1.0], 1.0, 0, []),
        ([1.0, 1.3], 1.0, 1, [1]),
        ([1.0, 1.19], 1.0, 1, []),
        ([5.0, 1.0, 1.1, 1.0, 2.0], 1.1, 0, [0, 4]),
        ([0.0, 0.0], 0.0, 0, []),
    ],
)
def test_spread(seconds: list[float], median: float, slowest: int, stragglers: list[int]) -> None:
    assert Spread.of(seconds) == Spread(slowest, max(seconds), median, stragglers)


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=40), st.floats(1e-2, 1e2))
def test_spread_has_no_unit_and_at_most_half_of_the_ranks_straggle(seconds: list[float], unit: float) -> None:
    spread = Spread.of(seconds)
    assert len(spread.stragglers) <= len(seconds) // 2
    assert bool(spread.stragglers) == (spread.longest > STRAGGLER_RATIO * spread.median)
    assert spread.slowest in spread.stragglers or not spread.stragglers
    scaled = Spread.of([unit * own for own in seconds])
    assert scaled.longest / scaled.median == pytest.approx(spread.longest / spread.median)


def test_two_ranks_agree_and_the_slow_one_is_named(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(rank_of_two, (str(tmp_path),), nprocs=2)
    (first, log), (second, silence) = (torch.load(tmp_path / f"rank-{rank}") for rank in (0, 1))
    assert first == second
    assert silence == []
    row, later = first
    assert (row["compute_seconds_max"], row["compute_seconds_median"]) == (3.0, 2.0)
    assert (row["slowest_rank"], row["straggler_ratio"]) == (1.0, 1.5)
    assert (row["images_per_second"], row["step_seconds"], row["data_wait_share"]) == (1.0, 4.0, 0.25)
    assert (row["tflops_per_second"], row["mfu"]) == pytest.approx((7e-3, 7e-3 / 2))
    assert (row["loss"], row["loss_q0"], row["loss_q3"]) == pytest.approx((2.25, 7 / 3, 2.0))
    assert row["parameter_norm"] == 13.0
    assert (row["ema_norm_main"], row["ema_distance_main"]) == (5.0, 12 / 13)
    assert later["straggler_ratio"] == 1.0
    expected = "rank 1 on node-b is a straggler: it computes 3.000 s per step, 1.50 times the median rank"
    assert log == [expected, expected], "said when it begins, not at every row; and again when it comes back"


def rank_of_two(rank: int, folder: str) -> None:
    """Four intervals of one rank: slow, slow, as fast as the other, slow again."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("trainer.log_window").addHandler(handler)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    ranks, clock = Ranks(Environment(rank, 2, rank)), Clock()
    window = LogWindow(
        CPU, 1000, flops_per_image=7 * 10**9, peak_flops=1e12, hosts=["node-a", "node-b"], clock=clock
    )
    rows = []
    for interval in range(4):
        with window.computing():
            clock.now += 3 if rank == 1 and interval != 2 else 2
        t = torch.tensor([[0, 0], [0, 999]][rank])
        window.add(torch.tensor([2.0, 3.0 if rank == 0 else 2.0]), t, torch.tensor([1.0, 1.0]))
        window.note_update(1.0)
        clock.now = 104.0 + 4 * interval  # the faster one waits for the other
        wait = float(2 * (interval + 1) * rank)
        master, average = ([3.0, 4.0], [3.0, 4.0]) if rank == 0 else ([12.0], [0.0])
        rows.append(
            window.row(ranks, wait, [torch.tensor(master)], {"main": [torch.tensor(average)]})
            | {"peak_memory_gib": 0.0}
        )
    torch.save(([rows[0], rows[2]], said), Path(folder) / f"rank-{rank}")
    dist.destroy_process_group()


def test_peaks_by_name() -> None:
    """Values of NVIDIA's data sheets; what is sparse there is halved."""
    assert peak_flops("NVIDIA A100-SXM4-80GB", Precision.BF16) == 312e12
    assert peak_flops("NVIDIA A100 80GB PCIe", Precision.TF32) == 156e12
    assert peak_flops("NVIDIA H100 80GB HBM3", Precision.BF16) == 989.5e12
    assert peak_flops("NVIDIA H100 PCIe", Precision.BF16) == 756.5e12
    assert peak_flops("Tesla V100-SXM2-32GB", Precision.FP16) == 125e12
    assert peak_flops("NVIDIA L40S", Precision.FP32) == 91.6e12
    assert peak_flops("NVIDIA GeForce RTX 4090", Precision.BF16) == 165.2e12
    assert peak_flops("NVIDIA H200 NVL", Precision.BF16) == 835.5e12
    for name in ("NVIDIA A10G", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 3090 Ti", ""):
        assert peak_flops(name, Precision.FP32) is None
    assert peak_flops("Tesla V100-SXM2-32GB", Precision.BF16) is None, "its tensor cores know float16 only"
    assert peak_flops("NVIDIA A100-SXM4-80GB", Precision.FP64) is None
    assert device_peak_flops(CPU, Precision.FP32) is None
