"""The layout of gate and up projections that lie by input channel, for tokens that leave channels out.

Weights are those of int4 rows (`flashrt_kernels.rows`), code for code. The columns of gate, and after them those of up,
are padded with zeros to a multiple of 256 each: C columns in all. The input channels, in an order that is free within
a group of 32 (the groups of the rows), make up one *channel group* each, a bundle of

    C uint8 scale codes a, C uint8 offset codes b    of the columns
    32 coarse halves of C / 4 bytes                  the upper two bits of the codes of a channel
    F fine halves of C / 4 bytes                     the lower two bits, of the first F channels of the group

A half holds 256 columns in 64 bytes: byte 16 L + 4 p + d has those of columns 64 k + 16 p + 4 L + d in its bits 2 k and
2 k + 1, for k, p, L, d of 0 to 3. A column's weight is scale * (a * code - ratio * b), where scale and ratio are
float32 vectors [C] beside the groups: the row's u, and v / u. Without its fine half, a code is 4 * coarse + 1.5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashrt_kernels.rows import INT4_GROUP, INT4_SPAN, Codec, align, row_bytes

CHANNELS = 32  # of a group
TILE_COLUMNS = 256

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


def padded_columns(neurons: int) -> int:
    """Columns that one projection takes."""
    return align(neurons, TILE_COLUMNS)


def channel_groups(channels: int) -> int:
    """Groups of a projection of `channels` inputs."""
    return align(channels, 64) // CHANNELS


def group_bytes(columns: int, fine: int) -> int:
    """Bytes of one channel group of `columns` columns in all, `fine` of whose channels have a fine half."""
    return 2 * columns + (CHANNELS + fine) * columns // 4


@dataclass(frozen=True, slots=True)
class Int4Parts:
    """int4 rows taken apart: codes and group codes uint8, u and v float32 [n]."""

    codes: Bytes  # [n, kp]
    a: Bytes  # [n, kp / 32]
    b: Bytes  # [n, kp / 32]
    u: Floats
    v: Floats


def take_apart(rows: Bytes, k: int) -> Int4Parts:
    """The parts of int4 rows uint8 [n, >= row_bytes] of k weights."""
    kp, n = align(k, 64), len(rows)
    groups = kp // INT4_GROUP
    codes = np.empty((n, groups, INT4_GROUP), np.uint8)
    for first in range(0, groups, INT4_SPAN):
        count = min(INT4_SPAN, groups - first)
        span = rows[:, 16 * first : 16 * (first + count)].reshape(n, 2, count, 8)
        nibbles = np.stack((span & 15, span >> 4), axis=2)  # [n, half, nibble, group, 8]
        codes[:, first : first + count] = nibbles.transpose(0, 3, 1, 2, 4).reshape(n, count, INT4_GROUP)
    tail = np.ascontiguousarray(rows[:, kp // 2 : row_bytes(Codec.INT4, k)])
    u, v = (np.ascontiguousarray(tail[:, at : at + 4]).view(np.float32)[:, 0] for at in (2 * groups, 2 * groups + 4))
    return Int4Parts(codes.reshape(n, kp), tail[:, :groups], tail[:, groups : 2 * groups], u, v)


@dataclass(frozen=True, slots=True)
class ChannelVectors:
    """What columns multiply their sums and offsets by, float32 [C] each."""

    scale: Floats
    ratio: Floats


def encode_channels(projections: list[Int4Parts], order: NDArray[np.int32], fine: int) -> tuple[Bytes, ChannelVectors]:
    """Channel groups uint8 [groups, group_bytes] of int4 projections (gate and up, or up alone) of equal shape.

    order int32 [groups * 32] names the channel at each place; a group's channels stay in their group, and channels
    beyond the input count as zeros.
    """
    neurons, kp = projections[0].codes.shape
    each = padded_columns(neurons)
    columns, groups = each * len(projections), kp // CHANNELS
    codes = np.zeros((kp, columns), np.uint8)
    a, b = np.zeros((2, groups, columns), np.uint8)
    scale, ratio = np.zeros((2, columns), np.float32)
    for i, part in enumerate(projections):
        own = slice(i * each, i * each + neurons)
        codes[:, own] = part.codes.T
        a[:, own], b[:, own], scale[own] = part.a.T, part.b.T, part.u
        ratio[own] = np.divide(part.v, part.u, out=np.zeros_like(part.v), where=part.u != 0)
    ordered = codes[order].reshape(groups, CHANNELS, columns)
    halves = (_pack_half(ordered >> 2), _pack_half(ordered[:, :fine] & 3))
    parts = (a, b, *(half.reshape(groups, -1) for half in halves))
    return np.concatenate(parts, axis=1), ChannelVectors(scale, ratio)


def _pack_half(values: NDArray[Any]) -> Bytes:
    """Two-bit values [..., columns] → bytes [..., columns / 4]."""
    *lead, columns = values.shape
    tiles = values.reshape(*lead, columns // TILE_COLUMNS, 4, 4, 4, 4)  # k, p, L, d
    k0, k1, k2, k3 = (tiles[..., k, :, :, :] for k in range(4))
    packed = (k0 | k1 << 2 | k2 << 4 | k3 << 6).swapaxes(-3, -2)  # [..., L, p, d]
    return np.ascontiguousarray(packed, dtype=np.uint8).reshape(*lead, columns // 4)


def decode_channels(groups: Bytes, vectors: ChannelVectors, fine: int) -> Floats:
    """Weights float32 [groups * 32, C] in the order of the groups; without a fine half, the middle."""
    columns, count = len(vectors.scale), len(groups)
    a, b = groups[:, :columns], groups[:, columns : 2 * columns]
    halves = groups[:, 2 * columns : group_bytes(columns, fine)].reshape(count, CHANNELS + fine, columns // 4)
    codes = 4.0 * _unpack_half(halves[:, :CHANNELS]).astype(np.float32)
    codes[:, :fine] += _unpack_half(halves[:, CHANNELS:])
    codes[:, fine:] += 1.5
    weights = a[:, None].astype(np.float32) * codes - (b * vectors.ratio)[:, None]
    return (weights * vectors.scale).reshape(count * CHANNELS, columns).astype(np.float32)


def _unpack_half(half: Bytes) -> Bytes:
    """The inverse of `_pack_half`."""
    *lead, size = half.shape
    tiles = half.reshape(*lead, size // 64, 4, 4, 4).swapaxes(-3, -2)  # p, L, d
    return np.stack([tiles >> 2 * k & 3 for k in range(4)], axis=-4).reshape(*lead, 4 * size)
