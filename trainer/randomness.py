"""Counter-based random numbers: every number belongs to a sample, not to a process.

The generator is Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as
1, 2, 3", section 3.3). Its key is the seed, its counter is ``(block, purpose, n low, n high)``, where *n*
is a stream position or the number of a generated image. A number therefore depends on (seed, purpose, n,
draw, place in the sample) alone: neither on the rank, nor on the batch it is computed in, nor on how often
the generator was asked before.

The normals are bit-equal on every device too: Box-Muller is evaluated with additions, multiplications, one
division and one square root only, which IEEE 754 rounds in one way (the root takes some care), and not with a
device's own ``log`` and ``cos``. (Compiling these functions could fuse multiply-adds and so change last bits:
call them eagerly.)

The numbers are a format: known answers in the tests freeze them, since checkpoints resume on them.
"""

import math
from collections.abc import Iterator
from enum import IntEnum

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
# Philox's multipliers 0xD2511F53 and 0xCD9E8D57, less 2^32: the product with a 32-bit word then fits int64.
_MULTIPLIERS = (0xD2511F53 - 2**32, 0xCD9E8D57 - 2**32)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
# Blocks computed at once. On a CPU the working set stays in the cache; elsewhere few kernels count more.
_CHUNK_CPU = 2**16
_CHUNK_ACCELERATOR = 2**21


class Purpose(IntEnum):
    """What a random number is for: the second word of the counter. Frozen: add, never renumber."""

    TIMESTEP = 1
    NOISE = 2
    FLIP = 3
    SAMPLE_NOISE = 4
    DROPOUT = 5
    CODEC = 6
    LIKELIHOOD = 7
    RESAMPLING = 8


def philox4x32_10(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10, the same bits as Random123's ``philox4x32``.

    Args:
        counter: Four int64 tensors of mutually broadcastable shapes, values in [0, 2^32).
        key: Two integers in [0, 2^32).

    Returns:
        Four int64 tensors of the broadcast shape, values in [0, 2^32).
    """
    # Worked in place on seven buffers: fresh memory for every operation costs more than the arithmetic.
    shape = torch.broadcast_shapes(*(word.shape for word in counter))  # type: ignore[no-untyped-call]
    c0, c1, c2, c3 = (word.expand(shape).clone(memory_format=torch.contiguous_format) for word in counter)
    low0, low1, carry = torch.empty_like(c0), torch.empty_like(c0), torch.empty_like(c0)
    k0, k1 = key
    for _ in range(_ROUNDS):
        # With M = m + 2^32 the product c*M is c*m + c*2^32: its low word is that of c*m, its high word
        # (c*m >> 32) + c. |c*m| < 2^62, so nothing overflows. The low words stay unmasked until used.
        torch.mul(c0, _MULTIPLIERS[0], out=low0)
        torch.mul(c2, _MULTIPLIERS[1], out=low1)
        high0 = c0.add_(torch.bitwise_right_shift(low0, 32, out=carry))
        high1 = c2.add_(torch.bitwise_right_shift(low1, 32, out=carry))
        high1.bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_WORD)
        high0.bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_WORD)
        c0, c2 = high1, high0
        c1, low1 = low1, c1
        c3, low0 = low0, c3
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1.bitwise_and_(_WORD), c2, c3.bitwise_and_(_WORD)


def bits(seed: int, purpose: Purpose, n: Tensor, words: int, draw: int = 0) -> Tensor:
    """Uniform 32-bit words of every sample.

    Args:
        seed: In [0, 2^64).
        purpose: What the words are for.
        n: int64 [B], each in [0, 2^63).
        words: Words per sample.
        draw: Number of an independent repetition, >= 0. The draws of one purpose must all ask for the
            same number of words, or their blocks overlap.

    Returns:
        int64 [B, words] on n's device, values in [0, 2^32).

    Raises:
        ValueError: If the seed, n or the draw is out of the counter's reach.
    """
    blocks = -(-words // 4)
    first = _first_block(seed, n, blocks, draw)
    out = torch.empty((n.shape[0], blocks, 4), dtype=torch.int64, device=n.device)
    for rows, columns in _chunks(n, blocks):
        for place, word in enumerate(_words(seed, purpose, n[rows], first, columns)):
            out[rows, columns, place] = word
    return out.view(n.shape[0], 4 * blocks)[:, :words].contiguous()


def normal(seed: int, purpose: Purpose, n: Tensor, shape: tuple[int, ...], draw: int = 0) -> Tensor:
    """Standard normal numbers of every sample, by Box-Muller in float32.

    Element 4k+j of a sample (row-major) is the j-th normal of block ``draw * ceil(numel / 4) + k``; a
    block's words (w0, w1, w2, w3) give r(w0) cos(w1), r(w0) sin(w1), r(w2) cos(w3), r(w2) sin(w3) with
    r(w) = sqrt(-2 log u), u = (w + 1) / 2^32 rounded to float32, and angles of w / 2^32 turns. So
    |value| <= 6.67.

    Args:
        seed: In [0, 2^64).
        purpose: What the noise is for.
        n: int64 [B], each in [0, 2^63).
        shape: Shape of one sample.
        draw: Number of an independent repetition for the same sample (e.g. of a sampling step), >= 0.

    Returns:
        float32 [B, *shape], contiguous, on n's device; bit-equal for any batch n stands in.

    Raises:
        ValueError: If the seed, n or the draw is out of the counter's reach.
    """
    numel = math.prod(shape)
    blocks = -(-numel // 4)
    first = _first_block(seed, n, blocks, draw)
    out = torch.empty((n.shape[0], blocks, 4), dtype=torch.float32, device=n.device)
    for rows, columns in _chunks(n, blocks):
        words = _words(seed, purpose, n[rows], first, columns)
        for place in (0, 2):
            sign, cosine, sine = _direction(words[place + 1])
            radius = _radius(words[place]).mul_(sign)
            torch.mul(radius, cosine, out=out[rows, columns, place])
            torch.mul(radius, sine, out=out[rows, columns, place + 1])
    return out.view(n.shape[0], 4 * blocks)[:, :numel].reshape(n.shape[0], *shape).contiguous()


def timesteps(seed: int, n: Tensor, num_timesteps: int) -> Tensor:
    """Uniform timesteps of every sample: floor(u * T / 2^32) of a 32-bit word u, in integers.

    Args:
        seed: In [0, 2^64).
        n: int64 [B] stream positions.
        num_timesteps: T, in [1, 2^31).

    Returns:
        int64 [B] on n's device, values in [0, T); the paper's t = 1..T counted from 0.

    Raises:
        ValueError: If T is out of range, or seed or n is.
    """
    if not 1 <= num_timesteps < 2**31:
        raise ValueError(f"num_timesteps must lie in [1, 2^31), got {num_timesteps}")
    return (bits(seed, Purpose.TIMESTEP, n, 1)[:, 0] * num_timesteps) >> 32


def flips(seed: int, n: Tensor) -> Tensor:
    """Whether each sample is mirrored left to right: a fair coin.

    Args:
        seed: In [0, 2^64).
        n: int64 [B] stream positions.

    Returns:
        bool [B] on n's device.

    Raises:
        ValueError: If the seed or n is out of range.
    """
    return bits(seed, Purpose.FLIP, n, 1)[:, 0] >= 2**31


def _first_block(seed: int, n: Tensor, blocks: int, draw: int) -> int:
    """Checks the arguments and returns the first block of a draw."""
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must lie in [0, 2^64), got {seed}")
    if n.dtype != torch.int64 or n.ndim != 1:
        raise ValueError(f"n must be an int64 tensor of shape [B], got {n.dtype} {list(n.shape)}")
    if n.device.type == "cpu" and n.numel() and int(n.min()) < 0:  # elsewhere the check would cost a wait
        raise ValueError(f"n must not be negative, got {int(n.min())}")
    if draw < 0 or (draw + 1) * blocks > 2**32:
        raise ValueError(f"draw {draw} of {blocks} blocks each does not fit the 32-bit block counter")
    return draw * blocks


def _chunks(n: Tensor, blocks: int) -> Iterator[tuple[slice, slice]]:
    """Cuts [B, blocks] into pieces of bounded size, so that big images need no big work space."""
    limit = _CHUNK_CPU if n.device.type == "cpu" else _CHUNK_ACCELERATOR
    columns = min(blocks, limit)
    rows = max(1, limit // max(1, columns))
    for row in range(0, n.shape[0], rows):
        for column in range(0, blocks, max(1, columns)):
            yield slice(row, min(row + rows, n.shape[0])), slice(column, min(column + columns, blocks))


def _words(
    seed: int, purpose: Purpose, n: Tensor, first: int, columns: slice
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The words of blocks first + columns for each n: four int64 [B, columns]."""
    block = torch.arange(first + columns.start, first + columns.stop, dtype=torch.int64, device=n.device)
    which = torch.full((1, 1), int(purpose), dtype=torch.int64, device=n.device)
    low, high = (n & _WORD).unsqueeze(1), (n >> 32).unsqueeze(1)
    return philox4x32_10((block.unsqueeze(0), which, low, high), (seed & _WORD, seed >> 32))


def _radius(word: Tensor) -> Tensor:
    """sqrt(-2 log u), u = (word + 1) / 2^32 rounded to float32: relative error below 1e-6. Spoils word."""
    x = word.add_(1).to(torch.float32)
    # x = m * 2^e with m in [sqrt(1/2), sqrt(2)), read off the float's own bits.
    pattern = x.view(torch.int32)
    e = (pattern - 0x3F3504F3).bitwise_right_shift_(23)
    m = pattern.sub_(e << 23).view(torch.float32)
    # log m = 2 artanh(s), s = (m - 1) / (m + 1): |s| < 0.172, so five terms reach float32's precision.
    s = (m - 1).div_(m + 1)
    s2 = s * s
    log_m = _polynomial(s2, (1, 1 / 3, 1 / 5, 1 / 7, 1 / 9)).mul_(s).mul_(2)
    log_u = e.sub_(32).to(torch.float32).mul_(math.log(2)).add_(log_m)
    # A vector library's float32 root may be off by its last bit, on each processor in its own way (MKL's is).
    # So may its float64 root, but rounded to float32 that is the correct one: no float32 number's root lies
    # nearer than 2^-51 of itself to the middle of two float32 numbers.
    return log_u.mul_(-2).to(torch.float64).sqrt_().to(torch.float32)


def _direction(word: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sign, cosine and sine of word / 2^32 turns: float32, absolute error below 4e-7. Spoils word.

    The angle is a in [-pi/2, pi/2) plus no or one half turn; the half turn's sign is common to cosine and
    sine, so (sign * cosine, sign * sine) is the direction and nothing needs to be swapped.
    """
    half_turn = word.add_(2**30) >> 31
    sign = half_turn.bitwise_and_(1).to(torch.float32).mul_(-2).add_(1)
    a = word.bitwise_and_(2**31 - 1).sub_(2**30).to(torch.float32).mul_(2 * math.pi / 2**32)
    a2 = a * a
    f = math.factorial
    cosine = _polynomial(a2, (1, -1 / 2, 1 / f(4), -1 / f(6), 1 / f(8), -1 / f(10), 1 / f(12)))
    sine = _polynomial(a2, (1, -1 / f(3), 1 / f(5), -1 / f(7), 1 / f(9), -1 / f(11), 1 / f(13))).mul_(a)
    return sign, cosine, sine


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """Sum of coefficients[k] * x^k, by Horner's rule, each operation rounded on its own."""
    total = x * coefficients[-1]
    for coefficient in coefficients[-2:0:-1]:
        total.add_(coefficient).mul_(x)
    return total.add_(coefficients[0])
