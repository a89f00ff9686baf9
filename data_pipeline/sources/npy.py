"""NumPy's `.npy` layout: a header that tells shape and type, then bare values.

Only headers and plain values are read, so an object array is refused and nothing is ever unpickled.
"""

import io
import math
import tokenize
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
from numpy.lib import format as npy

from data_pipeline.decode import UInt8Array
from data_pipeline.sources.netpbm import picture_shape

MAGIC: Final = npy.MAGIC_PREFIX
REMEDY: Final = "bring the values to 0 … 255, round them and save with astype('uint8')"
"""What to do about another type than uint8."""

_HEAD_BYTES: Final = 16384  # NumPy itself refuses headers of more than 10000 characters
# What NumPy's header parser raises on damaged input.
_HEADER_ERRORS: Final = (
    ValueError,
    TypeError,
    SyntaxError,
    LookupError,
    AttributeError,
    OverflowError,
    RecursionError,
    MemoryError,
    tokenize.TokenError,
)


@dataclass(frozen=True)
class Header:
    """What stands before the values.

    Attributes:
        shape: Lengths of the axes.
        dtype: Type of the values.
        fortran: The first axis runs fastest, not the last.
        offset: Where the values begin.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool
    offset: int

    @property
    def file_bytes(self) -> int:
        """Length of the whole file."""
        return self.offset + math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def read_header(file: IO[bytes]) -> Header:
    """Read the header of an `.npy` from its beginning.

    Raises:
        ValueError: It has none, or a damaged one; the message is the reason.
    """
    head = io.BytesIO(file.read(_HEAD_BYTES))
    try:
        version = npy.read_magic(head)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"format version {version[0]}.{version[1]}")
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = read(head)
    except _HEADER_ERRORS as error:
        raise ValueError(f"no sound .npy header: {reason(error)}") from error
    if any(length < 0 for length in shape):
        raise ValueError(f"no sound .npy header: shape {list(shape)}")
    return Header(shape, dtype, fortran, head.tell())


def map_values(path: Path, header: Header, start: int = 0) -> np.memmap[Any, Any]:
    """Map the values into memory, read-only.

    Args:
        path: The file.
        header: What was read of it.
        start: Where the header begins in it.

    Raises:
        OSError: The file cannot be opened.
        ValueError: It is shorter than its header says.
    """
    order: Any = "F" if header.fortran else "C"
    return np.memmap(path, header.dtype, "r", start + header.offset, header.shape, order)


def single_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Drop the first axis of a file of one picture, if there is one of length 1."""
    return shape[1:] if len(shape) == 4 and shape[0] == 1 else shape


def read_single(file: IO[bytes]) -> UInt8Array:
    """Read an `.npy` that holds one picture, in any layout of `picture_shape`.

    Raises:
        ValueError: It holds something else, or ends too early; the message is the reason.
    """
    header = read_header(file)
    if header.dtype != np.uint8:
        raise ValueError(f"values are {header.dtype}, not uint8")
    shape = single_shape(header.shape)
    picture_shape(shape)  # bounds what is read
    file.seek(header.offset)
    data = file.read(math.prod(shape))
    if len(data) < math.prod(shape):
        raise ValueError(f"ends after {len(data)} of {math.prod(shape)} values")
    return np.frombuffer(data, np.uint8).reshape(shape, order="F" if header.fortran else "C")


def reason(error: BaseException) -> str:
    """Say in one line what went wrong, without naming files."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
