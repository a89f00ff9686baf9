"""3x3 convolutions in float32 on a CPU by Winograd's minimal filtering F(2x2, 3x3), and their gradients.

A direct convolution multiplies 36 times for each 2x2 square of outputs and pair of channels, this one 16
times (Winograd 1980; Lavin & Gray 2016, "Fast Algorithms for Convolutional Neural Networks", sec. 4.1):
    Y = A^T [(G g G^T) * (B^T d B)] A,   d the 4x4 inputs of a square, g the 3x3 kernel.
Summed over channels, the products * are 16 matrix products; everything else is additions, done here along one
axis at a time on all pixels at once. Its rounding errors are no larger than those of oneDNN's direct kernels
(fewer terms are summed), measured in tests/trainer/test_unet_winograd.py.

Why: torch's direct convolutions reach the processor's peak on the way forward, but half of it in the gradient
of the weights, with channels_last activations more so. Measured on one AVX2 core against them, 128 to 512
channels, 8x8 to 32x32 pixels, batch 8: forward 1.0 to 1.4 times as fast, backward 1.4 to 1.9 times. On a GPU
cuDNN chooses among the like by itself, and in bfloat16 there are faster units: `suits` sends those there.
"""

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

LEAST_CHANNELS: Final = 128
"""Below, the additions cost more than the multiplications that they save."""
LEAST_PIXELS: Final = 8 * 8
"""Of an image: in fewer the transform of the kernel does not pay."""
MOST_PIXELS: Final = 64 * 64
"""Of an image: with more, what lies between the steps falls out of the cache."""
CHUNK: Final = 256
"""Squares of 2x2 outputs taken together, at least one image: the same, for batches."""
_G: Final = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))


def suits(x: Tensor, weight: Tensor) -> bool:
    """Tells whether `conv3x3` takes these operands and is worth while.

    Args:
        x: [B, in, H, W] images.
        weight: [out, in, 3, 3] kernel.
    """
    height, width = x.shape[2:]
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and min(weight.shape[:2]) >= LEAST_CHANNELS
        and height % 2 == width % 2 == 0
        and LEAST_PIXELS <= height * width <= MOST_PIXELS
    )


@torch.library.custom_op("ddpm_foundry::conv3x3", mutates_args=())
def conv3x3(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolves with a 3x3 kernel and one row of zeros around the image.

    Args:
        x: float32 [B, in, H, W], H and W even, on a CPU; channels_last, or it will be copied.
        weight: float32 [out, in, 3, 3].
        bias: float32 [out].

    Returns:
        float32 [B, out, H, W], channels_last. Differentiable once.
    """
    pixels = _pixels(x)
    out = pixels.new_empty(*pixels.shape[:3], len(weight))
    filters = _filters(weight).transpose(1, 2)
    inputs, outputs = _Tiles(pixels), _Tiles(out)
    for images, results in zip(inputs.chunks(pixels), inputs.chunks(out), strict=True):
        torch.bmm(inputs.cut(_spread, images), filters, out=outputs.matrices(len(images)))
        # The second of the four in both directions is in every sum with weight 1.
        outputs.squares[1, 1, : len(images)] += bias
        outputs.join(_fold, results)
    return out.permute(0, 3, 1, 2)


@torch.library.custom_op("ddpm_foundry::conv3x3_backward", mutates_args=())
def _backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight, of shapes and layouts as they are, from the output's."""
    pixels, grads = _pixels(x), _pixels(grad)
    filters = _filters(weight)
    out, sums = torch.empty_like(pixels), torch.zeros_like(filters)
    inputs, outputs = _Tiles(pixels), _Tiles(grads)
    for images, slopes, results in zip(*map(inputs.chunks, (pixels, grads, out)), strict=True):
        products = outputs.cut(_unfold, slopes)
        sums.baddbmm_(products.transpose(1, 2), inputs.cut(_spread, images))
        torch.bmm(products, filters, out=inputs.matrices(len(images)))
        inputs.join(_gather, results)
    return out.permute(0, 3, 1, 2), _to_weight(sums)


@conv3x3.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    batch, _, height, width = x.shape
    return x.new_empty(batch, height, width, len(weight)).permute(0, 3, 1, 2)


@_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.channels_last), weight.new_empty(weight.shape)


def _setup_context(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor
) -> None:
    ctx.save_for_backward(*inputs[:2])


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return *_backward(grad, *ctx.saved_tensors), grad.sum((0, 2, 3))


conv3x3.register_autograd(_differentiate, setup_context=_setup_context)


def _pixels(x: Tensor) -> Tensor:
    """[B, C, H, W] as contiguous [B, H, W, C]; no copy if that is how it lies in memory."""
    return x.permute(0, 2, 3, 1).contiguous()


def _filters(weight: Tensor) -> Tensor:
    """G g G^T of every kernel: [out, in, 3, 3] to [16, out, in], columns before rows like the tiles."""
    return (_outer(weight) @ weight.reshape(-1, 9).t()).view(16, *weight.shape[:2])


def _to_weight(filters: Tensor) -> Tensor:
    """The adjoint of `_filters`: [16, out, in] to [out, in, 3, 3]."""
    pairs = filters[0].numel()
    # Rows a power of two apart would push each other out of the cache when transposed: a little further.
    taps = filters.new_empty(9, pairs + 16)[:, :pairs]
    torch.mm(_outer(filters).t(), filters.view(16, -1), out=taps)
    return taps.t().contiguous().view(*filters.shape[1:], 3, 3)


def _outer(like: Tensor) -> Tensor:
    """[16, 9]: both directions' G at once, the column of a tile being its slower index."""
    g = like.new_tensor(_G)
    return torch.einsum("cx,ry->cryx", g, g).reshape(16, 9)


class _Tiles:
    """Room for the tiles of one chunk of images, used by one chunk after the other.

    Fresh memory for each would cost as much as the arithmetic: the system hands it out page by page.

    Args:
        like: [B, H, W, C] all images.
    """

    def __init__(self, like: Tensor) -> None:
        batch, height, width, self.channels = like.shape
        self.chunk = max(1, min(batch, CHUNK // (height * width // 4)))
        self.rows = like.new_empty(4, self.chunk, height // 2, width, self.channels)
        self.squares = like.new_empty(4, 4, self.chunk, height // 2, width // 2, self.channels)

    def chunks(self, images: Tensor) -> tuple[Tensor, ...]:
        """As many images at a time as there is room for."""
        return torch.split(images, self.chunk)

    def matrices(self, images: int) -> Tensor:
        """The tiles of so many images as [16, tiles, C]."""
        return self.squares[:, :, :images].view(16, -1, self.channels)

    def cut(self, transform: "_Transform", images: Tensor) -> Tensor:
        """Transforms images [b, H, W, C], along one axis, then the other, to [16, tiles, C]."""
        rows, squares = self.rows[:, : len(images)], self.squares[:, :, : len(images)]
        transform(images, rows, 1)
        transform(rows, squares, 3)
        return self.matrices(len(images))

    def join(self, transform: "_Transform", images: Tensor) -> None:
        """Transforms the tiles back into images [b, H, W, C]."""
        rows, squares = self.rows[:, : len(images)], self.squares[:, :, : len(images)]
        transform(squares, rows, 3)
        transform(rows, images, 1)


_Transform = Callable[[Tensor, Tensor, int], None]
"""From, to, and the axis of the pixels; the four numbers of a tile are the first axis of its side."""


def _halves(pixels: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Even and odd rows: the tile of outputs (2i, 2i + 1) has inputs (o_{i-1}, e_i, o_i, e_{i+1})."""
    pairs = torch.unflatten(pixels, axis, (-1, 2))
    return pairs.select(axis + 1, 0), pairs.select(axis + 1, 1)


def _spread(pixels: Tensor, tiles: Tensor, axis: int) -> None:
    """B^T d = (o_{i-1} - o_i, e_i + o_i, o_i - e_i, e_i - e_{i+1}), with zeros around the image."""
    even, odd = _halves(pixels, axis)
    last = even.shape[axis] - 1
    torch.sub(odd.narrow(axis, 0, last), odd.narrow(axis, 1, last), out=tiles[0].narrow(axis, 1, last))
    torch.neg(odd.narrow(axis, 0, 1), out=tiles[0].narrow(axis, 0, 1))
    torch.add(even, odd, out=tiles[1])
    torch.sub(odd, even, out=tiles[2])
    torch.sub(even.narrow(axis, 0, last), even.narrow(axis, 1, last), out=tiles[3].narrow(axis, 0, last))
    tiles[3].narrow(axis, last, 1).copy_(even.narrow(axis, last, 1))


def _gather(tiles: Tensor, pixels: Tensor, axis: int) -> None:
    """The adjoint of `_spread`."""
    even, odd = _halves(pixels, axis)
    last = even.shape[axis] - 1
    torch.sub(tiles[1], tiles[2], out=even)
    even += tiles[3]
    even.narrow(axis, 1, last).sub_(tiles[3].narrow(axis, 0, last))
    torch.add(tiles[1], tiles[2], out=odd)
    odd -= tiles[0]
    odd.narrow(axis, 0, last).add_(tiles[0].narrow(axis, 1, last))


def _fold(tiles: Tensor, pixels: Tensor, axis: int) -> None:
    """A^T m = (m_0 + m_1 + m_2, m_1 - m_2 - m_3)."""
    even, odd = _halves(pixels, axis)
    torch.add(tiles[0], tiles[1], out=even)
    even += tiles[2]
    torch.sub(tiles[1], tiles[2], out=odd)
    odd -= tiles[3]


def _unfold(pixels: Tensor, tiles: Tensor, axis: int) -> None:
    """The adjoint of `_fold`."""
    even, odd = _halves(pixels, axis)
    tiles[0].copy_(even)
    torch.add(even, odd, out=tiles[1])
    torch.sub(even, odd, out=tiles[2])
    torch.neg(odd, out=tiles[3])
