"""Byte layout of packed weight rows: the contract between the pack, the kernels and the reference.

A *row* is `k` weights along the hidden dimension, encoded by one codec. A *bundle* is a fixed number of rows stored
back to back and padded with zeros to a multiple of 64 bytes: (gate, up, down) of one FFN neuron, or eight
consecutive rows of a matrix. All codecs pad `k` to `kp`, a multiple of 64, with zero weights. Everything is
little-endian; offsets are relative to the start of the row.

    f32    kp float32
    bf16   kp bfloat16
    int8   kp int8 codes q, then kp/64 bfloat16 scales s (one per group of 64):    w = s * q,  -127 <= q <= 127
    int4   kp/2 bytes of 4-bit codes q in 0..15, then kp/32 uint8 scale codes a, then kp/32 uint8 offset codes b
           (one of each per group of 32), then float32 u and float32 v:            w = (u * a) * q - (v * b)
           Codes are stored in spans of 8 groups, 128 bytes each; the last span has the n = 2, 4, 6 or 8 groups that are
           left, in 16 n bytes. Byte 8 j + i of a span holds weight i of its group j in its low nibble and weight 8 + i
           in its high nibble; byte 8 n + 8 j + i likewise weights 16 + i and 24 + i.
"""

from __future__ import annotations

import enum

ALIGNMENT = 64  # bytes: a cache line, and the width of an AVX-512 load
MATRIX_ROWS = 8  # rows of a matrix in one bundle: 8 rows of int4 waste less than 1% to padding
INT8_GROUP = 64
INT4_GROUP = 32
INT4_SPAN = 8  # groups


class Codec(enum.Enum):
    """How the weights of a row are encoded. `value` is the name used in manifests and on the command line."""

    F32 = "f32"
    BF16 = "bf16"
    INT8 = "int8"
    INT4 = "int4"


def align(n: int, to: int) -> int:
    """The smallest multiple of `to` that is not below `n`."""
    return -(-n // to) * to


def row_bytes(codec: Codec, k: int) -> int:
    """Bytes of one encoded row of `k` weights."""
    kp = align(k, 64)
    if codec is Codec.F32:
        return 4 * kp
    if codec is Codec.BF16:
        return 2 * kp
    if codec is Codec.INT8:
        return kp + 2 * (kp // INT8_GROUP)
    return kp // 2 + 2 * (kp // INT4_GROUP) + 8


def bundle_stride(codec: Codec, k: int, rows: int) -> int:
    """Bytes from one bundle of `rows` rows to the next."""
    return align(rows * row_bytes(codec, k), ALIGNMENT)
