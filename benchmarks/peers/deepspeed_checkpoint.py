"""DeepSpeed's `save_checkpoint`, as it comes: `torch.save` on the thread that trains, every rank its files.

The average of the weights, which DeepSpeed does not know, goes into `client_state`, as its documentation
says of what a training needs besides. DeepSpeed writes that on rank 0 alone; with several ranks the other
parts of a partitioned average are left out, which spares it their bytes.
"""

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.peers.distribution import LibraryPeer

DEEPSPEED: Final = LibraryPeer(
    name="deepspeed",
    distribution="deepspeed",
    source="https://deepspeed.readthedocs.io/en/latest/model-checkpointing.html",
)
_MODEL: Final = "mp_rank_*_model_states.pt"
_LATEST: Final = "latest"
_UNREADABLE: Final = (RuntimeError, ValueError, KeyError, OSError, EOFError, pickle.UnpicklingError)
"""What `torch.load` makes of a file that is cut short, in either of its formats."""


def save(engine: Any, folder: Path, tag: str, averages: Mapping[str, Sequence[Tensor]]) -> None:
    """Save everything that a training needs to go on; all ranks call this together.

    Args:
        engine: What `deepspeed.initialize` returned.
        folder: Of all checkpoints; `latest` in it names the newest.
        tag: The checkpoint's name.
        averages: By profile, this rank's part.
    """
    state = {"ema": {name: list(flats) for name, flats in averages.items()}}
    engine.save_checkpoint(str(folder), tag, client_state=state, save_latest=True)


@dataclass(frozen=True)
class Held:
    """What the files of one rank hold.

    Attributes:
        weights: The network's own, by name.
        roles: By our role ("master", "exp_avg", "exp_avg_sq", "ema.NAME"), one flat tensor per group.
    """

    weights: dict[str, Tensor]
    roles: dict[str, list[Tensor]]


def held(folder: Path, tag: str) -> Held:
    """Read what a single rank saved at ZeRO 1 or 2."""
    (states,) = (folder / tag).glob(_MODEL)
    (shard,) = (folder / tag).glob(_shard(0))
    model = _load(states)
    optimizer = _load(shard)["optimizer_state_dict"]
    masters = list(optimizer["single_partition_of_fp32_groups"])
    moments = optimizer["base_optimizer_state"]["state"]  # by number of the group: each has one flat tensor
    roles = {"master": masters}
    for role in ("exp_avg", "exp_avg_sq"):
        roles[role] = [moments[number][role] for number in range(len(masters))]
    roles |= {f"ema.{name}": list(flats) for name, flats in model["ema"].items()}
    return Held(dict(model["module"]), roles)


def damage(folder: Path, ranks: int) -> str | None:
    """Tell what is wrong with the checkpoint that `latest` names; None if all of its files can be read.

    Args:
        folder: As in `save`.
        ranks: How many wrote it.
    """
    latest = folder / _LATEST
    if not latest.exists():
        return "latest is missing"
    tag = latest.read_text()
    if not tag:
        return "latest is empty"
    for pattern in (_MODEL, *map(_shard, range(ranks))):
        found = list((folder / tag).glob(pattern))
        if not found:
            return f"{tag}/{pattern} is missing"
        for file in found:
            try:
                _load(file)
            except _UNREADABLE as error:
                return f"{tag}/{file.name} does not load: {type(error).__name__}"
    return None


def size(folder: Path, tag: str) -> int:
    """Bytes of all files of a checkpoint."""
    return sum(file.stat().st_size for file in (folder / tag).rglob("*") if file.is_file())


def _shard(rank: int) -> str:
    return f"*zero_pp_rank_{rank}_mp_rank_*_optim_states.pt"


def _load(file: Path) -> Any:
    return torch.load(file, map_location="cpu", weights_only=False)
