"""Known answers of Random123 and of our own format, independence of the batch, and plain statistics."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer import randomness
from trainer.randomness import Purpose, bits, flips, normal, philox4x32_10, timesteps

SEEDS = st.integers(0, 2**64 - 1)
# The float32 patterns of three normals of four samples.
KNOWN_NORMALS = [
    [-1118108682, 1058608111, 1057613700],
    [1057062635, -1080578549, 1065071387],
    [1054147169, -1085865716, 1059127258],
    [1041661983, 1051169359, 1060371601],
]
KNOWN_TIMESTEPS = [512, 24, 590, 396, 187, 81, 805, 128]
KNOWN_FLIPS = [1, 0, 1, 1, 1, 1, 1, 0, 0, 1, 1, 0, 1, 1, 1, 0]


def philox_one(counter: tuple[int, ...], key: tuple[int, int]) -> list[int]:
    """The generator in Python's unbounded integers, written from the paper's definition."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 % 2**32, (p0 >> 32) ^ c3 ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


def words(counter: tuple[int, ...], key: tuple[int, int]) -> list[int]:
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    return [int(word) for word in philox4x32_10((c0, c1, c2, c3), key)]


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
    ids=["zero", "ones", "pi"],
)
def test_random123_known_answers(counter: str, key: str, answer: str) -> None:
    k0, k1 = (int(word, 16) for word in key.split())
    got = words(tuple(int(word, 16) for word in counter.split()), (k0, k1))
    assert [f"{word:08x}" for word in got] == answer.split()


@given(st.tuples(*[st.integers(0, 2**32 - 1)] * 4), st.tuples(*[st.integers(0, 2**32 - 1)] * 2))
@settings(max_examples=60, deadline=None)
def test_equals_unbounded_integers(counter: tuple[int, ...], key: tuple[int, int]) -> None:
    assert words(counter, key) == philox_one(counter, key)


def test_counter_and_key_layout() -> None:
    seed, n = 0x0123456789ABCDEF, 0x7EDCBA9876543210
    got = bits(seed, Purpose.CODEC, torch.tensor([n]), words=6, draw=3)
    key = (0x89ABCDEF, 0x01234567)
    # Six words are two blocks, so draw 3 starts at block 6.
    expected = philox_one((6, 6, 0x76543210, 0x7EDCBA98), key) + philox_one(
        (7, 6, 0x76543210, 0x7EDCBA98), key
    )
    assert got.tolist() == [expected[:6]]


def test_purposes_are_frozen() -> None:
    assert {purpose.name: purpose.value for purpose in Purpose} == {
        "TIMESTEP": 1,
        "NOISE": 2,
        "FLIP": 3,
        "SAMPLE_NOISE": 4,
        "DROPOUT": 5,
        "CODEC": 6,
        "LIKELIHOOD": 7,
        "RESAMPLING": 8,
    }


def test_own_known_answers() -> None:
    """Checkpoints resume on these bits: a change of any of them breaks every run there is."""
    n = torch.tensor([0, 1, 51200, 2**40 + 7])
    values = normal(2**63 + 5, Purpose.NOISE, n, (3,), draw=2)
    assert values.view(torch.int32).tolist() == KNOWN_NORMALS
    assert timesteps(1, torch.arange(8), 1000).tolist() == KNOWN_TIMESTEPS
    assert flips(1, torch.arange(16)).int().tolist() == KNOWN_FLIPS


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 7, 9), (5,), ()])
def test_same_numbers_in_any_batch(shape: tuple[int, ...]) -> None:
    n = torch.arange(1000, 1128)
    whole = normal(7, Purpose.NOISE, n, shape, draw=1)
    assert whole.shape == (128, *shape)
    assert whole.dtype == torch.float32
    assert whole.is_contiguous()
    for row in (0, 1, 63, 127):
        assert torch.equal(normal(7, Purpose.NOISE, n[row : row + 1], shape, draw=1)[0], whole[row])
    order = torch.randperm(128)
    assert torch.equal(normal(7, Purpose.NOISE, n[order], shape, draw=1), whole[order])


@given(SEEDS, st.integers(1, 70), st.integers(1, 9), st.integers(1, 40), st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_pieces_of_the_work_do_not_show(seed: int, numel: int, batch: int, chunk: int, draw: int) -> None:
    n = torch.arange(batch) * 12345
    whole = normal(seed, Purpose.SAMPLE_NOISE, n, (numel,), draw)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(randomness, "_CHUNK_CPU", chunk)
        assert torch.equal(normal(seed, Purpose.SAMPLE_NOISE, n, (numel,), draw), whole)


def test_normal_is_box_muller_of_the_bits() -> None:
    n = torch.arange(500)
    w = bits(3, Purpose.NOISE, n, 256).double()
    radius = (-2 * ((w[:, 0::2] + 1) / 2**32).float().double().log()).sqrt()
    angle = w[:, 1::2] * (2 * math.pi / 2**32)
    expected = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1).flatten(1)
    assert (normal(3, Purpose.NOISE, n, (256,)).double() - expected).abs().max() < 2e-6


def test_every_operation_is_rounded_as_ieee_754_says() -> None:
    """The radius once more in NumPy, whose float32 operations and root are correctly rounded."""
    word = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.int64)
    x = (word + 1).astype(np.float32)
    e = (x.view(np.int32) - 0x3F3504F3) >> 23
    m = (x.view(np.int32) - (e << 23)).view(np.float32)
    one = np.float32(1)
    s = (m - one) / (m + one)
    total = s * s * np.float32(1 / 9)
    for coefficient in (1 / 7, 1 / 5, 1 / 3):
        total = (total + np.float32(coefficient)) * (s * s)
    log_m = (total + one) * s * np.float32(2)
    log_u = (e - 32).astype(np.float32) * np.float32(math.log(2)) + log_m
    expected = np.sqrt(log_u * np.float32(-2))
    assert np.array_equal(randomness._radius(torch.from_numpy(word.copy())).numpy(), expected)


def test_extreme_words_stay_finite() -> None:
    word = torch.tensor([0, 1, 2**29, 2**30, 2**31 - 1, 2**31, 2**32 - 1])
    radius = randomness._radius(word.clone()).double()
    assert radius[0] == pytest.approx(math.sqrt(64 * math.log(2)), rel=1e-6)
    assert radius[-1] == 0
    sign, cosine, sine = randomness._direction(word.clone())
    angle = word.double() * (2 * math.pi / 2**32)
    torch.testing.assert_close((sign * cosine).double(), angle.cos(), atol=4e-7, rtol=0)
    torch.testing.assert_close((sign * sine).double(), angle.sin(), atol=4e-7, rtol=0)


def ks_distance(values: Tensor) -> float:
    """Largest distance of the empirical from the standard normal distribution function."""
    ordered = values.double().flatten().sort().values
    rank = torch.arange(1, len(ordered) + 1, dtype=torch.float64) / len(ordered)
    cdf = torch.special.ndtr(ordered)
    return float(torch.maximum((rank - cdf).abs(), (rank - 1 / len(ordered) - cdf).abs()).max())


def test_normals_pass_kolmogorov_smirnov() -> None:
    values = normal(11, Purpose.NOISE, torch.arange(200), (1000,))
    # 1.63 / sqrt(N) is the 1 % point; along the samples' own axis as well.
    assert ks_distance(values) < 1.63 / math.sqrt(200_000)
    assert ks_distance(normal(12, Purpose.NOISE, torch.arange(50_000), (1,))) < 1.63 / math.sqrt(50_000)
    assert float(values.double().pow(4).mean()) == pytest.approx(3.0, abs=0.06)


def test_neighbours_purposes_seeds_and_draws_are_uncorrelated() -> None:
    n = torch.arange(40)
    base = normal(5, Purpose.NOISE, n, (2500,)).flatten()
    others = {
        "next n": normal(5, Purpose.NOISE, n + 1, (2500,)),
        "n + 2^32": normal(5, Purpose.NOISE, n + 2**32, (2500,)),
        "purpose": normal(5, Purpose.SAMPLE_NOISE, n, (2500,)),
        "seed": normal(6, Purpose.NOISE, n, (2500,)),
        "seed + 2^32": normal(5 + 2**32, Purpose.NOISE, n, (2500,)),
        "draw": normal(5, Purpose.NOISE, n, (2500,), draw=1),
        "next element": base.roll(1),
    }
    for name, other in others.items():
        correlation = float((base * other.flatten()).mean())
        assert abs(correlation) < 4.5 / math.sqrt(base.numel()), name


def test_timesteps_are_exact_and_uniform() -> None:
    n = torch.arange(50_000)
    t = timesteps(9, n, 1000)
    u = bits(9, Purpose.TIMESTEP, n, 1)[:, 0]
    assert t[:200].tolist() == [int(word) * 1000 // 2**32 for word in u[:200]]
    counts = torch.bincount(t, minlength=1000).double()
    assert len(counts) == 1000
    chi2 = float(((counts - 50) ** 2 / 50).sum())
    assert abs(chi2 - 999) < 4 * math.sqrt(2 * 999)
    assert int(timesteps(9, n, 2**31 - 1).max()) < 2**31 - 1
    assert set(timesteps(9, n[:50], 1).tolist()) == {0}


def test_flips_are_fair() -> None:
    flipped = flips(4, torch.arange(40_000))
    assert flipped.dtype == torch.bool
    assert abs(float(flipped.double().mean()) - 0.5) < 4 * 0.5 / 200


def test_big_images_need_little_beside_their_own_memory() -> None:
    """The chunks bound the work space: a few MiB of int64 words for a sample of any size."""
    n = torch.arange(4)
    blocks = 3 * 256 * 256 // 4
    sizes = [
        (rows.stop - rows.start) * (columns.stop - columns.start)
        for rows, columns in randomness._chunks(torch.zeros(4, dtype=torch.int64), 64 * blocks)
    ]
    assert sum(sizes) == 4 * 64 * blocks
    assert max(sizes) <= randomness._CHUNK_CPU
    assert normal(0, Purpose.NOISE, n, (3, 256, 256)).shape == (4, 3, 256, 256)


def test_empty_batch_and_zero_words() -> None:
    assert normal(0, Purpose.NOISE, torch.arange(0), (3, 2)).shape == (0, 3, 2)
    assert normal(0, Purpose.NOISE, torch.arange(2), (0, 2)).shape == (2, 0, 2)
    assert bits(0, Purpose.NOISE, torch.arange(2), 0).shape == (2, 0)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seed_out_of_range(seed: int) -> None:
    with pytest.raises(ValueError, match="seed must lie"):
        flips(seed, torch.arange(2))


def test_wrong_n_draw_and_steps() -> None:
    with pytest.raises(ValueError, match="n must be an int64"):
        flips(0, torch.zeros(2))
    with pytest.raises(ValueError, match="n must be an int64"):
        flips(0, torch.tensor(3))
    with pytest.raises(ValueError, match="not be negative, got -1"):
        flips(0, torch.tensor([-1]))
    with pytest.raises(ValueError, match="draw -1"):
        normal(0, Purpose.NOISE, torch.arange(1), (4,), draw=-1)
    with pytest.raises(ValueError, match="32-bit block counter"):
        normal(0, Purpose.NOISE, torch.arange(1), (8,), draw=2**31)
    with pytest.raises(ValueError, match="num_timesteps"):
        timesteps(0, torch.arange(1), 0)
