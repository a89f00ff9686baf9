from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prdc import compute_prdc

from eval.metrics.manifold import ManifoldOptions, manifold, radii
from tests.eval.fidelity import Pictures, fidelity


def cloud(count: int, seed: int, dim: int = 8, scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(count, dim)) * scale).astype(np.float32)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(8, 60), m=st.integers(8, 60), k=st.integers(1, 6))
def test_naeems_code_agrees(seed: int, n: int, m: int, k: int) -> None:
    x, y = cloud(n, seed, scale=0.8), cloud(m, seed + 1)
    peer = compute_prdc(real_features=y.astype(float), fake_features=x.astype(float), nearest_k=k)
    found = manifold(x, y, ManifoldOptions(k=k, k_density=k))
    for name, value in peer.items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-12), name


def test_each_pair_of_numbers_has_its_own_neighbour() -> None:
    x, y = cloud(80, 1, scale=0.8), cloud(90, 2)
    found = manifold(x, y, ManifoldOptions())
    three, five = (compute_prdc(y.astype(float), x.astype(float), k) for k in (3, 5))
    assert (found.precision, found.recall) == pytest.approx((three["precision"], three["recall"]))
    assert (found.density, found.coverage) == pytest.approx((five["density"], five["coverage"]))


def test_torch_fidelity_agrees_on_the_same_pictures() -> None:
    samples, reference = Pictures(130, 1, 40.0), Pictures(150, 2, 0.0)
    peer = fidelity(samples, reference, prc=True, prc_batch_size=64)
    found = manifold(samples.pooled, reference.pooled, ManifoldOptions())
    assert 0.1 < found.recall < 0.99
    # It averages float32 zeros and ones, which rounds the share itself to float32.
    assert found.precision == pytest.approx(peer["precision"], rel=1e-6)
    assert found.recall == pytest.approx(peer["recall"], rel=1e-6)


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    x, y = cloud(75, 1, scale=0.9), cloud(64, 2)
    whole = manifold(x, y, ManifoldOptions())
    monkeypatch.setattr("eval.metrics.blocks.BLOCK", 9)
    spilled = np.memmap(tmp_path / "features", dtype=np.float32, mode="w+", shape=x.shape)
    spilled[:] = x
    assert manifold(spilled, y, ManifoldOptions()) == whole


def test_a_references_radii_serve_again() -> None:
    x, y = cloud(50, 1), cloud(60, 2)
    options = ManifoldOptions()
    known = radii(y, options)
    assert manifold(x, y, options, known) == manifold(x, y, options)
    distances = np.sort(((y[:, None].astype(float) - y[None]) ** 2).sum(axis=2), axis=1)
    np.testing.assert_allclose(known.k, distances[:, 3], rtol=1e-10)
    np.testing.assert_allclose(known.k_density, distances[:, 5], rtol=1e-10)
    with pytest.raises(AssertionError, match="another set"):
        manifold(x, y[:-1], options, known)


def test_extremes() -> None:
    y = cloud(60, 1)
    same = manifold(y, y, ManifoldOptions())
    assert (same.precision, same.recall, same.coverage) == (1.0, 1.0, 1.0)
    far = manifold(y + 100, y, ManifoldOptions())
    assert (far.precision, far.recall, far.density, far.coverage) == (0.0, 0.0, 0.0, 0.0)
    # One mode of two: precise, yet half is never drawn.
    two = np.concatenate((cloud(50, 2), cloud(50, 3) + 100))
    half = manifold(cloud(100, 4), two, ManifoldOptions())
    assert half.recall <= 0.5
    assert half.coverage <= 0.5
    assert half.precision > 0.7
