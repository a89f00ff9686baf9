"""Options that the benchmarks share."""

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

import torch

from benchmarks.harness import OURS, Mode, Precision
from benchmarks.network import CIFAR10, SMALL
from benchmarks.peers import PEERS
from benchmarks.peers.base import Peer
from benchmarks.report import bf16_in_hardware
from trainer.unet import UNetConfig

_E = TypeVar("_E", bound=StrEnum)


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        batch: Images per call, by precision.
        modes: How the networks run, by precision.
        repeats: Timed calls of each contender.
        peers: Those asked for, installed or not.
        compiled: Names of those whose networks are compiled, `OURS` among them.
        small: Take a small network, about which no bar is.
        profile: Whether to profile our step.
        json: Where to write all samples; None: nowhere.
    """

    batch: dict[Precision, int]
    modes: dict[Precision, tuple[Mode, ...]]
    repeats: int
    peers: tuple[Peer, ...]
    compiled: tuple[str, ...]
    small: bool
    profile: bool
    json: Path | None

    @property
    def config(self) -> UNetConfig:
        """The network that is measured."""
        return SMALL if self.small else CIFAR10

    @property
    def network(self) -> str:
        """Its name."""
        return "small" if self.small else "cifar10"

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """In the order they are measured."""
        return tuple(self.modes)

    @property
    def prefix(self) -> str:
        """Of the bars' names: tells a small network's numbers from those that count."""
        return "small-" if self.small else ""

    def present(self) -> list[Peer]:
        """The peers that are installed."""
        return [peer for peer in self.peers if peer.version is not None]

    def taking_part(self, precision: Precision) -> list[Peer]:
        """The installed peers that are measured at this precision.

        Where bf16 is emulated, a step takes many seconds: then only those that bars are about.
        """
        all_of_them = precision is not Precision.BF16 or bf16_in_hardware()
        return [peer for peer in self.present() if all_of_them or peer.comparable]

    def missing(self) -> list[str]:
        """The names of those that are not."""
        return [peer.name for peer in self.peers if peer.version is None]

    def modes_of(self, contender: str, precision: Precision) -> tuple[Mode, ...]:
        """How this contender runs at this precision; only ours can be compiled block by block."""
        chosen = self.modes[precision]
        if contender not in self.compiled:
            return tuple(mode for mode in chosen if mode is Mode.EAGER)
        return tuple(mode for mode in chosen if mode is not Mode.BLOCKS or contender == OURS)

    def as_settings(self) -> dict[str, str | int | list[str]]:
        """For the JSON file."""
        return {
            "repeats": self.repeats,
            "peers": [peer.name for peer in self.peers],
            "compiled": list(self.compiled),
            **{f"batch-{precision}": size for precision, size in self.batch.items()},
            **{
                f"modes-{precision}": [str(mode) for mode in modes] for precision, modes in self.modes.items()
            },
        }


def parser(name: str, description: str, *, batch: int) -> argparse.ArgumentParser:
    """The options every benchmark has.

    Args:
        name: Of the benchmark's module.
        description: What it measures.
        batch: Images per call by default.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    add = parser.add_argument
    add("--batch", type=_positive, default=batch, metavar="N", help=f"images per call (default {batch})")
    add(
        "--bf16-batch",
        type=_positive,
        metavar="N",
        help="images per call in bf16 (default: --batch, or 1 where bf16 is emulated)",
    )
    add("--repeats", type=_positive, default=5, metavar="N", help="timed calls of each (default 5)")
    add("--precision", type=_several(Precision), default=tuple(Precision), help="default fp32,bf16")
    add(
        "--modes",
        type=_several(Mode),
        default=(Mode.EAGER, Mode.COMPILED),
        help="of eager, compiled, and blocks: ours compiled block by block (default eager,compiled)",
    )
    add(
        "--bf16-modes",
        type=_several(Mode),
        help="modes in bf16 (default: --modes, or eager where bf16 is emulated)",
    )
    add("--peers", type=_names(PEERS), default=tuple(PEERS), help=f"default {','.join(PEERS)}")
    add(
        "--compiled",
        type=_names([OURS, *PEERS]),
        default=(OURS, "diffusers"),
        help=f"who is compiled, of {OURS} and the peers (default {OURS},diffusers)",
    )
    add("--threads", type=_positive, metavar="N", help="threads of torch (default: its own choice)")
    add("--small", action="store_true", help="a small network, about which no bar is")
    add("--no-profile", action="store_true", help="leave out the table of operators")
    add("--json", type=Path, metavar="FILE", help="write all samples here")
    return parser


def read(arguments: argparse.Namespace) -> Options:
    """Turn parsed arguments into options, and set torch's threads."""
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    emulated = not bf16_in_hardware()
    bf16_batch = arguments.bf16_batch or (1 if emulated else arguments.batch)
    bf16_modes = arguments.bf16_modes or ((Mode.EAGER,) if emulated else arguments.modes)
    modes = {Precision.FP32: arguments.modes, Precision.BF16: bf16_modes}
    return Options(
        batch={Precision.FP32: arguments.batch, Precision.BF16: bf16_batch},
        modes={precision: modes[precision] for precision in arguments.precision},
        repeats=arguments.repeats,
        peers=tuple(PEERS[name] for name in arguments.peers),
        compiled=arguments.compiled,
        small=arguments.small,
        profile=not arguments.no_profile,
        json=arguments.json,
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def _several(kind: type[_E]) -> Callable[[str], tuple[_E, ...]]:
    """Reads names of an enum, divided by commas."""
    names = _names([str(member) for member in kind])
    return lambda text: tuple(kind(name) for name in names(text))


def _names(allowed: Iterable[str]) -> Callable[[str], tuple[str, ...]]:
    """Reads names divided by commas."""
    known = list(allowed)

    def read_list(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
        return names

    return read_list
