"""Foreign weights from disk: files and folders to tensors, with nothing unpickled and every fault named."""

import json
import pickle
import struct
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from data_pipeline.errors import UserError

TORCH_SUFFIXES: Final = (".pt", ".pth", ".bin", ".ckpt")
SUFFIXES: Final = (*TORCH_SUFFIXES, ".safetensors", ".npz")
_FOLDER_FILES: Final = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
_DAMAGED: Final = (
    RuntimeError,
    EOFError,
    ValueError,
    KeyError,
    TypeError,
    IndexError,
    AttributeError,
    AssertionError,
    OverflowError,
    MemoryError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
    OSError,
)
"""What the readers of the formats raise over bytes that are not what they expect."""


@dataclass(frozen=True)
class Source:
    """What a file or folder of foreign weights holds.

    Attributes:
        where: Its path, for messages.
        tensors: By their name there, in the file's order.
        averages: The same of moving averages kept apart; empty if there are none.
        files: Every file of weights read, in the order read.
        unet_json: Content and path of the network's configuration beside the weights, if there is one.
        scheduler_json: The same of the diffusion process.
    """

    where: str
    tensors: dict[str, Tensor]
    averages: dict[str, Tensor]
    files: list[Path]
    unet_json: tuple[dict[str, Any], str] | None = None
    scheduler_json: tuple[dict[str, Any], str] | None = None


def open_source(place: str) -> Source:
    """Read foreign weights.

    Args:
        place: A file (`SUFFIXES`), or a diffusers folder: with `unet/` (and `unet_ema/`, `scheduler/`), or
            with config.json and diffusion_pytorch_model.* themselves.

    Raises:
        UserError: There is no such thing, or it is damaged, or could only be opened by running code in it.
    """
    path = Path(place)
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file():
        hint = "it must be local: download it first" if "://" in place or "/" in place else "check the path"
        raise UserError(f"{place}: no such file or folder; {hint}")
    return Source(place, read_tensors(path), {}, [path])


def _open_folder(folder: Path) -> Source:
    unet = folder / "unet" if (folder / "unet").is_dir() else folder
    files = [_weights_of(unet)]
    averages: dict[str, Tensor] = {}
    if (folder / "unet_ema").is_dir():
        files.append(_weights_of(folder / "unet_ema"))
        averages = read_tensors(files[-1])
    beside = folder / "scheduler" / "scheduler_config.json"
    return Source(
        str(folder),
        read_tensors(files[0]),
        averages,
        files,
        unet_json=_read_json(unet / "config.json", required=True),
        scheduler_json=_read_json(beside if beside.exists() else folder / "scheduler_config.json"),
    )


def _weights_of(folder: Path) -> Path:
    for name in _FOLDER_FILES:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder}: no diffusers folder: it holds neither {' nor '.join(_FOLDER_FILES)}")


def _read_json(path: Path, required: bool = False) -> tuple[dict[str, Any], str] | None:
    if not path.exists() and not required:
        return None
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); a diffusers folder has it") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); the file is damaged") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object; the file is damaged")
    return content, str(path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read one file's tensors by name; nothing in it is run.

    Raises:
        UserError: The file is of no known kind, damaged, or holds something else than named tensors.
    """
    try:
        if path.suffix in TORCH_SUFFIXES:
            return _state_dict(_unpickle_tensors(path), str(path))
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        if path.suffix == ".npz":
            return _read_npz(path)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        # weights_only refuses by this error, and the reader meets garbage with it too.
        raise UserError(
            f"{path}: cannot be read without running code in it, or is damaged; save its state dict alone "
            "(torch.save(model.state_dict(), …)) or as .safetensors"
        ) from error
    except (SafetensorError, *_DAMAGED) as error:
        raise UserError(
            f"{path}: cannot be read as {path.suffix} ({_one_line(error)}); the file is damaged"
        ) from error
    raise UserError(f"{path}: no known kind of weights file; known: {', '.join(SUFFIXES)}")


def _unpickle_tensors(path: Path) -> object:
    """The content of a torch file by torch's restricted unpickler: tensors and plain data only."""
    with warnings.catch_warnings():
        # It warns of whatever is unusual; what cannot be used is refused in one line of ours.
        warnings.simplefilter("ignore", UserWarning)
        return torch.load(path, map_location="cpu", weights_only=True)


def _state_dict(content: object, where: str) -> dict[str, Tensor]:
    """The content of a torch file, if it is tensors by name and nothing else.

    Raises:
        UserError: It is not.
    """
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"{where}: holds no state dict ({type(content).__name__})")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            inner = [str(key) for key, found in content.items() if isinstance(found, Mapping)]
            hint = f"; save one part alone: {', '.join(inner[:5])}" if inner else ""
            raise UserError(f"{where}: {name!r} is no tensor ({type(value).__name__}){hint}")
    return dict(content)


def _read_npz(path: Path) -> dict[str, Tensor]:
    """Arrays of a .npz by name.

    Raises:
        UserError: An array would have to be unpickled, or holds no numbers.
    """
    found = {}
    with np.load(path, allow_pickle=False) as archive:
        for name in archive.files:
            try:
                array = archive[name]
            except ValueError as error:
                raise UserError(
                    f"{path}: {name} cannot be read without unpickling it ({_one_line(error)})"
                ) from error
            if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
                raise UserError(f"{path}: {name} is no array of numbers")
            found[name] = torch.from_numpy(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="))))
    return found


def _one_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
