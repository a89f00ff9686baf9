"""Strata are covered, proposals drawn exactly, and histograms blind to order and ranks."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

from trainer.diffusion.timesteps import LossHistogram, Proposal, stratified
from trainer.randomness import Purpose, bits, timesteps

WORDS = 2**32


def words(n: Tensor, seed: int = 0) -> Tensor:
    return bits(seed, Purpose.TIMESTEP, n, 1)[:, 0]


@given(st.integers(1, 600), st.integers(1, 1500), st.integers(0, 2**40), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_each_batch_has_one_timestep_in_every_stratum(batch: int, T: int, start: int, seed: int) -> None:
    n = torch.arange(start * batch, (start + 1) * batch)
    t = stratified(words(n, seed), n, batch, T)
    for j, value in enumerate(t.tolist()):
        assert j * T // batch <= value <= ((j + 1) * T - 1) // batch
    if batch % T == 0:
        assert t.bincount(minlength=T).tolist() == [batch // T] * T
    if T % batch == 0:
        assert (t // (T // batch)).tolist() == list(range(batch))
    # A rank that holds a part of the batch, in any order, finds the same timesteps.
    part = torch.randperm(batch, generator=torch.Generator().manual_seed(seed))[: batch // 2 + 1]
    assert torch.equal(stratified(words(n[part], seed), n[part], batch, T), t[part])


@given(st.integers(1, 2000), st.integers(1, 2000), st.data())
@settings(max_examples=100, deadline=None)
def test_stratified_timesteps_are_uniform(batch: int, T: int, data: st.DataObject) -> None:
    """Of the B 2^32 pairs of stratum and word each timestep has B 2^32 / T, but for one: so its borders."""
    boundary = data.draw(st.integers(1, T))
    first = -(-boundary * batch * WORDS // T)  # the first pair that leads to this timestep
    for pair, expected in ((first - 1, boundary - 1), (first, boundary)):
        if pair < batch * WORDS:
            n, word = torch.tensor([pair // WORDS]), torch.tensor([pair % WORDS])
            assert stratified(word, n, batch, T).tolist() == [expected]


def test_stratified_timesteps_are_uniform_in_fact() -> None:
    n = torch.arange(128 * 400)
    counts = stratified(words(n), n, 128, 50).bincount(minlength=50)
    # Far closer to even than chance: only within a stratum is there any.
    assert chisquare(counts).pvalue > 0.999
    one_stratum = stratified(words(n * 8 + 3), n * 8 + 3, 8, 40)
    assert sorted(set(one_stratum.tolist())) == list(range(15, 20))
    assert chisquare(one_stratum.bincount()[15:]).pvalue > 1e-3


def test_stratified_refuses() -> None:
    n = torch.arange(3)
    for batch, T in ((0, 10), (4, 0), (2**16, 2**15)):
        with pytest.raises(ValueError, match="their product below 2"):
            stratified(n, n, batch, T)
    with pytest.raises(ValueError, match=r"n must be int64 \[3\]"):
        stratified(n, n[:2], 4, 10)
    with pytest.raises(ValueError, match="words must be int64"):
        stratified(n.float(), n, 4, 10)
    assert stratified(n, n, 2**15, 2**15).tolist() == [0, 1, 2]


@given(st.integers(1, 3000), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_the_uniform_proposal_is_uniform_sampling(T: int, seed: int) -> None:
    n = torch.arange(64)
    proposal = Proposal.uniform(T)
    drawn = proposal.draw(words(n, seed))
    assert torch.equal(drawn, timesteps(seed, n, T))
    borders = torch.cat([proposal.cumulative - 1, proposal.cumulative[:-1]])
    assert torch.equal(proposal.draw(borders), borders * T >> 32)
    torch.testing.assert_close(proposal.weights(drawn), torch.ones(64), rtol=1e-6, atol=0)


def histogram(T: int, seed: int, samples: int = 500) -> tuple[LossHistogram, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    t = torch.randint(0, T, (samples,), generator=generator)
    losses = torch.rand(samples, generator=generator) * 3 / (1 + t)
    result = LossHistogram(T)
    result.add(t, losses)
    return result, t, losses


@given(st.integers(1, 200), st.integers(0, 2**31), st.floats(1e-4, 1.0))
@settings(max_examples=60, deadline=None)
def test_draws_follow_p_exactly(T: int, seed: int, share: float) -> None:
    """The first and the last word of each timestep lead to it, so it has just its share of all words."""
    proposal = histogram(T, seed)[0].proposal(share)
    upper = proposal.cumulative
    lower = torch.cat([torch.zeros(1, dtype=torch.int64), upper[:-1]])
    assert int(upper[-1]) == WORDS
    assert torch.equal(proposal.draw(lower), torch.arange(T))
    assert torch.equal(proposal.draw(upper - 1), torch.arange(T))


@given(st.integers(1, 200), st.integers(0, 2**31), st.floats(1e-4, 1.0))
@example(179, 0, 0.25)
@settings(max_examples=60, deadline=None)
def test_p_is_the_root_mean_square_loss(T: int, seed: int, share: float) -> None:
    seen, t, losses = histogram(T, seed)
    proposal = seen.proposal(share)
    p = np.diff(proposal.cumulative.numpy(), prepend=0) / WORDS
    # The histogram's fixed point: of a loss below 1e-4 the rounding of its square shows in the root.
    fixed = np.rint(losses.double().numpy() ** 2 * 2**32) / 2**32
    squares = np.bincount(t, weights=fixed, minlength=T)
    counts = np.bincount(t, minlength=T)
    roots = np.sqrt(squares / np.maximum(counts, 1))
    roots[counts == 0] = roots[counts > 0].mean()
    expected = (1 - share) * roots / roots.sum() + share / T
    np.testing.assert_allclose(p, expected, atol=2 / WORDS * T, rtol=1e-6)


@given(st.integers(1, 200), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_importance_weights_are_unbiased(T: int, seed: int) -> None:
    """E_p[w f] is the plain mean of f, as a sum over all timesteps and their exact probabilities."""
    proposal = histogram(T, seed)[0].proposal()
    share = torch.diff(proposal.cumulative, prepend=torch.zeros(1, dtype=torch.int64)).double() / WORDS
    f = torch.rand(T, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    weighted = (share * proposal.weights(torch.arange(T)).double() * f).sum()
    assert float(weighted) == pytest.approx(float(f.mean()), rel=1e-6)
    assert float(proposal.weights(torch.arange(T)).max()) <= 1 / 0.001 * 1.001


def test_random_draws_and_their_weighted_mean() -> None:
    proposal = histogram(20, 1)[0].proposal()
    t = proposal.draw(words(torch.arange(100_000)))
    share = np.diff(proposal.cumulative.numpy(), prepend=0) / WORDS
    assert chisquare(t.bincount(minlength=20), share * 100_000).pvalue > 1e-3
    f = torch.linspace(1, 2, 20)
    values = proposal.weights(t) * f[t]
    assert abs(float(values.mean()) - 1.5) < 4 * float(values.std()) / math.sqrt(100_000)


@given(st.integers(1, 50), st.integers(0, 2**31), st.integers(1, 8), st.data())
@settings(max_examples=60, deadline=None)
def test_order_and_ranks_change_nothing(T: int, seed: int, ranks: int, data: st.DataObject) -> None:
    whole, t, losses = histogram(T, seed)
    order = torch.randperm(500, generator=torch.Generator().manual_seed(seed + 1))
    cuts = sorted(data.draw(st.lists(st.integers(0, 500), min_size=ranks - 1, max_size=ranks - 1)))
    total = LossHistogram(T)
    for rows in torch.tensor_split(order, cuts):
        part = LossHistogram(T)
        for chunk in rows.split(37):
            part.add(t[chunk], losses[chunk])
        total.add_counts({name: tensor.clone() for name, tensor in part.tensors().items()})
    for name, tensor in whole.tensors().items():
        assert torch.equal(tensor, total.tensors()[name])
    assert torch.equal(whole.proposal().cumulative, total.proposal().cumulative)


def test_known_sums_and_table() -> None:
    """Frozen: a checkpoint resumes on them."""
    seen = LossHistogram(4)
    seen.add(torch.tensor([0, 0, 1, 3]), torch.tensor([1.0, 2.0, 0.5, 0.25]))
    assert seen.counts.tolist() == [2 << 20, 1 << 20, 0, 1 << 20]
    assert seen.squares.tolist() == [5 << 32, 1 << 30, 0, 1 << 28]
    assert seen.proposal(0.5).cumulative.tolist() == [1629299344, 2511626459, 3585368283, 4294967296]


def test_strange_losses() -> None:
    seen = LossHistogram(3)
    strange = torch.tensor([math.nan, math.inf, -math.inf, 1e30, 32.0, 1e-7])
    seen.add(torch.tensor([0, 0, 0, 1, 1, 2]), strange)
    assert seen.counts.tolist() == [0, 2 << 20, 1 << 20]
    assert seen.squares.tolist() == [0, 2 * 1024 << 32, 0]
    p = torch.diff(seen.proposal(0.001).cumulative, prepend=torch.zeros(1, dtype=torch.int64)) / WORDS
    assert p.tolist() == pytest.approx([1 / 3, 2 / 3, 1 / 3000], rel=1e-2)
    for losses in (None, torch.zeros(3)):  # nothing seen, nothing lost: both leave it uniform
        blank = LossHistogram(3)
        if losses is not None:
            blank.add(torch.arange(3), losses)
        weights = blank.proposal().weights(torch.arange(3))
        torch.testing.assert_close(weights, torch.ones(3), atol=1e-6, rtol=0)


def test_halving_keeps_the_proposal_and_makes_room_for_news() -> None:
    seen, t, losses = histogram(20, 3)
    before = seen.proposal().cumulative.clone()
    for _ in range(5):
        seen.halve()
    torch.testing.assert_close(seen.proposal().cumulative, before, rtol=1e-6, atol=0)
    seen.add(t, 10 * losses)
    fresh = LossHistogram(20)
    fresh.add(t, 10 * losses)
    ratio = seen.squares / fresh.squares
    assert bool((ratio < 1.001).all())


def test_saved_and_loaded() -> None:
    seen, _, _ = histogram(20, 4)
    proposal = seen.proposal()
    saved = {name: tensor.clone() for name, tensor in {**seen.tensors(), **proposal.tensors()}.items()}
    assert all(tensor.dtype == torch.int64 for tensor in saved.values())
    again = LossHistogram(20)
    again.add(torch.tensor([3]), torch.tensor([1.0]))
    again.load(saved)
    assert torch.equal(again.proposal().cumulative, Proposal.from_tensors(saved).cumulative)
    seen.reset()
    assert not seen.counts.any()
    assert not seen.squares.any()


def test_sums_stop_growing_before_they_overflow() -> None:
    seen, more = LossHistogram(2), LossHistogram(2)
    for histogram in (seen, more):
        histogram.counts[:] = 2**40
        histogram.squares[:] = torch.tensor([2**62, 2**52])
    seen.add_counts(more.tensors())
    assert seen.squares.tolist() == [2**63 - 1, 2**53]
    assert float(seen.proposal().weights(torch.tensor([0]))) < 1


def test_bad_input() -> None:
    seen = LossHistogram(4)
    with pytest.raises(ValueError, match=r"losses have shape \[2\], t \[1\]"):
        seen.add(torch.tensor([1]), torch.ones(2))
    with pytest.raises(ValueError, match="t must be int64"):
        seen.add(torch.tensor([1.0]), torch.ones(1))
    with pytest.raises(ValueError, match=r"histogram.counts is missing; there are x"):
        seen.load({"x": torch.zeros(4)})
    with pytest.raises(ValueError, match=r"histogram.counts must be int64 \[4\], got torch.int64 \[5\]"):
        seen.add_counts(LossHistogram(5).tensors())
    for share in (0.0, 1.1, math.nan):
        with pytest.raises(ValueError, match="uniform_share must lie in"):
            seen.proposal(share)
    seen.squares[0] = -1
    with pytest.raises(ValueError, match="have overflowed"):
        seen.proposal()
    for bad in ([WORDS - 1], [5, 5, WORDS], [0, WORDS], [7, 3, WORDS]):
        with pytest.raises(ValueError, match="increase strictly"):
            Proposal(torch.tensor(bad))
    with pytest.raises(ValueError, match=r"cumulative must be int64 \[T\]"):
        Proposal(torch.tensor([1.0]))
    with pytest.raises(ValueError, match=r"proposal\.cumulative is missing; there are no entries"):
        Proposal.from_tensors({})
    for T in (0, 2**31):
        with pytest.raises(ValueError, match="num_timesteps must lie in"):
            Proposal.uniform(T)
    with pytest.raises(ValueError, match="words must be int64"):
        Proposal.uniform(3).draw(torch.tensor([0.5]))
