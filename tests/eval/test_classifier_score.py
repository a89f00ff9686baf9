import numpy as np
import pytest
import torch

from eval.metrics.classifier_score import ClassifierScore, splits_for
from tests.eval.fidelity import CLASSES, Pictures, fidelity


def probabilities(count: int, classes: int) -> np.ndarray:
    logits = np.random.default_rng(0).normal(0, 2, (count, classes))
    weights = np.exp(logits)
    return weights / weights.sum(axis=1, keepdims=True)


def textbook(p: np.ndarray, splits: int) -> tuple[float, float]:
    """exp of the mean KL divergence of each picture's p(y|x) from its part's p(y)."""
    scores = []
    for k in range(splits):
        part = p[k * len(p) // splits : (k + 1) * len(p) // splits]
        divergences = [sum(row * np.log(row / part.mean(axis=0))) for row in part]
        scores.append(np.exp(np.mean(divergences)))
    return float(np.mean(scores)), float(np.std(scores))


@pytest.mark.parametrize("splits", [1, 3, 10])
@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_streamed_equals_the_definition(splits: int, chunk: int) -> None:
    p = probabilities(107, 6)
    score = ClassifierScore(len(p), 6, splits)
    for start in range(0, len(p), chunk):
        score.add(torch.from_numpy(p[start : start + chunk]))
    mean, sd = textbook(p, splits)
    found = score.result()
    assert found.mean == pytest.approx(mean, rel=1e-12)
    assert found.sd == pytest.approx(sd, rel=1e-9, abs=1e-12)
    assert found.splits == splits


def test_bounds() -> None:
    sure = ClassifierScore(20, 10, 1)
    sure.add(torch.eye(10).repeat(2, 1))
    assert sure.result().mean == pytest.approx(10.0)
    unsure = ClassifierScore(20, 10, 2)
    unsure.add(torch.full((20, 10), 0.1))
    assert unsure.result().mean == pytest.approx(1.0)


def test_splits_are_openais_only_if_each_holds_enough() -> None:
    assert [splits_for(n) for n in (2, 256, 4999, 5000, 50_000)] == [1, 1, 1, 10, 10]


def test_pictures_must_all_be_there() -> None:
    score = ClassifierScore(3, 2, 1)
    score.add(torch.full((2, 2), 0.5))
    with pytest.raises(AssertionError, match="2 of 3"):
        score.result()
    with pytest.raises(AssertionError, match="more pictures"):
        score.add(torch.full((2, 2), 0.5))


@pytest.mark.parametrize(("count", "splits"), [(120, 10), (120, 1), (113, 10)])
def test_torch_fidelity_agrees_on_the_same_pictures(count: int, splits: int) -> None:
    # Its shuffle is off: with it, picture i would stand in another part.
    pictures = Pictures(count, 1, 0.0)
    peer = fidelity(pictures, pictures, isc=True, isc_splits=splits)
    score = ClassifierScore(count, CLASSES, splits)
    score.add(pictures.probabilities)
    found = score.result()
    assert found.mean == pytest.approx(peer["inception_score_mean"], rel=1e-9)
    assert found.sd == pytest.approx(peer["inception_score_std"], rel=1e-9, abs=1e-12)
