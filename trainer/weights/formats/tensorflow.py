"""Names of the variables of the paper's TensorFlow code, and what a checkpoint of it holds besides.

Source: github.com/hojonathanho/diffusion at 1e0dceb, the variable scopes (names only). A checkpoint is
brought here as a `.npz` of its variables by name, see docs/weights.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from torch import Tensor

from trainer.weights.names import Kind, Layout, Naming

_WEIGHT_AND_BIAS: Final = {"weight": "/W", "bias": "/b"}

NAMING: Final = Naming(
    places={
        "time_embed.0": "temb/dense0",
        "time_embed.2": "temb/dense1",
        "stem": "conv_in",
        "down.blocks": "down_{level}/block_{index}/{layer}",
        "down.attentions": "down_{level}/attn_{index}/{layer}",
        "down.downsample": "down_{level}/downsample/conv",
        "mid.block1": "mid/block_1/{layer}",
        "mid.attention": "mid/attn_1/{layer}",
        "mid.block2": "mid/block_2/{layer}",
        "up.blocks": "up_{level}/block_{index}/{layer}",
        "up.attentions": "up_{level}/attn_{index}/{layer}",
        "up.upsample": "up_{level}/upsample/conv",
        "head.norm": "norm_out",
        "head.conv": "conv_out",
    },
    block={
        "norm1": "norm1",
        "conv1": "conv1",
        "time_proj": "temb_proj",
        "norm2": "norm2",
        "conv2": "conv2",
        "shortcut": "nin_shortcut",
    },
    attention={"norm": "norm", "query": "q", "key": "k", "value": "v", "out": "proj_out"},
    leaves={
        Kind.NORM: {"weight": "/gamma", "bias": "/beta"},
        Kind.CONV: _WEIGHT_AND_BIAS,
        Kind.SHORTCUT: _WEIGHT_AND_BIAS,
        Kind.DENSE: _WEIGHT_AND_BIAS,
        Kind.PROJECTION: _WEIGHT_AND_BIAS,
    },
    layouts={
        Kind.CONV: Layout.HWIO,
        Kind.SHORTCUT: Layout.IN_OUT_OF_CONV,
        Kind.DENSE: Layout.IN_OUT,
        Kind.PROJECTION: Layout.IN_OUT,
    },
)

_ANCHORS: Final = ("temb/dense0/W", "conv_in/W")
"""Variables by which the scope is found; two, so that a lack of one can still be named."""
_EMA: Final = "/ExponentialMovingAverage"
_ADAM: Final = ("/Adam", "/Adam_1")
_COUNTERS: Final = ("global_step", "beta1_power", "beta2_power")


@dataclass(frozen=True)
class Variables:
    """A checkpoint's variables, sorted.

    Attributes:
        naming: `NAMING` within the scope they share.
        weights: By name; empty if the checkpoint has the averages only.
        averages: Their moving averages by the name of the weight; empty if there are none.
    """

    naming: Naming
    weights: dict[str, Tensor]
    averages: dict[str, Tensor]


def sort_variables(variables: Mapping[str, Tensor]) -> Variables | None:
    """Part a checkpoint's variables into weights and moving averages.

    A ":0" at the end of names, Adam's moments and the counters fall away.

    Args:
        variables: Tensors by variable name.

    Returns:
        None if these are not the variables of the paper's code.
    """
    plain = {name.removesuffix(":0"): tensor for name, tensor in variables.items()}
    names = [name.removesuffix(_EMA) for name in plain]
    scopes = {name.removesuffix(end) for name in names for end in _ANCHORS if name.endswith(end)}
    if len(scopes) != 1:
        return None
    (scope,) = scopes
    weights: dict[str, Tensor] = {}
    averages: dict[str, Tensor] = {}
    for name, tensor in plain.items():
        if name.endswith(_EMA):
            averages[name.removesuffix(_EMA)] = tensor
        elif not name.endswith(_ADAM) and name.rpartition("/")[2] not in _COUNTERS:
            weights[name] = tensor
    # A scope is no template: it may hold braces.
    prefix = scope.replace("{", "{{").replace("}", "}}")
    places = {
        place: (prefix if "{" in template else scope) + template for place, template in NAMING.places.items()
    }
    return Variables(replace(NAMING, places=places), weights, averages)
