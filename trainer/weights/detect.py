"""Which code base foreign weights come from, and what it takes for granted about the network."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from torch import Tensor

from data_pipeline.errors import UserError
from trainer.unet_config import Profile, UNetConfig
from trainer.weights.formats import diffusers, openai, pesser, tensorflow
from trainer.weights.names import Naming, Network
from trainer.weights.source import Source


class Format(StrEnum):
    """The code bases whose weights are known."""

    DIFFUSERS = "diffusers"
    PESSER = "pesser"
    OPENAI = "openai"
    TENSORFLOW = "tensorflow"


@dataclass(frozen=True)
class Assumptions:
    """What a code base does and its files do not tell.

    Attributes:
        profiles: Profiles that compute what it computes.
        norm_groups: Its groups per normalisation.
        one_head: Whether its attention has a single head.
        space_to_depth: Whether it can have space-to-depth.
    """

    profiles: tuple[Profile, ...]
    norm_groups: int = 32
    one_head: bool = False
    space_to_depth: bool = False


NAMINGS: Final = (
    (Format.DIFFUSERS, diffusers.NAMING),
    (Format.DIFFUSERS, diffusers.OLD_ATTENTION),
    (Format.PESSER, pesser.NAMING),
    (Format.OPENAI, openai.NAMING),
)
ASSUMPTIONS: Final = {
    Format.PESSER: Assumptions((Profile.HO,), one_head=True),
    Format.OPENAI: Assumptions((Profile.OPENAI, Profile.DIFFUSERS)),
    Format.TENSORFLOW: Assumptions((Profile.HO,), one_head=True, space_to_depth=True),
}
"""diffusers is absent: its config.json tells."""


@dataclass(frozen=True)
class Detected:
    """Foreign weights whose origin is known.

    Attributes:
        format: The code base.
        naming: Its names.
        tensors: By their name, without what is no weight.
        averages: The same of moving averages; empty if there are none.
    """

    format: Format
    naming: Naming
    tensors: dict[str, Tensor]
    averages: dict[str, Tensor]


def detect(source: Source, network: Network) -> Detected:
    """Find out by the names where weights come from.

    Args:
        source: The weights.
        network: Ours; other code bases' names are made for it, and most of them tell even where the recipe is
            wrong about the network.

    Raises:
        UserError: The names are those of no known code base.
    """
    tensors, averages = source.tensors, source.averages
    if (sorted_ := tensorflow.sort_variables(tensors)) is not None:
        weights = sorted_.weights or sorted_.averages
        return Detected(Format.TENSORFLOW, sorted_.naming, weights, sorted_.averages)
    found, shared = max(
        (((kind, naming), len(_names(naming, network).intersection(tensors))) for kind, naming in NAMINGS),
        key=lambda candidate: candidate[1],
    )
    if not shared:
        first = next(iter(tensors), "nothing")
        known = ", ".join(Format)
        raise UserError(
            f"{source.where}: these are weights of no known code base ({known}): it holds {first} …"
        )
    return Detected(*found, tensors, averages)


def _names(naming: Naming, network: Network) -> set[str]:
    """Their names of our network's tensors; not all code bases have labels."""
    known = (ours for ours in network.shapes if "class_embed" in naming.places or "class_embed" not in ours)
    return {naming.name(ours, network.grid) for ours in known}


def check_assumptions(kind: Format, config: UNetConfig, where: str) -> None:
    """Check what the file cannot tell: that the recipe's network computes what the code base computes.

    Raises:
        UserError: It does not; the recipe's key is named.
    """
    if kind not in ASSUMPTIONS:
        return
    wanted = ASSUMPTIONS[kind]
    origin = f"{where}: weights of {kind}"
    if config.profile not in wanted.profiles:
        raise UserError(
            f"{origin} follow other conventions than model.profile={config.profile}; set "
            f"model.profile={wanted.profiles[0]}"
        )
    if config.norm_groups != wanted.norm_groups:
        raise UserError(
            f"{origin} normalise in {wanted.norm_groups} groups, the recipe in {config.norm_groups}; set "
            f"model.norm_groups={wanted.norm_groups}"
        )
    if config.block_size != 1 and not wanted.space_to_depth:
        raise UserError(f"{origin} know no space-to-depth; set model.block_size=1")
    if wanted.one_head and any(config.heads(width) != 1 for width in config.attention_widths):
        raise UserError(f"{origin} attend with one head; set model.num_heads=1")
