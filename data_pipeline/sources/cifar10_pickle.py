"""A batch of CIFAR-10's python version -> the records of its binary version; nothing it names is run.

A pickle is a program that may name any function. Here only the operations and names that a batch needs are
admitted: the names are those that put a NumPy array together again, and they lead to stand-ins that just
remember what they are given.
"""

import io
import pickle
import pickletools
import re
from typing import Any, Final

import numpy as np

from data_pipeline.decode import UInt8Array
from data_pipeline.errors import UserError

PIXELS: Final = 3 * 32 * 32
RECORD: Final = 1 + PIXELS
"""Bytes of a record: the label, then red, green and blue, each row by row."""

CLASSES: Final = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)

_OPERATIONS: Final = re.compile(
    "PROTO|FRAME|STOP|MARK|MEMOIZE|(LONG_)?(BIN)?(PUT|GET)|(STACK_)?GLOBAL|REDUCE|BUILD"
    "|NONE|NEWTRUE|NEWFALSE|(BIN)?INT[12]?|LONG[14]?|(BIN)?FLOAT"
    "|(SHORT_)?(BIN)?(STRING|(UNICODE|BYTES)8?)|BYTEARRAY8"
    "|(EMPTY_)?(TUPLE|LIST|DICT)|TUPLE[123]|APPENDS?|SETITEMS?"
)
_UINT8: Final = frozenset({"u1", b"u1", "|u1", b"|u1"})
# What the unpickler raises on damaged input.
_PICKLE_ERRORS: Final = (
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    OverflowError,
    MemoryError,
    RecursionError,
)


def batch_records(data: bytes, where: str) -> bytes:
    """Turn the bytes of a pickled batch into records.

    Args:
        data: The whole file, as Python 2 or 3 wrote it.
        where: Its name for messages.

    Raises:
        UserError: It names something no batch needs, is damaged, or holds no pictures with labels.
    """
    try:
        _check_operations(data)
        batch = _Unpickler(io.BytesIO(data), encoding="bytes").load()
    except _RefusedError as error:
        raise UserError(
            f"{where}: no CIFAR-10 batch, its pickle asks for {error}, which was not run; "
            "fetch the original archive"
        ) from error
    except _PICKLE_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{where}: damaged pickle ({reason}); fetch it again") from error
    values = dict(batch) if isinstance(batch, dict) else {}
    pixels = _pixels(values.get(b"data", values.get("data")), where)
    labels = values.get(b"labels", values.get("labels"))
    if not isinstance(labels, list) or len(labels) != len(pixels):
        raise UserError(f"{where}: does not have one of CIFAR-10's labels per picture; fetch it again")
    if any(type(label) is not int or not 0 <= label < len(CLASSES) for label in labels):
        raise UserError(f"{where}: has labels that are none of 0 … {len(CLASSES) - 1}; fetch it again")
    records = np.empty((len(pixels), RECORD), np.uint8)
    records[:, 0], records[:, 1:] = labels, pixels
    return records.tobytes()


class _RefusedError(pickle.UnpicklingError):
    """The name or operation that a pickle asks for in vain."""


def _check_operations(data: bytes) -> None:
    """Look through a pickle without running it; the unpickler itself believes any length and any number.

    Raises:
        _RefusedError: It has an operation that no batch needs.
        ValueError: It ends too early, or numbers what it remembers so that a table would fill the memory.
    """
    for count, (operation, argument, _) in enumerate(pickletools.genops(data)):
        if not _OPERATIONS.fullmatch(operation.name):
            raise _RefusedError(f"the operation {operation.name}")
        if operation.name.endswith("PUT") and isinstance(argument, int) and argument > count + 1:
            raise ValueError(f"object number {argument} after {count} operations")


class _Array:
    """Stand-in for an array: keeps the state that would be set."""

    def __init__(self) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Type:
    """Stand-in for a type of values: keeps its name."""

    def __init__(self, name: Any = None, *_: Any) -> None:
        self.name = name

    def __setstate__(self, state: Any) -> None:
        """Byte order and the like: nothing that single bytes have."""


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    array = _Array()
    array.state = (1, shape, dtype, order == "F", data)
    return array


def _encode(text: Any, encoding: Any) -> bytes:
    """How Python 3 writes bytes for Python 2."""
    if not isinstance(text, str) or encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError("bytes in an unknown coding")
    return text.encode("latin-1")


_STAND_INS: Final[dict[tuple[str, str], Any]] = {
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): _Type,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("numpy._core.numeric", "_frombuffer"): _from_buffer,
    ("_codecs", "encode"): _encode,
}


class _Unpickler(pickle.Unpickler):
    """Knows the stand-ins and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STAND_INS:
            raise _RefusedError(f"{module}.{name}")
        return _STAND_INS[module, name]


def _pixels(found: Any, where: str) -> UInt8Array:
    """Make the real array [N, 3072] of a stand-in."""
    match found.state if isinstance(found, _Array) else None:
        case (_, (int(count), int(width)), _Type() as dtype, fortran, bytes() | bytearray() as values):
            if dtype.name in _UINT8 and width == PIXELS and len(values) == count * width:
                return np.frombuffer(values, np.uint8).reshape((count, width), order="F" if fortran else "C")
    raise UserError(f"{where}: no uint8 array [N, {PIXELS}] under the key 'data'; fetch it again")
