"""The FFN over rows that lie in slots."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashrt_kernels.activations import parse
from flashrt_kernels.ffn import FfnWeights
from flashrt_kernels.gpu.arguments import check
from flashrt_kernels.gpu.row_tile import row_codes, row_scales
from flashrt_kernels.limits import LONGEST_ROW, NARROW_TOKENS, NEURON_STEP
from flashrt_kernels.rows import ALIGNMENT, DTYPES, Codec, align, bundle_stride, row_bytes

SLOTS = 32  # of one program: enough programs for a GPU even where few rows are chosen
PARTS = NEURON_STEP // SLOTS  # partial sums that are added before they are added to y
TILE_GROUPS = 8  # groups of 32 weights that a program decodes at a time: a span of int4
COLUMNS = 128  # of y, that one program of the reduction adds up


@triton.jit
def activate(x, threshold, FUNCTION: tl.constexpr):
    """act(x), float32; relu passes what is more than the threshold. Comparisons are such that NaN stays NaN."""
    if FUNCTION == "silu":
        result = x / (1.0 + tl.exp(-x))
    elif FUNCTION == "gelu_tanh":  # (1 + tanh(z)) / 2 = 1 / (1 + exp(-2 z))
        result = x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    elif FUNCTION == "gelu":
        result = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif FUNCTION == "relu":
        result = tl.where(x <= threshold, 0.0, x)
    else:
        result = tl.where(x < 0.0, 0.0, x * x)
    return result


@triton.jit
def add_products(sums, x, row, valid, group, CODEC: tl.constexpr, GROUPS: tl.constexpr):
    """sums [S, G] + the products of x [G, 32] with the weights of each row, added up per group."""
    scale, offset = row_scales(row, valid, group, CODEC, GROUPS)
    products = tl.sum(row_codes(row, valid, group, CODEC, GROUPS) * x[None, :, :], axis=2)
    return sums + (scale * products - offset * tl.sum(x, axis=1)[None, :])


# The order of sums must not follow from how x is aligned.
@triton.jit(do_not_specialize=["capacity"], do_not_specialize_on_alignment=["x_ptr"])
def _partial_kernel(
    x_ptr,
    bundles_ptr,
    slots_ptr,
    count_ptr,
    bias_ptr,
    factors_ptr,
    parts_ptr,
    stride,
    capacity,
    threshold,
    K: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    CODEC: tl.constexpr,
    FUNCTION: tl.constexpr,
    GATED: tl.constexpr,
    SLOTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """parts[p, b] = the sum over the p-th SLOTS slots for token b; nothing where there are none.

    Grid (tokens, parts). The token is a coordinate of the grid, not of the code: a token's sums cannot depend on the
    others. Programs of the same slots run side by side, so that all but the first find their rows in the L2 cache.
    """
    GROUPS: tl.constexpr = (K + 63) // 64 * 2
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    count = capacity
    if count_ptr is not None:
        count = tl.minimum(tl.load(count_ptr), capacity)
    if part * SLOTS >= count:
        return
    index = part * SLOTS + tl.arange(0, SLOTS)
    valid = index < count
    slot = tl.load(slots_ptr + index, mask=valid, other=0).to(tl.int64)
    row = bundles_ptr + slot * stride
    first = tl.zeros((SLOTS, TILE), tl.float32)
    second = tl.zeros((SLOTS, TILE), tl.float32)
    lane = tl.arange(0, 32)[None, :]
    for tile in range(0, GROUPS, TILE):
        group = tile + tl.arange(0, TILE)
        column = group[:, None] * 32 + lane
        x = tl.load(x_ptr + token * K + column, mask=column < K, other=0.0)
        first = add_products(first, x, row, valid, group, CODEC, GROUPS)
        if GATED:
            second = add_products(second, x, row + ROW_BYTES, valid, group, CODEC, GROUPS)
    h = tl.sum(first, axis=1)
    if bias_ptr is not None:
        h += tl.load(bias_ptr + slot, mask=valid, other=0.0)
    h = activate(h, threshold, FUNCTION)
    if GATED:
        h *= tl.sum(second, axis=1)
    if factors_ptr is not None:
        h *= tl.load(factors_ptr + token)
    h = tl.where(valid, h, 0.0)
    down = row + (2 * ROW_BYTES if GATED else ROW_BYTES)
    out = parts_ptr + (part.to(tl.int64) * tl.num_programs(0) + token) * K
    for tile in range(0, GROUPS, TILE):
        group = tile + tl.arange(0, TILE)
        scale, offset = row_scales(down, valid, group, CODEC, GROUPS)
        codes = row_codes(down, valid, group, CODEC, GROUPS)
        sums = tl.sum((h[:, None] * scale)[:, :, None] * codes, axis=0)
        sums -= tl.sum(h[:, None] * offset, axis=0)[:, None]
        column = group[:, None] * 32 + lane
        tl.store(out + column, sums, mask=column < K)


@triton.jit(do_not_specialize=["capacity"])
def _reduce_kernel(
    parts_ptr,
    count_ptr,
    y_ptr,
    capacity,
    K: tl.constexpr,
    SLOTS: tl.constexpr,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """y[b] += parts[p, b], PARTS of them at a time, in ascending order. Grid (tokens, blocks of COLUMNS)."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    count = capacity
    if count_ptr is not None:
        count = tl.minimum(tl.load(count_ptr), capacity)
    parts = tl.cdiv(count, SLOTS)
    y = tl.load(y_ptr + token * K + column, mask=column < K, other=0.0)
    for block in range(0, parts, 8 * PARTS):
        for step in tl.static_range(8):  # unrolled, so that many loads are in flight together
            sums = tl.zeros((COLUMNS,), tl.float32)
            for i in tl.static_range(PARTS):
                part = block + step * PARTS + i
                offset = (part.to(tl.int64) * tl.num_programs(0) + token) * K
                sums += tl.load(parts_ptr + offset + column, mask=(part < parts) & (column < K), other=0.0)
            y += sums
    tl.store(y_ptr + token * K + column, y, mask=column < K)


def workspace(slots: int, tokens: int, k: int, device: torch.device | str) -> Tensor:
    """Memory that `glu_rows` needs for up to `slots` slots: float32 [parts, tokens, k], not initialised."""
    return torch.empty((max(triton.cdiv(slots, SLOTS), 1), tokens, k), dtype=torch.float32, device=device)


def glu_rows(
    x: Tensor,
    weights: FfnWeights[Tensor],
    y: Tensor,
    slots: Tensor,
    count: Tensor | None = None,
    factors: Tensor | None = None,
    scratch: Tensor | None = None,
) -> None:
    """y[b] += h * down, summed over the first `count` slots; h is that of `FfnWeights`.

    x and y float32 [B, K], B up to 16. bundles uint8 [n, stride] and up_bias float32 [n] are indexed by slot. slots
    int32 [s], each in 0..n-1, and count int32 [1], up to s (None: s), lie on the device; their values are not checked.
    factors float32 [B] multiplies a token's h. scratch: `workspace(s, B, K)`; None allocates. Raises ValueError on
    anything else.

    A token's result has the same bits whoever shares the batch, and when the slots are spread over several calls, in
    order, that begin at multiples of 128.
    """
    activation = parse(weights.activation)
    if not activation.gate_only or weights.gate_bias is not None:
        raise ValueError("weights: expected an activation of the gate alone, and no bias of the gate")
    codec = _own_codec(weights)
    tokens, k = _check(x, weights, y, slots)
    if count is not None:
        check("count", count, torch.int32, (1,), x.device)
    if factors is not None:
        check("factors", factors, torch.float32, (tokens,), x.device)
    capacity = slots.shape[0]
    if scratch is None:
        scratch = workspace(capacity, tokens, k, x.device)
    elif scratch.dtype != torch.float32 or scratch.device != x.device or scratch.numel() < _numbers(capacity, x):
        raise ValueError(f"scratch: expected workspace({capacity}, {tokens}, {k}, {str(x.device)!r})")
    parts = triton.cdiv(capacity, SLOTS)
    if parts == 0:
        return
    _partial_kernel[(tokens, parts)](
        x,
        weights.bundles,
        slots,
        count,
        weights.up_bias,
        factors,
        scratch,
        weights.bundles.stride(0),
        capacity,
        activation.threshold,
        K=k,
        ROW_BYTES=row_bytes(codec, k),
        CODEC=codec.value,
        FUNCTION=activation.function,
        GATED=weights.gated,
        SLOTS=SLOTS,
        TILE=TILE_GROUPS,
        num_warps=8,
    )
    _reduce_kernel[(tokens, triton.cdiv(k, COLUMNS))](
        scratch, count, y, capacity, K=k, SLOTS=SLOTS, PARTS=PARTS, COLUMNS=COLUMNS
    )


def _own_codec(weights: FfnWeights[Tensor]) -> Codec:
    """The codec of all rows. Raises ValueError for those of a file: there is no kernel for them."""
    if weights.codec not in DTYPES:
        raise ValueError(f"weights: expected one codec of {', '.join(c.value for c in DTYPES)}, found {weights.codec}")
    assert isinstance(weights.codec, Codec)
    return weights.codec


def _numbers(slots: int, x: Tensor) -> int:
    return triton.cdiv(slots, SLOTS) * x.numel()


def _check(x: Tensor, weights: FfnWeights[Tensor], y: Tensor, slots: Tensor) -> tuple[int, int]:
    """Tokens and row length."""
    check("x", x, torch.float32, (None, None), x.device)
    tokens, k = x.shape
    if not (1 <= tokens <= NARROW_TOKENS and 1 <= k <= LONGEST_ROW):
        raise ValueError(f"x: expected {NARROW_TOKENS} tokens of {LONGEST_ROW} numbers at most, found {tokens} of {k}")
    check("y", y, torch.float32, (tokens, k), x.device)
    bundles = weights.bundles
    check("bundles", bundles, torch.uint8, (None, None), x.device)
    least = bundle_stride(_own_codec(weights), k, 3 if weights.gated else 2)
    if bundles.shape[1] < least or bundles.shape[1] != align(bundles.shape[1], ALIGNMENT):
        raise ValueError(f"bundles: expected a multiple of 64 bytes from {least} on, found {bundles.shape[1]}")
    check("slots", slots, torch.int32, (None,), x.device)
    if weights.up_bias is not None:
        if weights.gated:
            raise ValueError("up_bias: expected None for a gated FFN")
        check("up_bias", weights.up_bias, torch.float32, (bundles.shape[0],), x.device)
    return tokens, k
