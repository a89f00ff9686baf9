"""What the commands of `ddpm eval` share: joining processes, and being asked to stop."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from eval.team import Team

FeaturesOption = Annotated[
    str | None,
    typer.Option(
        help="Use this network instead: effnetlite0, inception=PATH_OR_URL, … (docs/evaluation.md)."
    ),
]
Threads = Annotated[
    int | None, typer.Option(min=1, help="CPU threads of this process. Default: as torch and OpenMP choose.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]


@contextmanager
def joined_team(threads: int | None) -> "Iterator[Team]":
    """Join the processes of this evaluation; SIGTERM, SIGINT and SIGUSR1 ask it to stop.

    A second Ctrl-C ends the process at once; its claim then runs out by itself.
    """
    import torch

    from eval.team import Team

    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop.set()
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = {number: signal.signal(number, on_signal) for number in signals}
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        with Team(stop) as team:
            yield team
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
