"""Where a step's processor time goes, by kind of operator."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.autograd.profiler_util import FunctionEvent
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.profiler import ProfilerActivity, profile

from benchmarks.report import Share
from trainer.layers import Dropout

OPTIMIZER = "optimizer and EMA"
"""Name of the profiler range that the update runs in, and of its kind."""
OTHER = "other"
_COPIES = "copies and conversions"
_LARGER = ("convolution", "attention", "normalisation", "dropout")
"""Kinds to which everything is counted that runs inside them, except copies."""
_LAYERS: dict[type[nn.Module], str] = {
    nn.Conv2d: "aten::convolution layer",
    nn.Dropout: "aten::dropout layer",
    Dropout: "aten::dropout layer",
}
"""Layers whose operators have other names, and that of the range around each on the way forward."""
_KINDS = {
    # The first kind of which a fragment occurs in the operator's name has it.
    "convolution": ("convolution", "conv2d", "conv_depthwise", "slow_conv"),
    "normalisation": ("group_norm", "layer_norm", "batch_norm"),
    "attention": ("scaled_dot_product", "flash_attention", "softmax"),
    "matmul": ("mm", "linear", "matmul"),
    "dropout": ("dropout", "bernoulli"),
    "swish": ("silu", "sigmoid"),
    _COPIES: (
        "copy_",
        "contiguous",
        "clone",
        "cat",
        "fill_",
        "zero_",
        "empty",
        "reshape",
        "_to_copy",
        "to_dense",
        "to_mkldnn",
    ),
    "additions and products": ("add", "mul", "div", "sub", "sum", "square", "pow", "mean"),
    "resampling and padding": ("upsample", "pad", "slice"),
}


def kind_of(operator: str) -> str:
    """The kind of an operator by its name, namespace included."""
    namespace, _, name = operator.partition("::")
    if namespace == "aten":
        for kind, fragments in _KINDS.items():
            if any(fragment in name for fragment in fragments):
                return kind
    return OTHER


def by_kind(events: Iterable[FunctionEvent], calls: int) -> list[Share]:
    """Add up the processor time of each kind, largest first.

    Args:
        events: Of a profile.
        calls: How many calls it covers.
    """
    seconds: defaultdict[str, float] = defaultdict(float)
    for event in events:
        seconds[_kind_with_callers(event)] += event.self_cpu_time_total * 1e-6 / calls
    whole = sum(seconds.values())
    return [
        Share(kind=kind, seconds=value, share=value / whole)
        for kind, value in sorted(seconds.items(), key=lambda item: -item[1])
        if value > 0
    ]


def _kind_with_callers(event: FunctionEvent) -> str:
    """The operator's own kind, unless it serves a larger one or the update.

    A convolution without a kernel of its own, for one, is a product of matrices.
    """
    own = kind_of(event.name)
    kind: str | None = None
    caller: FunctionEvent | None = event
    while caller is not None:
        if caller.name == OPTIMIZER:
            return OPTIMIZER
        if kind is None and own != _COPIES and (serves := kind_of(caller.name)) in _LARGER:
            kind = serves
        caller = caller.cpu_parent
    return kind or own


def profile_kinds(run: Callable[[], object], calls: int) -> list[Share]:
    """Profile some calls of `run`, whose update stands in a range named `OPTIMIZER`.

    The thread that starts an operator waits for its helpers, so its time is wall time.
    """
    with _marked_layers(), profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(calls):
            run()
    events = profiler.events()
    assert events is not None
    return by_kind(events, calls)


@contextmanager
def _marked_layers() -> Iterator[None]:
    """Puts the forward pass of every layer of `_LAYERS` into its range."""
    open_ranges: list[ExitStack] = []

    def enter(module: nn.Module, args: object) -> None:
        for kind, name in _LAYERS.items():
            if isinstance(module, kind):
                open_ranges.append(ExitStack())
                open_ranges[-1].enter_context(torch.profiler.record_function(name))

    def leave(module: nn.Module, args: object, output: object) -> None:
        if isinstance(module, tuple(_LAYERS)):
            open_ranges.pop().close()

    hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def in_optimizer() -> torch.profiler.record_function:
    """The range that marks the update."""
    return torch.profiler.record_function(OPTIMIZER)
