"""The optimizer and the averages over 20 updates, against a plain torch loop and TensorFlow's Adam in numpy.

"Ours" is what a rank does: rate, epsilon and decay from the image clock, torch's Adam with both set before
every step, the averaged gradient clipped by its global norm, averages over this rank's partitions.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.clock import adam_epsilon, ema_decay, learning_rate
from trainer.ema import PartitionedEma
from trainer.power_ema import exponent_of
from trainer.recipe_sections import EmaProfile, EmaWarmup, EpsilonForm, OptimizerSection

Vector = NDArray[np.float64]
BATCH, UPDATES, WARMUP, RATE, CLIP, DECAY = 64, 20, 10, 2e-3, 1.0, 0.9
PROFILES = {"flat": EmaProfile(decay=DECAY, per_images=BATCH)}


@dataclass(frozen=True)
class Toy:
    """Least squares with targets that move: gradients above and below the clipping norm."""

    start: Vector
    matrix: Vector
    targets: list[Vector]

    @classmethod
    def make(cls) -> "Toy":
        rng = np.random.default_rng(0)
        scales = np.geomspace(0.05, 5, UPDATES)
        return cls(
            rng.normal(size=7) * 0.1,
            rng.normal(size=(5, 7)),
            [rng.normal(size=5) * scale for scale in rng.permutation(scales)],
        )

    def gradient(self, w: Vector, step: int) -> Vector:
        return np.asarray(self.matrix.T @ (self.matrix @ w - self.targets[step]))

    def loss(self, w: Tensor, step: int) -> Tensor:
        matrix, target = (torch.as_tensor(x, dtype=w.dtype) for x in (self.matrix, self.targets[step]))
        return (matrix @ w - target).square().sum() / 2


@dataclass
class History:
    """Weights and average after every update, float64, and the norms before clipping."""

    weights: list[Vector] = field(default_factory=list)
    averages: list[Vector] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)


def section(form: EpsilonForm, eps: float) -> OptimizerSection:
    return OptimizerSection(
        learning_rate=RATE, eps=eps, epsilon_form=form, warmup_images=WARMUP * BATCH, clip_norm=CLIP
    )


def ours(toy: Toy, recipe: OptimizerSection, dtype: torch.dtype) -> History:
    w = torch.tensor(toy.start, dtype=dtype, requires_grad=True)
    adam = torch.optim.Adam([w], lr=recipe.learning_rate, betas=recipe.betas, eps=recipe.eps, fused=True)
    # Two ranks' partitions: views of the weights.
    ranks = [PartitionedEma(PROFILES, [part]) for part in (w.detach()[:4], w.detach()[4:])]
    found = History()
    for updates in range(UPDATES):
        images = updates * BATCH
        (w.grad,) = torch.autograd.grad(toy.loss(w, updates), [w])
        found.norms.append(float(w.grad.norm()))
        w.grad /= max(1.0, (found.norms[-1] + 1e-6) / recipe.clip_norm)
        for group in adam.param_groups:
            group["lr"], group["eps"] = learning_rate(recipe, images), adam_epsilon(recipe, updates)
        adam.step()
        for rank in ranks:
            rank.update(images, BATCH)
        found.weights.append(w.detach().double().numpy().copy())
        found.averages.append(torch.cat([rank.flats["flat"][0] for rank in ranks]).double().numpy())
    return found


def plain_torch(toy: Toy, eps: float, dtype: torch.dtype) -> History:
    """The loop everybody writes, counting steps."""
    w = torch.nn.Parameter(torch.tensor(toy.start, dtype=dtype))
    adam = torch.optim.Adam([w], lr=1.0, eps=eps, foreach=False, fused=False)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: RATE * min(step / WARMUP, 1.0))
    average = w.detach().clone()
    found = History()
    for step in range(UPDATES):
        adam.zero_grad()
        toy.loss(w, step).backward()  # type: ignore[no-untyped-call]
        found.norms.append(float(torch.nn.utils.clip_grad_norm_([w], CLIP)))
        adam.step()
        schedule.step()
        decay = 0.0 if step == 0 else DECAY
        average = decay * average + (1 - decay) * w.detach()
        found.weights.append(w.detach().double().numpy().copy())
        found.averages.append(average.double().numpy())
    return found


def tensorflow(toy: Toy, eps: float) -> History:
    """tf.clip_by_global_norm, tf.train.AdamOptimizer ("epsilon hat") and the average, from their notes."""
    w, m, v = toy.start.copy(), np.zeros(7), np.zeros(7)
    average = w.copy()
    found = History()
    for step in range(UPDATES):
        g = toy.gradient(w, step)
        found.norms.append(float(np.sqrt((g**2).sum())))
        g = g * CLIP / max(found.norms[-1], CLIP)
        t = step + 1
        rate = RATE * min(step / WARMUP, 1.0) * np.sqrt(1 - 0.999**t) / (1 - 0.9**t)
        m += (g - m) * (1 - 0.9)
        v += (g**2 - v) * (1 - 0.999)
        w = w - rate * m / (np.sqrt(v) + eps)
        average -= (1 - (DECAY if step else 0.0)) * (average - w)
        found.weights.append(w.copy())
        found.averages.append(average.copy())
    return found


def assert_equal_histories(found: History, wanted: History) -> None:
    moved = np.abs(wanted.weights[-1] - wanted.weights[0]).max()
    assert moved > 1e-3, "the toy must move far more than the tolerance"
    assert any(norm > CLIP for norm in wanted.norms)
    assert any(norm < CLIP for norm in wanted.norms)
    for step in range(UPDATES):
        assert found.weights[step] == pytest.approx(wanted.weights[step], rel=0, abs=1e-7)
        assert found.averages[step] == pytest.approx(wanted.averages[step], rel=0, abs=1e-7)


@pytest.mark.parametrize("eps", [1e-8, 1e-2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_plain_torch_loop(eps: float, dtype: torch.dtype) -> None:
    toy = Toy.make()
    assert_equal_histories(ours(toy, section(EpsilonForm.TORCH, eps), dtype), plain_torch(toy, eps, dtype))


@pytest.mark.parametrize("eps", [1e-8, 1e-2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tensorflows_adam(eps: float, dtype: torch.dtype) -> None:
    toy = Toy.make()
    assert_equal_histories(ours(toy, section(EpsilonForm.TENSORFLOW, eps), dtype), tensorflow(toy, eps))


def test_the_two_epsilons_are_not_the_same() -> None:
    toy = Toy.make()
    theirs, torchs = tensorflow(toy, 1e-2), plain_torch(toy, 1e-2, torch.float64)
    assert np.abs(theirs.weights[-1] - torchs.weights[-1]).max() > 1e-4


def test_the_first_update_has_rate_zero_and_copies() -> None:
    toy = Toy.make()
    found = ours(toy, section(EpsilonForm.TENSORFLOW, 1e-8), torch.float64)
    assert (found.weights[0] == toy.start).all()
    assert (found.averages[0] == found.weights[0]).all()
    assert not (found.averages[1] == found.weights[1]).all()


N = 20
FLAT = EmaProfile(decay=0.99, per_images=128)
HARMONIC = sum(1 / n for n in range(2, N + 2))
CONSTANT = {
    "decay": (FLAT, 0.99 ** (N / 2)),
    "half-life": (EmaProfile(half_life_images=200), 0.5 ** (N * BATCH / 200)),
    # The half-life after update n is half of the n batches seen.
    "share": (EmaProfile(half_life_images=1e9, half_life_share=0.5), 0.5 ** (2 * HARMONIC)),
    "tensorflow": (
        EmaProfile(decay=0.9999, per_images=BATCH, warmup=EmaWarmup.TENSORFLOW),
        math.factorial(N + 1) * math.factorial(10) / math.factorial(N + 10),
    ),
    "power": (EmaProfile(std=0.2), (1 / (N + 1)) ** (exponent_of(0.2) + 1)),
}


@pytest.mark.parametrize("name", CONSTANT)
def test_a_constant_target_has_a_closed_form(name: str) -> None:
    """N updates from the second on: what is left of the difference is the product of the decays."""
    profile, left = CONSTANT[name]
    master = torch.tensor([3.0, -1.0], dtype=torch.float64)
    ema = PartitionedEma({name: profile}, [master])
    start = master.clone()
    master.copy_(torch.tensor([1.0, 5.0]))
    for update in range(1, N + 1):
        ema.update(update * BATCH, BATCH)
    (found,) = ema.flats[name]
    assert found.numpy() == pytest.approx((master + (start - master) * left).numpy(), rel=0, abs=1e-7)
    assert not torch.equal(found, master)


@pytest.mark.parametrize("name", CONSTANT)
def test_every_form_copies_at_the_first_update(name: str) -> None:
    assert ema_decay(CONSTANT[name][0], 0, BATCH) == 0.0
