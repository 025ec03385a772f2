"""Stored bytes to numbers: by the native code for what it knows, with the codec's own numpy for the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flashrt_kernels.stored import STORED

F32 = npt.NDArray[np.float32]
Raw = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Codec:
    """How numbers are stored: `block` of them in `bytes`; `decode` turns [n, k * bytes] into float32 [n, k * block]."""

    name: str
    block: int
    bytes: int
    decode: Callable[[Raw], F32]


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
