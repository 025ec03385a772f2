"""Keys and values of a cache as numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

from flashrt_kernels.kv import CHUNK, kv_codec_of
from flashrt_kernels.rows import align, row_bytes

Array = np.ndarray


def keys_of(ops: Any, cache: Array, head_dim: int) -> Array:
    """Keys of `cache` [heads, positions, *pair], float32 [heads, positions, head_dim]."""
    return _part(ops, cache, head_dim, 0)


def values_of(ops: Any, cache: Array, head_dim: int) -> Array:
    """Values of `cache`, likewise."""
    return _part(ops, cache, head_dim, 1)


def _part(ops: Any, cache: Array, head_dim: int, which: int) -> Array:
    blocks = kv_codec_of(cache, head_dim).blocks
    if blocks is None:
        part = cache[:, :, which]
        return part if part.dtype == np.float32 else (part.astype(np.uint32) << 16).view(np.float32)
    width, codec = align(head_dim, CHUNK), blocks[which]
    begin = which * row_bytes(blocks[0], width)
    rows = np.empty((*cache.shape[:2], width), np.float32)
    for head, out in zip(cache, rows, strict=True):
        ops.dequantize(head[:, 0, begin : begin + row_bytes(codec, width)], codec, width, out)
    return rows[:, :, :head_dim]
