"""Which part of the training state one rank owns, whatever ZeRO stage divided it.

A partition is a list of flat tensors (*spans*) of float32 master weights, Adam's moments laid out alike, and
the *pieces*: which range of which parameter lies where. Checkpoints, averages and norms see nothing else.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn

from trainer.checkpoint import Slice

ADAM_ROLES: Final = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Piece:
    """The range [start, stop) of a flattened parameter, and where it lies.

    Attributes:
        parameter: Its name.
        start: First number within the parameter.
        stop: One past the last.
        span: Number of the span.
        offset: First number within the span.
    """

    parameter: str
    start: int
    stop: int
    span: int
    offset: int

    @property
    def place(self) -> slice:
        """Where it lies within its span."""
        return slice(self.offset, self.offset + self.stop - self.start)


@dataclass(frozen=True)
class Partition:
    """One rank's part of the state; all tensors are views of what is trained.

    Attributes:
        masters: 1-D weights in the precision of the masters; numbers beyond all pieces are padding, 0.
        moments: By role of `ADAM_ROLES`, laid out as `masters`.
        pieces: What lies where. Those of all ranks together cover every parameter once.
        common: What this rank needs whole though others save parts of it: at stage 0 every rank's moments.
    """

    masters: list[Tensor]
    moments: Mapping[str, list[Tensor]]
    pieces: list[Piece]
    common: list[Slice] = field(default_factory=list)

    def slices(self, averages: Mapping[str, Sequence[Tensor]]) -> list[Slice]:
        """Return what this rank saves.

        Args:
            averages: By EMA profile, tensors laid out as `masters`.
        """
        roles = {"master": self.masters, **self.moments}
        roles |= {f"ema.{name}": list(flats) for name, flats in averages.items()}
        return [self._slice(piece, roles) for piece in self.pieces]

    def targets(self, averages: Mapping[str, Sequence[Tensor]]) -> list[Slice]:
        """Return what this rank must load, `averages` as in `slices`; the tensors are filled in place."""
        if not self.common:
            return self.slices(averages)
        roles = {f"ema.{name}": flats for name, flats in averages.items()}
        return [*self.common, *(self._slice(piece, roles) for piece in self.pieces)]

    @staticmethod
    def _slice(piece: Piece, roles: Mapping[str, Sequence[Tensor]]) -> Slice:
        views = {role: flats[piece.span][piece.place].detach() for role, flats in roles.items()}
        return Slice(piece.parameter, piece.start, piece.stop, views)


def prime(adam: torch.optim.Adam, masters: Sequence[Tensor]) -> None:
    """Create Adam's state before its first step, so that it can be loaded into."""
    for master in masters:
        adam.state[master] = {
            "step": torch.zeros((), dtype=torch.float32, device=master.device),
            **{role: torch.zeros_like(master, memory_format=torch.preserve_format) for role in ADAM_ROLES},
        }


def of_whole_model(model: nn.Module, adam: torch.optim.Adam, rank: int, world: int) -> Partition:
    """ZeRO 0: every rank holds everything; it saves and averages the rank-th of equal parts of it."""
    parameters = dict(model.named_parameters())
    prime(adam, list(parameters.values()))
    total = sum(parameter.numel() for parameter in parameters.values())
    first, last = total * rank // world, total * (rank + 1) // world
    masters: list[Tensor] = []
    moments: dict[str, list[Tensor]] = {role: [] for role in ADAM_ROLES}
    pieces = []
    begin = 0
    for name, parameter in parameters.items():
        start, stop = max(first - begin, 0), min(last - begin, parameter.numel())
        begin += parameter.numel()
        if start < stop:
            pieces.append(Piece(name, start, stop, len(masters), 0))
            masters.append(parameter.detach().view(-1)[start:stop])
            for role in ADAM_ROLES:
                moments[role].append(adam.state[parameter][role].view(-1)[start:stop])
    common = [
        Slice(name, 0, parameter.numel(), {role: adam.state[parameter][role].view(-1) for role in ADAM_ROLES})
        for name, parameter in parameters.items()
    ]
    return Partition(masters, moments, pieces, common)


def of_zero_1_or_2(zero: Any, names: Mapping[int, str], adam: torch.optim.Adam) -> Partition:
    """ZeRO 1 and 2: each parameter group is one flat tensor, of which every rank owns an equal part.

    Args:
        zero: DeepSpeed's optimizer (runtime/zero/stage_1_and_2.py).
        names: Parameters' names by `id`.
        adam: The optimizer below it.
    """
    masters = list(zero.single_partition_of_fp32_groups)
    prime(adam, masters)
    zero._lazy_init_hp_params_optimizer_state()
    pieces = []
    for span, group in enumerate(zero.bit16_groups):
        for parameter in group:
            fragment = parameter._hp_mapping  # None where another rank owns all of it
            if fragment is not None:
                start, count = fragment.lp_fragment_address.start, fragment.lp_fragment_address.numel
                offset = fragment.hp_fragment_address.start
                pieces.append(Piece(names[id(parameter)], start, start + count, span, offset))
    return Partition(masters, _moments(adam, masters), pieces)


def of_zero_3(zero: Any, names: Mapping[int, str], adam: torch.optim.Adam, rank: int) -> Partition:
    """ZeRO 3: every parameter is divided into equal parts, one a rank, the last ones padded.

    Args:
        zero: DeepSpeed's optimizer (runtime/zero/stage3.py).
        names: Parameters' names by `id`.
        adam: The optimizer below it.
        rank: Of this process.
    """
    masters = list(zero.fp32_partitioned_groups_flat)
    prime(adam, masters)
    pieces = []
    for group in zero.fp16_groups:
        for parameter in group:
            span, offset, count = zero.grad_position[zero.get_param_id(parameter)]
            start = rank * count
            stop = min(start + count, parameter.ds_numel)
            if start < stop:
                pieces.append(Piece(names[id(parameter)], start, stop, span, offset))
    return Partition(masters, _moments(adam, masters), pieces)


def _moments(adam: torch.optim.Adam, masters: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    return {role: [adam.state[master][role] for master in masters] for role in ADAM_ROLES}
