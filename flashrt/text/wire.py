"""Protocol buffers on the wire: just enough to read a SentencePiece model without their library."""

from __future__ import annotations

import struct
from collections.abc import Iterator

Value = int | float | bytes


def fields(data: bytes) -> Iterator[tuple[int, Value]]:
    """(number, value) of every field of a message: varints as int, 32-bit values as float, the rest as bytes.

    Raises ValueError where the message is cut or damaged. Source: the encoding's specification (protobuf.dev).
    """
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, position = _varint(data, position)
            yield number, value
            continue
        size = {1: 8, 5: 4}.get(kind)
        if size is None:
            if kind != 2:
                raise ValueError(f"a field of wire type {kind} at byte {position}")
            size, position = _varint(data, position)
        if size > len(data) - position:
            raise ValueError(f"a field of {size} bytes at byte {position}, of {len(data)}")
        piece = data[position : position + size]
        position += size
        yield number, struct.unpack("<f", piece)[0] if kind == 5 else piece


def signed(value: Value) -> int:
    """An int32 of a varint, which writes negative numbers as 64 bits of two's complement."""
    if not isinstance(value, int):
        raise ValueError(f"{value!r:.40} where a number was expected")
    return value - (1 << 64) if value >= 1 << 63 else value


def _varint(data: bytes, position: int) -> tuple[int, int]:
    result = shift = 0
    while True:
        if position >= len(data) or shift > 63:
            raise ValueError(f"a number that does not end at byte {position}")
        byte = data[position]
        position += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, position
        shift += 7
