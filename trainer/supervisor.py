"""The supervisor of one node: starts the deepspeed launcher, guards it, and tells the truth about its end.

The launcher alone leaves orphans, exits 0 when it is killed, and hands signals to the ranks one after the
other. So the stop decision is published as a file all ranks read, success is what rank 0 itself wrote down,
and whatever still runs at the end is killed.
"""

import base64
import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Final

import psutil
import torch

from data_pipeline.errors import ExitCode, UserError
from trainer import extensions
from trainer.occupancy import occupied
from trainer.preflight import check_inputs
from trainer.profiler import parse_profile
from trainer.recipe import load_recipe
from trainer.run import Run
from trainer.stop import CONTROL_VARIABLE, SUPERVISOR_VARIABLE
from trainer.tether import tethered

log = logging.getLogger(__name__)

_POLL_SECONDS: Final = 0.2
GRACE_SECONDS: Final = 90.0
"""How long ranks may take to save and end once a stop was asked for."""


@dataclass(frozen=True)
class Placement:
    """Which part of the job this node is.

    Attributes:
        ranks: Processes on this node; None for one per GPU, or two on a CPU machine.
        num_nodes: Nodes of the job, each with its own supervisor and as many ranks.
        node_rank: Number of this node.
        master_addr: Where rank 0 listens.
        master_port: Its port; None to choose a free one (one node only).
    """

    ranks: int | None = None
    num_nodes: int = 1
    node_rank: int = 0
    master_addr: str = "127.0.0.1"
    master_port: int | None = None


def supervise(
    recipe_name: str,
    overrides: Sequence[str],
    placement: Placement,
    restarts: int = 2,
    *,
    allowed: Sequence[str] = (),
    profile: str | None = None,
) -> ExitCode:
    """Train on this node until the run is finished, stopped, or beyond mending.

    Args:
        recipe_name: A shipped recipe's name or a YAML file.
        overrides: `section.key=value` settings.
        placement: This node's part of the job.
        restarts: How often crashed ranks are started again; they resume from the newest checkpoint.
        allowed: Keys of the recipe that may differ from those of the run so far.
        profile: Steps to profile, as `trainer.profiler.parse_profile` reads them.

    Returns:
        The exit code of the command.

    Raises:
        UserError: Recipe, data, run directory or port cannot be used.
    """
    recipe = load_recipe(recipe_name, overrides)
    gpus = torch.cuda.device_count()
    ranks = placement.ranks or gpus or min(2, os.cpu_count() or 1)
    if gpus and ranks > gpus:
        raise UserError(
            f"--ranks {ranks}: a rank needs a GPU of its own, and this node has {gpus}; give at most so many "
            "(CUDA_VISIBLE_DEVICES= in the environment trains on the CPU)"
        )
    run = Run(recipe.run)
    if profile:
        parse_profile(profile)  # a mistake is told before anything starts
    check_inputs(recipe, run, ranks * placement.num_nodes, allowed)
    port = _choose_port(placement)
    if not torch.cuda.is_available():
        extensions.prepare()
    arguments = [recipe_name, *overrides, *(f"--allow={key}" for key in allowed)]
    arguments += [f"--profile={profile}"] if profile else []
    # One supervisor a job holds the run, through all restarts of its ranks.
    held = occupied(run) if placement.node_rank == 0 else contextlib.nullcontext()
    with held, _StopSignals() as stop:
        for restart in range(restarts + 1):
            code = _launch_once(arguments, placement, ranks, port, stop)
            if code is not ExitCode.FAILED or stop.asked:
                return code
            ended = run.ended()
            if restart == restarts or (ended is not None and ended.outcome == "failed"):
                break
            log.warning("training failed; restart %d of %d from the newest checkpoint", restart + 1, restarts)
    attempt = run.newest_attempt() if placement.node_rank == 0 else 0
    if attempt and run.ended() is None:
        run.fail_attempt(attempt)
    return ExitCode.FAILED


class _StopSignals:
    """SIGTERM, SIGINT and SIGUSR1 as a flag; a second one asks for an end at once."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.count = 0
        self._previous: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> "_StopSignals":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def asked(self) -> bool:
        return self.count > 0

    def wait(self, seconds: float) -> None:
        self._event.wait(seconds)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        self._event.set()


def _launch_once(
    arguments: Sequence[str], placement: Placement, ranks: int, port: int, stop: _StopSignals
) -> ExitCode:
    """Run the launcher once; return what its ranks wrote down, or FAILED if they could not."""
    with tempfile.TemporaryDirectory(prefix="ddpm-control-") as control:
        command = _launcher_command(placement, ranks, port)
        command += ["--module", "--no_local_rank", "trainer", "worker", *arguments]
        process = subprocess.Popen(
            tethered(command), env=_environment(control, ranks), start_new_session=True
        )
        try:
            _guard(process, Path(control), stop)
        finally:
            _end_all(control)
            process.wait()
            _remove_shared_memory(placement, port)
        return _outcome(Path(control))


def _outcome(control: Path) -> ExitCode:
    """What the ranks of this node wrote down: a mistake that any of them met, else the word of the first."""
    said = {file.name: ExitCode(int(file.read_text())) for file in control.glob("outcome-*")}
    if ExitCode.USER_MISTAKE in said.values():
        return ExitCode.USER_MISTAKE
    return said.get("outcome-0", ExitCode.FAILED)


def _guard(process: "subprocess.Popen[bytes]", control: Path, stop: _StopSignals) -> None:
    """Wait for the launcher; pass a stop on and enforce its deadline."""
    deadline: float | None = None
    while process.poll() is None:
        if not stop.asked:
            stop.wait(_POLL_SECONDS)
            continue
        if deadline is None:
            log.info("stopping: ranks save a checkpoint at the next step (again to end at once)")
            (control / "stop").touch()
            deadline = time.monotonic() + GRACE_SECONDS
        if stop.count > 1 or time.monotonic() > deadline:
            return
        try:
            process.wait(_POLL_SECONDS)
        except subprocess.TimeoutExpired:
            continue


def _end_all(control: str) -> None:
    """Kill every process of this launch: they carry its control folder in their environment."""
    found = [process for process in psutil.process_iter() if _belongs(process, control)]
    for process in found:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(found, timeout=10)


def _remove_shared_memory(placement: Placement, port: int) -> None:
    """Remove the buffers that DeepSpeed's CPU ranks share: 64 MiB a rank, which a kill leaves behind."""
    for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{placement.master_addr}_{port}_*"):
        buffer.unlink(missing_ok=True)


def _belongs(process: psutil.Process, control: str) -> bool:
    try:
        return process.environ().get(CONTROL_VARIABLE) == control
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return False


def _launcher_command(placement: Placement, ranks: int, port: int) -> list[str]:
    """Command line of DeepSpeed's launcher of one node.

    The `deepspeed` program would only start this one: it adds ssh to other nodes, which have supervisors of
    their own here, and hides how its child ended.
    """
    # The launcher counts other nodes' devices and makes its own node's visible: those this process sees.
    world = {f"node{number}": _visible_devices(ranks) for number in range(placement.num_nodes)}
    return [
        *(sys.executable, "-u", "-m", "deepspeed.launcher.launch"),
        f"--world_info={base64.urlsafe_b64encode(json.dumps(world).encode()).decode()}",
        f"--node_rank={placement.node_rank}",
        f"--master_addr={placement.master_addr}",
        f"--master_port={port}",
        "--log_level=critical",  # below it, it repeats the whole command after whatever a rank has said
    ]


def _visible_devices(ranks: int) -> list[str]:
    """What the launcher shall put into CUDA_VISIBLE_DEVICES, one for each rank of this node."""
    if not torch.cuda.is_available():
        return ["-1"] * ranks  # none, also where there are some that the user has hidden
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = given.split(",") if given else [str(number) for number in range(torch.cuda.device_count())]
    return devices[:ranks]


def _environment(control: str, ranks: int) -> dict[str, str]:
    environment = {**os.environ, CONTROL_VARIABLE: control, SUPERVISOR_VARIABLE: str(os.getpid())}
    if not torch.cuda.is_available():
        environment |= {"DS_ACCELERATOR": "cpu", **extensions.environment()}
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    return environment


def _choose_port(placement: Placement) -> int:
    """Return the given port if it is free on the node that listens, or a free one."""
    if not 0 <= placement.node_rank < placement.num_nodes:
        raise UserError(
            f"--node_rank {placement.node_rank}: nodes are numbered 0 to {placement.num_nodes - 1}"
        )
    with socket.socket() as probe:
        if placement.master_port is None:
            if placement.num_nodes > 1:
                raise UserError("--master_port: several nodes must be given the same free port")
            probe.bind(("127.0.0.1", 0))
            return int(probe.getsockname()[1])
        if placement.node_rank == 0:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", placement.master_port))
            except OSError as error:
                raise UserError(
                    f"--master_port {placement.master_port}: {error.strerror}; choose a free one or none"
                ) from error
        return placement.master_port
