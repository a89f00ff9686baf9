"""What the network holds in memory between its input and its gradients, measured without a device.

The network really runs forward and backward, in the precision and along the code path of the device asked
for, but on fake tensors: they have shapes, types and layouts and no numbers, so nothing is allocated and a
GPU need not be there. Every operation's output is entered into a ledger until it is freed.

Two things are ours, because PyTorch has them for devices only that are there: the walk back through the graph
(its own engine needs the GPU), and recomputing activations (its own would touch the GPU's random numbers).
The tests hold both against PyTorch's own on a CPU, where the ledger agrees to the byte with what is saved.

Not in these figures, for they are no tensors of PyTorch's: CUDA's context, libraries' workspaces, and what
the allocator rounds up or cannot reuse. Compiled blocks may keep less: they compute again what is cheap.
"""

import contextlib
import functools
import heapq
import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainer import blocks
from trainer.layers import like
from trainer.recipe_sections import Precision
from trainer.unet import UNet
from trainer.unet_config import UNetConfig

Backward = Callable[[Tensor, Tensor], object]
"""(output, its gradient) -> runs the backward pass and keeps no parameter's gradient."""


@dataclass(frozen=True)
class Activations:
    """Bytes beside parameters and their gradients.

    Attributes:
        kept: What is there for the backward pass when the forward pass has ended: copies of the weights in
            the precision of autocast, and for each image the same again.
        peak: The most at any moment of the two passes.
    """

    kept: int
    peak: int

    @property
    def transient(self) -> int:
        """What the peak holds beyond what is kept."""
        return self.peak - self.kept


@functools.cache
def measure_activations(
    config: UNetConfig, precision: Precision, batch: int, device: str = "cuda"
) -> Activations:
    """Return what one forward and backward pass holds.

    Args:
        config: The network.
        precision: What it computes in.
        batch: Images that pass together.
        device: Whose code path is taken, "cuda" or "cpu"; it need not be there.
    """
    # fp16 has its parameters in float16 (DeepSpeed's mode), fp64 in float64.
    dtype = {Precision.FP16: torch.float16, Precision.FP64: torch.float64}.get(precision, torch.float32)
    with FakeTensorMode(), torch.device(device), _default_dtype(dtype):
        network = UNet(config)
        size = config.image_size
        x = torch.empty(batch, config.in_channels, size, size, dtype=dtype)
        labels = None if config.num_classes is None else torch.zeros(batch, dtype=torch.int64)
        t = torch.zeros(batch, dtype=torch.int64)
        with _as_on(device):
            return observe(network, x, t, labels, precision=precision)


def observe(
    network: UNet,
    x: Tensor,
    t: Tensor,
    labels: Tensor | None = None,
    *,
    precision: Precision,
    backward: Backward | None = None,
) -> Activations:
    """Run a network forward and backward and observe what it holds; tensors may be fake or real.

    Args:
        network: The network.
        x: Noisy images [B, C, H, W].
        t: int64 [B].
        labels: int64 [B] if the network is conditioned on classes.
        precision: What it computes in.
        backward: Runs the backward pass; default: `walk_back`.
    """
    ledger = Ledger([*network.parameters(), x, t])
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> _Kept:
        storage = tensor.untyped_storage()
        if ledger.owns(storage):
            kept[storage._cdata] = storage.nbytes()
        return _Kept(tensor)

    with ledger:
        with autocast(x.device.type, precision.autocast), saving(keep):
            output = network(x, t, labels)
        total = sum(kept.values())
        output = output.to(x.dtype)
        gradient = torch.ones_like(output)
        if backward is None:
            walk_back(output.grad_fn, gradient)
        else:
            backward(output, gradient)
    return Activations(kept=total, peak=ledger.peak)


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The bytes that the operations inside it have put into memory and that are not freed yet.

    Args:
        known: What was there before; views of it are nothing new.
    """

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._live: dict[int, int] = {}
        self.held = 0
        """How many there are."""
        self.peak = 0
        """The most there were; may be set back to `held`."""

    def owns(self, storage: torch.UntypedStorage) -> bool:
        """Tell whether a storage is new."""
        return storage._cdata not in self._known

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default and args[0].device.type == "cuda":
            # cuDNN answers in the layout it is given; without it PyTorch would expect the contiguous one.
            output = like(output, args[0])
        for tensor in tree_leaves(output):
            # Meta tensors are no memory; fake ones say which device they stand for.
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                self._enter(tensor.untyped_storage())
        return output

    def _enter(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known or key in self._live:
            return
        self._live[key] = storage.nbytes()
        self.held += self._live[key]
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._leave, key)

    def _leave(self, key: int) -> None:
        self.held -= self._live.pop(key)


class _Kept:
    """A tensor that the backward pass needs once."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor: Tensor | None = tensor

    def take(self) -> Tensor:
        """Hand the tensor out and let go of it, as PyTorch does after a node has run."""
        tensor, self._tensor = self._tensor, None
        assert tensor is not None, "a node of the graph runs once"
        return tensor


def saving(keep: Callable[[Tensor], _Kept]) -> torch.autograd.graph.saved_tensors_hooks:
    """Return a context in which `keep` is given whatever operations save for the backward pass."""
    return torch.autograd.graph.saved_tensors_hooks(keep, _Kept.take)


def walk_back(root: Node | None, gradient: Tensor, leaves: Sequence[Tensor] = ()) -> list[Tensor | None]:
    """Run the backward pass as PyTorch's engine does, in this thread and whatever the device is.

    Args:
        root: `grad_fn` of what was computed, which itself need not be there any more.
        gradient: Of the loss with respect to it.
        leaves: What gradients are wanted of; those of other leaves are let go as soon as they are there.

    Returns:
        The gradients of the leaves, None where there is none.
    """
    wanted = {id(leaf): place for place, leaf in enumerate(leaves)}
    found: list[Tensor | None] = [None] * len(leaves)
    assert root is not None, "nothing was computed from what needs a gradient"
    uses = _uses(root)
    arrived: dict[Node, list[Tensor | None]] = {root: [gradient]}
    tie = itertools.count()
    # Of the nodes that are ready the one made last comes first.
    ready = [(-root._sequence_nr(), next(tie), root)]
    del root, gradient  # they shall not outlive their turn
    while ready:
        node = heapq.heappop(ready)[2]
        gradients = _run(node, arrived.pop(node))
        for (following, number), value in zip(node.next_functions, gradients, strict=True):
            if following is None:
                continue
            fitted = _fitted(value, following._input_metadata[number])
            variable = getattr(following, "variable", None)
            if variable is not None:
                if id(variable) in wanted:
                    place = wanted[id(variable)]
                    found[place] = _sum(found[place], fitted)
                continue
            slots = arrived.setdefault(following, [None] * len(following._input_metadata))
            slots[number] = _sum(slots[number], fitted)
            uses[following] -= 1
            if not uses[following]:
                del uses[following]
                heapq.heappush(ready, (-following._sequence_nr(), next(tie), following))
        gradients = value = fitted = following = variable = node = None  # type: ignore[assignment]
    return found


def _uses(root: Node) -> Counter[Node]:
    """Count how many gradients each node of a graph waits for."""
    uses: Counter[Node] = Counter()
    stack = [root]
    while stack:
        for following, _ in stack.pop().next_functions:
            if following is None or hasattr(following, "variable"):
                continue
            if following not in uses:
                stack.append(following)
            uses[following] += 1
    return uses


@torch.no_grad()
def _run(node: Node, gradients: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """Run one node; return the gradients of what it was computed from."""
    if isinstance(node, torch.autograd.function.BackwardCFunction):  # the function recomputed has no gradient
        result: Any = node.apply(*gradients)[-len(node.next_functions) :]
    else:
        result = node(*gradients)  # type: ignore[operator]
    return tuple(result) if isinstance(result, tuple) else (result,)


def _sum(before: Tensor | None, value: Tensor | None) -> Tensor | None:
    return value if before is None else before if value is None else before + value


def _fitted(value: Tensor | None, metadata: Any) -> Tensor | None:
    """Undo broadcasting and conversion, as PyTorch's engine does between nodes."""
    if value is None:
        return None
    if value.shape != metadata.shape:
        value = value.sum_to_size(metadata.shape)
    return value.to(metadata.dtype)


class _Recomputed(torch.autograd.Function):
    """A function whose gradient begins with computing it again."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Compute it, keeping nothing but what goes in."""
        ctx.function = function
        ctx.save_for_backward(*inputs)
        device = inputs[0].device.type
        ctx.device = device
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return function(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """Compute it again, keeping what its gradient needs, and return that."""
        inputs = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in ctx.saved_tensors]
        with torch.enable_grad(), autocast(ctx.device, ctx.dtype), saving(_Kept):
            # PyTorch stops before the last operation: nothing needs what it makes.
            root = ctx.function(*inputs).grad_fn
        return None, *walk_back(root, gradient, inputs)


def _recompute(function: Callable[..., Tensor], *inputs: Tensor, use_reentrant: bool) -> Tensor:
    """What stands in for `torch.utils.checkpoint.checkpoint`."""
    result: Tensor = _Recomputed.apply(function, *inputs)
    return result


class _FusedAttention(TorchFunctionMode):
    """Attention as GPUs do it: one kernel that keeps its inputs, its output and a number for each row."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_efficient_attention(*args, None, True)[0]
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _as_on(device: str) -> Iterator[None]:
    """Let the network do what it does on a device, though it may not be there."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(blocks, "checkpoint", _recompute))
        if device == "cuda":
            stack.enter_context(_FusedAttention())
        yield


@contextlib.contextmanager
def autocast(device: str, dtype: torch.dtype | None) -> Iterator[None]:
    """`torch.autocast` that does not mind the device's absence; None: no autocast."""
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, dtype is not None)
    if dtype is not None:
        torch.set_autocast_dtype(device, dtype)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
