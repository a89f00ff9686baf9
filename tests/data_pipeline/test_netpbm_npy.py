import contextlib
import io
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.sources.netpbm import netpbm, picture_shape
from data_pipeline.sources.npy import read_header


def test_netpbm_writes_the_formats_of_its_description() -> None:
    assert netpbm(np.array([[1, 2, 3]], np.uint8)) == b"P5\n3 1\n255\n\x01\x02\x03"
    assert netpbm(np.array([[[1], [2]], [[3], [4]]], np.uint8)) == b"P5\n2 2\n255\n\x01\x02\x03\x04"
    assert netpbm(np.array([[[1, 2, 3]], [[4, 5, 6]]], np.uint8)) == b"P6\n1 2\n255\n\x01\x02\x03\x04\x05\x06"
    planar = np.arange(12, dtype=np.uint8).reshape(3, 2, 2)
    assert netpbm(planar) == b"P6\n2 2\n255\n" + bytes([0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11])


@pytest.mark.parametrize(
    "shape", [(4,), (), (3, 4, 3), (4, 4, 2), (0, 4), (4, 0, 3), (3, 2**20, 2**20), (1, 2, 2, 3)]
)
def test_no_picture_is_guessed(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"shape \[|pixels is more than the limit"):
        picture_shape(shape)


@given(st.binary(max_size=80), st.sampled_from([b"\x01\x00", b"\x02\x00", b"\x03\x00", b""]))
def test_any_bytes_are_a_header_or_a_value_error(data: bytes, version: bytes) -> None:
    body = (
        struct.pack("<H", len(data)) + data if version == b"\x01\x00" else struct.pack("<I", len(data)) + data
    )
    for head in (b"\x93NUMPY" + version + body, data):
        with contextlib.suppress(ValueError):
            read_header(io.BytesIO(head))


@given(
    st.sampled_from(["|u1", "O", "", "u1,u1", "(2,)u1", "u1,(", "V99", "M8[x]", "]", "u99", "|u1\x00"])
    | st.text(max_size=6)
)
def test_any_type_is_a_header_or_a_value_error(descr: str) -> None:
    header = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': (2, 4, 4), }}\n".encode(
        "latin-1", "replace"
    )
    with contextlib.suppress(ValueError):
        read_header(io.BytesIO(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header))
