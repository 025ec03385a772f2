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

*Kept* codecs are those of GGUF files. Their rows are whole blocks, `KEPT`, byte for byte as ggml defines them, and not
padded.

Down is quantized along the neurons in such files. A bundle of a *group* of neurons holds the gate rows of all of them,
then their up rows, then down: for each of the k output channels a row of as many weights as the group has neurons.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple

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
    Q4_0 = "q4_0"
    Q4_1 = "q4_1"
    Q5_0 = "q5_0"
    Q5_1 = "q5_1"
    Q8_0 = "q8_0"
    Q4_K = "q4_k"
    Q5_K = "q5_k"
    Q6_K = "q6_k"
    IQ4_NL = "iq4_nl"
    IQ4_XS = "iq4_xs"
    MXFP4 = "mxfp4"


class KeptBlock(NamedTuple):
    """A block of a kept codec: weights, bytes, and where in it float16 scales lie."""

    weights: int
    nbytes: int
    scales: tuple[int, ...]


KEPT = {
    Codec.Q4_0: KeptBlock(32, 18, (0,)),
    Codec.Q4_1: KeptBlock(32, 20, (0, 2)),
    Codec.Q5_0: KeptBlock(32, 22, (0,)),
    Codec.Q5_1: KeptBlock(32, 24, (0, 2)),
    Codec.Q8_0: KeptBlock(32, 34, (0,)),
    Codec.Q4_K: KeptBlock(256, 144, (0, 2)),
    Codec.Q5_K: KeptBlock(256, 176, (0, 2)),
    Codec.Q6_K: KeptBlock(256, 210, (208,)),
    Codec.IQ4_NL: KeptBlock(32, 18, (0,)),
    Codec.IQ4_XS: KeptBlock(256, 136, (0,)),
    Codec.MXFP4: KeptBlock(32, 17, ()),
}
DTYPES = tuple(codec for codec in Codec if codec not in KEPT)  # what weights are quantized to


@dataclass(frozen=True, slots=True)
class NeuronCodecs:
    """What the rows of neurons are encoded by, where they differ; `gate` is None where there is none.

    `group` neurons share a bundle; 1: each has its own, and its down column is a row of it like the others.
    """

    gate: Codec | None
    up: Codec
    down: Codec
    group: int = 1


def align(n: int, to: int) -> int:
    """The smallest multiple of `to` that is not below `n`."""
    return -(-n // to) * to


def row_bytes(codec: Codec, k: int) -> int:
    """Bytes of one encoded row of `k` weights. Raises ValueError where a kept codec's blocks are not whole."""
    if codec in KEPT:
        block = KEPT[codec]
        if k % block.weights:
            raise ValueError(f"a row of {k} weights is not whole blocks of {codec.value}, of {block.weights} each")
        return k // block.weights * block.nbytes
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


def neuron_bytes(codecs: NeuronCodecs, k: int) -> int:
    """Bytes that the neurons of a bundle take."""
    gate = 0 if codecs.gate is None else row_bytes(codecs.gate, k)
    down = row_bytes(codecs.down, k) if codecs.group == 1 else k * row_bytes(codecs.down, codecs.group)
    return codecs.group * (gate + row_bytes(codecs.up, k)) + down
