"""Stored bytes to numbers: by the native code for what it knows, with the codec's own numpy for the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from flashrt_kernels.stored import STORED

if TYPE_CHECKING:
    from flashrt.storage.sources.tensors import F32, Codec, Raw


def decode_rows(codec: Codec, raw: Raw) -> F32:
    """Rows uint8 [n, bytes] → float32 [n, k]."""
    if codec.name not in STORED:
        return codec.decode(raw)
    from flashrt_kernels.cpu import stored

    out = np.empty((raw.shape[0], raw.shape[1] // codec.bytes * codec.block), np.float32)
    stored.decode_rows(codec.name, raw, out)
    return out


def decode_columns(codec: Codec, raw: Raw, start: int, stop: int) -> F32:
    """Columns start:stop of rows uint8 [n, bytes], transposed: float32 [stop - start, n]."""
    if codec.name not in STORED:
        first, last = start // codec.block, -(-stop // codec.block)
        part = np.ascontiguousarray(raw[:, first * codec.bytes : last * codec.bytes])
        skip = start - first * codec.block
        return np.ascontiguousarray(codec.decode(part)[:, skip : skip + stop - start].T)
    from flashrt_kernels.cpu import stored

    out = np.empty((stop - start, raw.shape[0]), np.float32)
    stored.decode_columns(codec.name, raw, start, stop, out)
    return out
