"""Keys and values of a cache as numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

from flashrt_kernels.kv import CHUNK, kv_codec_of
from flashrt_kernels.rows import align, row_bytes

Array = np.ndarray


def numbers(ops: Any, cache: Array, head_dim: int) -> tuple[Array, Array]:
    """Keys and values of `cache` [heads, positions, *pair], each float32 [heads, positions, head_dim]."""
    blocks = kv_codec_of(cache, head_dim).blocks
    if blocks is None:
        pairs = cache if cache.dtype == np.float32 else (cache.astype(np.uint32) << 16).view(np.float32)
        return pairs[:, :, 0], pairs[:, :, 1]
    width, begin, found = align(head_dim, CHUNK), 0, []
    for codec in blocks:
        end = begin + row_bytes(codec, width)
        rows = np.empty((*cache.shape[:2], width), np.float32)
        for head, out in zip(cache, rows, strict=True):
            ops.dequantize(head[:, 0, begin:end], codec, width, out)
        found.append(rows[:, :, :head_dim])
        begin = end
    return found[0], found[1]
