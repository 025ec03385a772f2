"""Random arrays, packed bundles and error measures for the kernel tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from flashrt.kv.numbers import keys_of, values_of
from flashrt_kernels import reference
from flashrt_kernels.rows import DTYPES, MATRIX_ROWS, Codec, bundle_stride, row_bytes

cpu = pytest.importorskip("flashrt_kernels.cpu", reason="the extension is not built")

CODECS = list(DTYPES)
HALF_GEMM = ("avx512bf16", "amx")  # instruction sets by which wide passes multiply in bfloat16
Floats = NDArray[np.float32]


def normal(seed: int, *shape: int) -> Floats:
    """Standard normal numbers; every eleventh is ten times larger, as activations have outliers."""
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    x.reshape(-1)[::11] *= 10
    return x


def empty(*shape: int) -> Floats:
    """Not zeros: what a kernel does not write must show."""
    return np.full(shape, np.nan, np.float32)


def numbers(cache: NDArray[Any], dim: int) -> tuple[Floats, Floats]:
    """Keys and values of a cache [heads, positions, *pair]."""
    return keys_of(cpu, cache, dim), values_of(cpu, cache, dim)


def tensor(x: NDArray[Any] | None) -> torch.Tensor | None:
    return None if x is None else torch.from_numpy(x)


def bundles(weights: Floats, codec: Codec, rows: int) -> NDArray[np.uint8]:
    """weights [n, k] → bundles of `rows` rows; the last is filled up with rows of zeros."""
    n, k = weights.shape
    count = -(-n // rows)
    padded = np.zeros((count * rows, k), np.float32)
    padded[:n] = weights
    size = row_bytes(codec, k)
    encoded = np.empty((count * rows, size), np.uint8)
    cpu.quantize(padded, codec, encoded)
    result = np.full((count, bundle_stride(codec, k, rows)), 0xFF, np.uint8)
    result[:, : rows * size] = encoded.reshape(count, rows * size)
    return result


def matrix(seed: int, rows: int, k: int, codec: Codec) -> NDArray[np.uint8]:
    return bundles(normal(seed, rows, k) / np.float32(k**0.5), codec, MATRIX_ROWS)


def neurons(seed: int, n: int, k: int, codec: Codec, gated: bool = True) -> NDArray[np.uint8]:
    rows = 3 if gated else 2
    return bundles(normal(seed, n * rows, k) / np.float32(k**0.5), codec, rows)


def rms_ratio(found: Floats, expected: Floats | torch.Tensor) -> float:
    """Root mean square of the error over that of the expected numbers. NaN compares as a failure."""
    expected = np.asarray(expected, np.float64)
    error = np.asarray(found, np.float64) - expected
    return float(np.sqrt(np.mean(error**2) / np.mean(expected**2)))


def same(a: Floats, b: Floats) -> bool:
    """Bit for bit, with no NaN that would hide an unwritten number."""
    return bool(np.isfinite(a).all() and np.array_equal(a.view(np.uint32), b.view(np.uint32)))


def tolerance(codec: Codec) -> float:
    """RMS ratio allowed to the small-batch kernels, on activations `as_met`: factors and int8's x have 16 bits."""
    return 3e-6 if codec in (Codec.F32, Codec.BF16) else 3e-4


def as_met(x: Floats, codec: Codec) -> Floats:
    """The activations that rows of `codec` are multiplied by: int4 rows meet 8 bits per group of 32."""
    if codec is not Codec.INT4:
        return x
    k = x.shape[-1]
    groups = np.pad(x, ((0, 0), (0, -k % 32))).reshape(len(x), -1, 32)
    top = np.abs(groups).max(2, keepdims=True)
    codes = np.round(groups * (np.float32(127) / np.maximum(top, 1e-30)))
    return (codes * (top / np.float32(127))).reshape(len(x), -1)[:, :k].astype(np.float32)


__all__ = [
    "CODECS",
    "as_met",
    "bundles",
    "cpu",
    "empty",
    "matrix",
    "neurons",
    "normal",
    "reference",
    "rms_ratio",
    "same",
    "tensor",
    "tolerance",
]
