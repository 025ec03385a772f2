"""Numbers as checkpoints store them, decoded by all threads. Bit by bit what the gguf package decodes them to."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashrt_kernels.cpu import _cpu
from flashrt_kernels.stored import STORED

Floats = NDArray[np.float32]


def decode_rows(name: str, raw: NDArray[np.uint8], out: Floats) -> None:
    """out [n, k] = the numbers of n stored rows, raw uint8 [n, bytes] (row stride allowed), stored as `name`.

    Raises KeyError for a name that is not in STORED.
    """
    _cpu.stored_rows(raw, STORED[name].number, out)


def decode_columns(name: str, raw: NDArray[np.uint8], start: int, stop: int, out: Floats) -> None:
    """out [stop - start, n] = numbers start:stop of each of n stored rows, transposed; see `decode_rows`."""
    _cpu.stored_columns(raw, STORED[name].number, start, stop, out)


def finite(values: NDArray[Any]) -> bool:
    """Whether none of values float32 [n, k] is infinite or NaN."""
    return bool(_cpu.finite(values))
