import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.moments import MomentSums, moments_of


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    offset=st.sampled_from([0.0, 1.0, 1e6]),
    seed=st.integers(0, 2**32),
)
def test_streaming_equals_numpy(sizes: list[int], offset: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    chunks = [rng.normal(offset, 1.0, (size, 5)) for size in sizes]
    sums = MomentSums(5)
    for chunk in chunks:
        sums.add(torch.from_numpy(chunk))
    found, every = sums.result(), np.concatenate(chunks)
    assert found.count == len(every)
    np.testing.assert_allclose(found.mean, every.mean(axis=0), rtol=1e-12, atol=1e-12)
    if len(every) > 1:
        # A naive sum of squares would be off by about 1e-4 at the offset 1e6.
        np.testing.assert_allclose(found.covariance, np.cov(every.T), rtol=1e-8, atol=1e-8)


def test_float32_features_are_summed_in_float64() -> None:
    features = torch.rand(100, 3, generator=torch.Generator().manual_seed(0))
    moments = moments_of(features)
    assert moments.mean.dtype == moments.scatter.dtype == torch.float64
    np.testing.assert_allclose(moments.covariance, np.cov(features.double().numpy().T), rtol=1e-12)
