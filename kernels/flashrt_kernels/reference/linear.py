"""Matrices of packed rows, times tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from flashrt_kernels.limits import NARROW_TOKENS
from flashrt_kernels.reference.quantize import decode
from flashrt_kernels.rows import MATRIX_ROWS, Codec, row_bytes


def product(x: Tensor, w: Tensor, codec: Codec, wide: bool) -> Tensor:
    """x @ w; wide ones may be multiplied in bfloat16 on a device that is fast at it."""
    if wide and x.is_cuda and codec is not Codec.F32 and x.shape[0] > NARROW_TOKENS:
        return (x.to(torch.bfloat16) @ w.to(torch.bfloat16)).to(torch.float32)
    return x @ w


def _linear(
    x: Tensor, bundles: Tensor, codec: Codec, out: Tensor, row0: int, rows: int, bias: Tensor | None, wide: bool
) -> None:
    k, n = x.shape[1], bundles.shape[0]
    size = row_bytes(codec, k)
    w = decode(bundles[:, : MATRIX_ROWS * size].reshape(MATRIX_ROWS * n, size), codec, k)[:rows]
    result = product(x, w.T, codec, wide)
    out[:, row0 : row0 + rows] = result if bias is None else result + bias


def linear(
    x: Tensor, bundles: Tensor, codec: Codec, out: Tensor, row0: int, rows: int, bias: Tensor | None = None
) -> None:
    """out[b, row0 + r] = x[b] · W[r] + bias[r] for r < rows."""
    _linear(x, bundles, codec, out, row0, rows, bias, wide=False)


def _linear_add(x: Tensor, rows: Tensor, codec: Codec, y: Tensor, row0: int, tokens: Tensor | None, wide: bool) -> None:
    result = product(x, decode(rows, codec, x.shape[1]).T, codec, wide)
    out = y[:, row0 : row0 + len(rows)]
    if tokens is None:
        out += result
    else:
        out.index_add_(0, tokens.long(), result)


def linear_add(
    x: Tensor,
    rows: Tensor,
    codec: Codec,
    group: int,
    y: Tensor,
    row0: int,
    tokens: Tensor | None = None,
) -> None:
    """y[tokens[b], row0 + r] += x[b] · rows[r]; how many numbers are summed first is of no concern here."""
    _linear_add(x, rows, codec, y, row0, tokens, wide=False)


def gemm_linear_add(
    x: Tensor,
    rows: Tensor,
    codec: Codec,
    group: int,
    y: Tensor,
    row0: int,
    tokens: Tensor | None = None,
    scratch: Tensor | None = None,
) -> None:
    """`linear_add` for many tokens."""
    _linear_add(x, rows, codec, y, row0, tokens, wide=True)


def linear_by_head(x: Tensor, bundles: Tensor, codec: Codec, out: Tensor, row0: int, rows: int) -> None:
    """out[b, h] = x[b, h] · W[h N : (h + 1) N], of what rows row0 to row0 + rows of W give, in whole bundles."""
    each, last = out.shape[2], row0 + rows
    for head in range(row0 // each, -(-last // each)):
        begin, end = max(head * each, row0), min((head + 1) * each, last)
        part = bundles[(begin - row0) // MATRIX_ROWS :]
        linear(x[:, head], part, codec, out[:, head], begin - head * each, end - begin)


def gemm_linear(
    x: Tensor,
    bundles: Tensor,
    codec: Codec,
    out: Tensor,
    row0: int,
    rows: int,
    bias: Tensor | None = None,
    scratch: Tensor | None = None,
) -> None:
    """`linear` for many tokens."""
    _linear(x, bundles, codec, out, row0, rows, bias, wide=True)


def gemm_scratch_bytes(tokens: int, k: int, neurons: int = 0) -> int:
    """Torch allocates for itself."""
    return 0
