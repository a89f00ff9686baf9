"""TFRecord files for tests, written from the format's description: CRC32C bit by bit, protobuf by hand."""

import struct
from collections.abc import Iterable


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ 0x82F63B78 * (crc & 1)
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15) + (crc << 17) % 2**32 + 0xA282EAD8) % 2**32)


def frame(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + masked(length) + data + masked(data)


def varint(value: int) -> bytes:
    value %= 2**64
    groups = []
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])


def delimited(field: int, content: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(content)) + content


def bytes_feature(*values: bytes) -> bytes:
    return delimited(1, b"".join(delimited(1, value) for value in values))


def float_feature(*values: float) -> bytes:
    return delimited(2, delimited(1, struct.pack(f"<{len(values)}f", *values)))


def int_feature(*values: int, packed: bool = True) -> bytes:
    if packed:
        return delimited(3, delimited(1, b"".join(map(varint, values))))
    return delimited(3, b"".join(varint(1 << 3 | 0) + varint(value) for value in values))


def example(features: dict[str, bytes]) -> bytes:
    entries = (delimited(1, name.encode()) + delimited(2, value) for name, value in features.items())
    return delimited(1, b"".join(delimited(1, entry) for entry in entries))


def raw_picture(shape: Iterable[int], pixels: bytes, **more: bytes) -> bytes:
    return example({"shape": int_feature(*shape), "data": bytes_feature(pixels), **more})
