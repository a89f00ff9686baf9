"""Self-checks of a machine: what the system needs, what it found, and what to do about what is missing."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Final

from data_pipeline.errors import UserError
from data_pipeline.storage import Storage
from trainer import extensions

if TYPE_CHECKING:
    import torch

GIB: Final = 1 << 30
_IMPORT_SECONDS: Final = 120.0
_TORCH_MINIMUM: Final = (2, 14)
_TRAIN_EXTRA: Final = "pip install 'ddpm-foundry[train]'"


class Status(StrEnum):
    """How a check came out; only `FAIL` stands in the way of running."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        name: What was looked at.
        status: How it came out.
        detail: What was found, in one line.
        remedy: What to do about it; empty if nothing is to be done.
    """

    name: str
    status: Status
    detail: str
    remedy: str = ""


def examine(store: str | None = None, features: str = "effnetlite0") -> Iterator[Finding]:
    """Run all checks, yielding each finding as soon as it is known.

    Args:
        store: URL of a place to read and write in (the run's or a bucket's); None leaves storage out.
        features: The feature network of evaluation, as for `ddpm eval --features`.
    """
    checks: list[Callable[[], Finding]] = [
        check_python,
        check_torch,
        check_devices,
        check_bfloat16,
        check_deepspeed,
        check_operator,
        check_compiler,
        lambda: check_features(features),
        lambda: check_disk(Path.cwd()),
        lambda: check_shared_memory(Path("/dev/shm")),
    ]
    if store is not None:
        checks.append(lambda: check_storage(store))
    for check in checks:
        yield check()


def check_python() -> Finding:
    """Python's version (an older one than 3.11 cannot even read this file)."""
    return Finding("python", Status.OK, f"{platform.python_version()} at {sys.executable}")


def check_torch() -> Finding:
    """PyTorch's version and build."""
    import torch

    version = torch.__version__
    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    if tuple(int(part) for part in version.split(".")[:2]) < _TORCH_MINIMUM:
        return Finding("torch", Status.FAIL, version, "pip install --upgrade ddpm-foundry")
    return Finding("torch", Status.OK, f"{version}, built for {built_for}")


def check_devices() -> Finding:
    """CPUs, GPUs and whether GPUs can talk to each other."""
    import torch
    import torch.distributed as dist

    cores = len(os.sched_getaffinity(0))
    if not torch.cuda.is_available():
        if Path("/dev/nvidiactl").exists():
            remedy = "check nvidia-smi: the driver must be as new as the CUDA version of torch"
            return Finding("devices", Status.FAIL, "an NVIDIA driver, but torch cannot use it", remedy)
        return Finding("devices", Status.OK, f"{cores} CPU cores, no GPU; processes talk by gloo")
    names = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    detail = f"{cores} CPU cores, {torch.cuda.device_count()} GPUs ({names})"
    if not dist.is_nccl_available():
        return Finding("devices", Status.FAIL, f"{detail}, no NCCL", "install a CUDA build of torch")
    return Finding("devices", Status.OK, f"{detail}, NCCL")


def check_bfloat16() -> Finding:
    """Multiply two matrices in float32 and in bfloat16: is it right, and is it worth it?

    The error of a product of K = 256 terms rounded to bfloat16 (8 bits of mantissa) relative to its norm is
    about 2^-9; eight times that counts as wrong.
    """
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(256, 256, generator=generator).to(device) for _ in range(2))
    exact = left @ right
    product = (left.bfloat16() @ right.bfloat16()).float()
    error = float((product - exact).norm() / exact.norm())
    if not error < 2**-6:
        detail = f"a product is off by {error:.1%}"
        return Finding("bf16", Status.FAIL, detail, "train with fp32 on this device")
    seconds = _product_seconds(left.bfloat16(), right.bfloat16())
    ratio = seconds / _product_seconds(left, right)
    compared = f"{ratio:.1f} times slower" if ratio > 1 else f"{1 / ratio:.1f} times faster"
    detail = f"right (error {error:.1e}), a 256x256 product is {compared} than in fp32 on {device.type}"
    if ratio > 1:
        return Finding("bf16", Status.WARN, detail, "train with fp32 on this device")
    return Finding("bf16", Status.OK, detail)


def check_deepspeed() -> Finding:
    """Whether DeepSpeed can be imported (tried in a process of its own: it may crash or hang)."""
    try:
        version = importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        return Finding("deepspeed", Status.WARN, "not installed: evaluation only", _TRAIN_EXTRA)
    try:
        done = subprocess.run(
            [sys.executable, "-c", "import deepspeed"],
            capture_output=True,
            text=True,
            timeout=_IMPORT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        detail = f"{version}: import takes more than {_IMPORT_SECONDS:.0f} s"
        return Finding("deepspeed", Status.FAIL, detail, "pip install --force-reinstall deepspeed")
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return Finding("deepspeed", Status.FAIL, f"{version}: import fails: {last}", _TRAIN_EXTRA)
    return Finding("deepspeed", Status.OK, version)


def check_operator() -> Finding:
    """Whether DeepSpeed's CPU operator is compiled (GPU training does without)."""
    name = "deepspeed operator"
    try:
        folder, built = extensions.folder(), extensions.ready()
    except UserError as error:
        return Finding(name, Status.WARN, str(error), _TRAIN_EXTRA)
    if built:
        return Finding(name, Status.OK, f"built in {folder}")
    remedy = f"{sys.executable} -m trainer.extensions"
    return Finding(name, Status.WARN, "not built yet: the first run on the CPU compiles it", remedy)


def check_compiler() -> Finding:
    """The tools that build it."""
    tools = {"c++": shutil.which(os.environ.get("CXX", "c++")), "ninja": _ninja()}
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    missing = [tool for tool, path in tools.items() if path is None]
    missing += [] if headers.is_file() else ["Python.h"]
    if missing:
        remedy = f"apt-get install -y g++ python3-dev; {_TRAIN_EXTRA} (brings ninja)"
        return Finding("compiler", Status.WARN, f"missing: {', '.join(missing)}", remedy)
    return Finding("compiler", Status.OK, ", ".join(f"{tool} at {path}" for tool, path in tools.items()))


def check_features(features: str) -> Finding:
    """The feature network's weights, by loading them and checking their hash."""
    import torch

    from eval.features import open_network, parse_choice

    try:
        network = open_network(parse_choice(features), torch.device("cpu"))
    except UserError as error:
        return Finding("features", Status.FAIL, str(error), "mend --features, or fetch the file again")
    identity = network.identity
    return Finding("features", Status.OK, f"{identity.name}, sha256 {identity.sha256[:12]}... as expected")


def check_disk(folder: Path) -> Finding:
    """Free space where the command runs."""
    free = shutil.disk_usage(folder).free
    return _by_size("disk", free, f"free in {folder}", 5 * GIB, 1 * GIB, "free some space or work elsewhere")


def check_shared_memory(folder: Path) -> Finding:
    """Room for the buffers that processes of one machine share."""
    if not folder.is_dir():
        return Finding("shared memory", Status.FAIL, f"{folder} is missing", "mount a tmpfs there")
    remedy = "containers: --shm-size=1g, or a memory emptyDir at /dev/shm"
    free = shutil.disk_usage(folder).free
    return _by_size("shared memory", free, f"free in {folder}", GIB, GIB // 16, remedy)


def check_storage(url: str) -> Finding:
    """Write, read back, create-only and delete, leaving nothing behind."""
    name = "storage"
    try:
        storage = Storage(url)
        seconds, intact = _round_trip(storage)
        storage.prove_create_only()
    except UserError as error:
        return Finding(name, Status.FAIL, str(error), "mend the URL, the credentials or the permissions")
    except OSError as error:  # a StorageFault, or a path that is no folder
        return Finding(name, Status.FAIL, str(error), "check network, AWS_ENDPOINT_URL and the store itself")
    if not intact:
        return Finding(name, Status.FAIL, f"{url} returned other bytes than written", "use another store")
    detail = f"{url}: write, read, delete ({1000 * seconds:.0f} ms) and create-only work"
    if storage.retries:
        return Finding(name, Status.WARN, f"{detail}, after {storage.retries} retries", "check the network")
    return Finding(name, Status.OK, detail)


def _round_trip(storage: Storage) -> tuple[float, bool]:
    """Write, read and delete one small file; return the seconds it took and whether it came back whole."""
    name, data = f"doctor-{uuid.uuid4().hex}", os.urandom(64)
    started = time.perf_counter()
    storage.write(name, data)
    try:
        returned = storage.read(name)
    finally:
        storage.delete(name)
    return time.perf_counter() - started, returned == data


def _by_size(name: str, size: int, what: str, enough: int, least: int, remedy: str) -> Finding:
    detail = f"{size / GIB:.1f} GiB {what}"
    if size >= enough:
        return Finding(name, Status.OK, detail)
    return Finding(name, Status.WARN if size >= least else Status.FAIL, detail, remedy)


def _ninja() -> str | None:
    beside = Path(sys.executable).parent / "ninja"
    return str(beside) if beside.is_file() else shutil.which("ninja")


def _product_seconds(left: "torch.Tensor", right: "torch.Tensor", tries: int = 5) -> float:
    """Best wall time of a matrix product."""
    import torch

    best = float("inf")
    for _ in range(tries):
        started = time.perf_counter()
        left @ right
        if left.is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best
