"""How another code base names and lays out the parameters of the network: tables that work both ways.

Our own names are the keys of checkpoints (`trainer.unet`). A `Naming` says as data where another code base
keeps each module of the network and how it lays out the weights of each kind of layer;
`correspondences` makes of it, for one `UNetConfig`, the bijection between all of its tensors and ours.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Self

import torch
from torch import Tensor

from trainer.unet import UNet
from trainer.unet_config import UNetConfig


class Kind(StrEnum):
    """Kinds of layers, as far as code bases name or lay them out differently."""

    NORM = "norm"
    CONV = "conv"
    SHORTCUT = "shortcut"  # 1x1 convolution of a residual block; our weight is [out, in, 1, 1]
    DENSE = "dense"  # of the time embedding; our weight is [out, in]
    PROJECTION = "projection"  # of attention; our weight is [out, in]
    EMBEDDING = "embedding"  # of classes, one row each; our last row is the null label's


class Layout(StrEnum):
    """How another code base lays out a weight that torch has as [out, in] or [out, in, H, W]."""

    SAME = "same"
    HWIO = "hwio"  # [H, W, in, out]
    IN_OUT = "in-out"  # [in, out]
    IN_OUT_OF_CONV = "in-out-of-conv"  # [in, out] where ours is [out, in, 1, 1]
    OUT_IN_1 = "out-in-1"  # [out, in, 1] where ours is [out, in]
    OUT_IN_1_1 = "out-in-1-1"  # [out, in, 1, 1] where ours is [out, in]
    NO_NULL_ROW = "no-null-row"  # rows of classes without our last one, the null label's

    def to_theirs(self, ours: Tensor) -> Tensor:
        """Lay out one of our weights as they do (on any device, "meta" included)."""
        match self:
            case Layout.SAME:
                return ours
            case Layout.HWIO:
                return ours.permute(2, 3, 1, 0)
            case Layout.IN_OUT:
                return ours.T
            case Layout.IN_OUT_OF_CONV:
                return ours[:, :, 0, 0].T
            case Layout.OUT_IN_1:
                return ours[:, :, None]
            case Layout.OUT_IN_1_1:
                return ours[:, :, None, None]
            case Layout.NO_NULL_ROW:
                return ours[:-1]

    def to_ours(self, theirs: Tensor) -> Tensor:
        """The inverse; the row of a null label that they lack is zero, which adds nothing."""
        match self:
            case Layout.SAME:
                return theirs
            case Layout.HWIO:
                return theirs.permute(3, 2, 0, 1)
            case Layout.IN_OUT:
                return theirs.T
            case Layout.IN_OUT_OF_CONV:
                return theirs.T[:, :, None, None]
            case Layout.OUT_IN_1:
                return theirs[:, :, 0]
            case Layout.OUT_IN_1_1:
                return theirs[:, :, 0, 0]
            case Layout.NO_NULL_ROW:
                return torch.cat([theirs, torch.zeros_like(theirs[:1])])


@dataclass(frozen=True)
class Grid:
    """What decides which modules a network has, and their numbers in other code bases.

    Attributes:
        levels: Resolutions.
        blocks: Residual blocks per level on the way down; one more on the way up.
        attending: Levels with attention after each block.
    """

    levels: int
    blocks: int
    attending: frozenset[int]

    @classmethod
    def of(cls, config: UNetConfig) -> Self:
        """The grid of a network."""
        levels = len(config.widths)
        return cls(levels, config.num_res_blocks, frozenset(filter(config.attends, range(levels))))

    def coordinates(self, way: str, level: int, index: int) -> dict[str, int]:
        """What the templates of a `Naming` may mention of the block `index` of a level.

        `level` counts from the finest, `turned` from the coarsest. `number` counts the blocks of one way
        in the order they run, each resampling of the way down as one more; number 0 of it is the stem.
        `after` is the place after block and attention in such a numbered group.
        """
        turned = self.levels - 1 - level
        per_level = self.blocks + 1
        number = 1 + level * per_level + index if way == "down" else turned * per_level + index
        after = 2 if level in self.attending else 1
        return {"level": level, "turned": turned, "index": index, "number": number, "after": after}


@dataclass(frozen=True)
class Naming:
    """Where another code base keeps each module of the network, as data.

    Attributes:
        places: By our module ("stem", "mid.block1" …) or group of modules ("down.blocks", "up.upsample" …):
            their name, a template over `Grid.coordinates` and `layer`.
        block: By our layer of a residual block: theirs.
        attention: By our layer of an attention: theirs. Query, key and value may share one name: they are
            then one tensor.
        leaves: By kind of layer: their names of "weight" and "bias" with what joins them to the module.
        layouts: By kind of layer: how they lay out its weight.
        fused_per_head: Whether a shared tensor holds the query, key and value of the first head, then of
            the second one …; else all queries, then all keys, then all values.
    """

    places: Mapping[str, str]
    block: Mapping[str, str]
    attention: Mapping[str, str]
    leaves: Mapping[Kind, Mapping[str, str]] = field(default_factory=dict)
    layouts: Mapping[Kind, Layout] = field(default_factory=dict)
    fused_per_head: bool = True

    def name(self, ours: str, grid: Grid) -> str:
        """Their name of one of our parameters.

        Raises:
            KeyError: They have no such module.
        """
        module, _, leaf = ours.rpartition(".")
        leaves = self.leaves.get(kind_of(module), {})
        return self._module(module, grid) + leaves.get(leaf, f".{leaf}")

    def layout(self, ours: str) -> Layout:
        """How they lay out one of our parameters."""
        module, _, leaf = ours.rpartition(".")
        return self.layouts.get(kind_of(module), Layout.SAME) if leaf == "weight" else Layout.SAME

    def _module(self, ours: str, grid: Grid) -> str:
        match ours.split("."):
            case [("down" | "up") as way, level, ("blocks" | "attentions") as group, index, layer]:
                layers = self.block if group == "blocks" else self.attention
                numbers = grid.coordinates(way, int(level), int(index))
                return self.places[f"{way}.{group}"].format(layer=layers[layer], **numbers)
            case [("down" | "up") as way, level, ("downsample" | "upsample") as resample, "conv"]:
                numbers = grid.coordinates(way, int(level), grid.blocks)
                return self.places[f"{way}.{resample}"].format(**numbers)
            case ["mid", module, layer]:
                layers = self.attention if module == "attention" else self.block
                return self.places[f"mid.{module}"].format(layer=layers[layer])
        return self.places[ours]


def kind_of(module: str) -> Kind:
    """Kind of one of our modules that hold parameters."""
    match module.split(".")[-1]:
        case "norm" | "norm1" | "norm2":
            return Kind.NORM
        case "shortcut":
            return Kind.SHORTCUT
        case "query" | "key" | "value" | "out":
            return Kind.PROJECTION
        case "class_embed":
            return Kind.EMBEDDING
        case "time_proj":
            return Kind.DENSE
    return Kind.DENSE if module.startswith("time_embed.") else Kind.CONV


@dataclass(frozen=True)
class Correspondence:
    """One tensor of another code base and what it is here.

    Attributes:
        theirs: Their name.
        ours: Our parameters in it: one, or query, key and value of an attention.
        layout: How they lay it out.
        groups: Where several of ours share a tensor: it holds so many groups of rows, each with rows of
            all of ours in turn.
    """

    theirs: str
    ours: tuple[str, ...]
    layout: Layout
    groups: int

    def to_theirs(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Their tensor, made of ours."""
        if len(self.ours) == 1:
            return self.layout.to_theirs(tensors[self.ours[0]])
        parts = (tensors[name] for name in self.ours)
        grouped = [part.reshape(self.groups, -1, *part.shape[1:]) for part in parts]
        return self.layout.to_theirs(torch.stack(grouped, dim=1).flatten(0, 2))

    def to_ours(self, tensor: Tensor) -> dict[str, Tensor]:
        """Our tensors by name, taken from theirs."""
        whole = self.layout.to_ours(tensor)
        if len(self.ours) == 1:
            return {self.ours[0]: whole}
        parts = whole.reshape(self.groups, len(self.ours), -1, *whole.shape[1:]).unbind(1)
        return {name: part.flatten(0, 1) for name, part in zip(self.ours, parts, strict=True)}


@dataclass(frozen=True)
class Network:
    """Our network as far as its parameters go.

    Attributes:
        config: Its configuration.
        grid: Which modules it has.
        shapes: Shapes of its parameters by name, in our order.
    """

    config: UNetConfig
    grid: Grid
    shapes: Mapping[str, torch.Size]

    @classmethod
    def of(cls, config: UNetConfig) -> Self:
        """The network of a configuration; its parameters are not allocated."""
        with torch.device("meta"):
            shapes = {name: parameter.shape for name, parameter in UNet(config).named_parameters()}
        return cls(config, Grid.of(config), shapes)


def correspondences(naming: Naming, network: Network) -> list[Correspondence]:
    """The bijection between another code base's tensors and our parameters, in our order.

    Args:
        naming: How they name and lay out modules.
        network: Ours.

    Raises:
        KeyError: They lack a module of this network.
    """
    together: dict[str, list[str]] = {}
    for ours in network.shapes:
        together.setdefault(naming.name(ours, network.grid), []).append(ours)
    table = []
    for theirs, ours_of_it in together.items():
        first = ours_of_it[0]
        fused = len(ours_of_it) > 1 and naming.fused_per_head
        groups = network.config.heads(network.shapes[first][0]) if fused else 1
        table.append(Correspondence(theirs, tuple(ours_of_it), naming.layout(first), groups))
    return table


def to_theirs(table: list[Correspondence], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name and lay out our tensors as they do; contiguous copies where the layout differs."""
    return {entry.theirs: entry.to_theirs(ours).contiguous() for entry in table}


def to_ours(table: list[Correspondence], theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take our tensors from theirs, which must fit the table; contiguous float32 copies."""
    return {
        name: tensor.to(torch.float32, copy=True).contiguous()
        for entry in table
        for name, tensor in entry.to_ours(theirs[entry.theirs]).items()
    }
