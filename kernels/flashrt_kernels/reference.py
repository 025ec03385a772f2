"""The kernels in plain torch, on any device: the oracle of the `cpu` backend, and the operations of a CUDA device.

Signatures are those of `flashrt_kernels.cpu`, on tensors; the key-value cache is bfloat16 or float32. Wide variants are
the same maths; on a CUDA device they multiply in bfloat16, except for F32 rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from flashrt_kernels.activations import parse
from flashrt_kernels.ffn import FfnWeights, RoutedTokens
from flashrt_kernels.limits import NARROW_TOKENS
from flashrt_kernels.rows import INT4_GROUP, INT4_SPAN, INT8_GROUP, MATRIX_ROWS, Codec, align, row_bytes

QUERIES = 64  # tokens whose attention scores exist at once


def _numbers(rows: Tensor, begin: int, end: int, dtype: torch.dtype) -> Tensor:
    """Bytes [begin, end) of every row, as float32 numbers that were stored as `dtype`."""
    return rows[:, begin:end].contiguous().view(dtype).to(torch.float32)


def _span_codes(span: Tensor) -> Tensor:
    """Bytes uint8 [n, 16 * groups] of one span of int4 codes → uint8 [n, groups, 32]."""
    halves = span.reshape(span.shape[0], 2, -1, 1, 8)
    return torch.cat((halves & 15, halves >> 4), 3).transpose(1, 2).reshape(span.shape[0], -1, INT4_GROUP)


def _span_bytes(codes: Tensor) -> Tensor:
    """The inverse of `_span_codes`."""
    parts = codes.view(codes.shape[0], -1, 2, 2, 8).transpose(1, 2)
    return (parts[:, :, :, 0] | parts[:, :, :, 1] << 4).reshape(codes.shape[0], -1)


def decode(rows: Tensor, codec: Codec, k: int) -> Tensor:
    """Rows uint8 [n, >= row_bytes] → float32 [n, k]."""
    kp, n = align(k, 64), rows.shape[0]
    if codec is Codec.F32:
        return _numbers(rows, 0, 4 * kp, torch.float32)[:, :k]
    if codec is Codec.BF16:
        return _numbers(rows, 0, 2 * kp, torch.bfloat16)[:, :k]
    if codec is Codec.INT8:
        q = _numbers(rows, 0, kp, torch.int8).view(n, -1, INT8_GROUP)
        scale = _numbers(rows, kp, kp + 2 * (kp // INT8_GROUP), torch.bfloat16)
        return (q * scale[:, :, None]).view(n, kp)[:, :k]
    groups, end = kp // INT4_GROUP, kp // 2
    spans = [rows[:, 16 * g : 16 * min(g + INT4_SPAN, groups)] for g in range(0, groups, INT4_SPAN)]
    q = torch.cat([_span_codes(span) for span in spans], 1).to(torch.float32)
    a = rows[:, end : end + groups].to(torch.float32)
    b = rows[:, end + groups : end + 2 * groups].to(torch.float32)
    u, v = _numbers(rows, end + 2 * groups, end + 2 * groups + 8, torch.float32).unsqueeze(2).unbind(1)
    return ((u * a)[:, :, None] * q - (v * b)[:, :, None]).view(n, kp)[:, :k]


def _bundle_rows(bundles: Tensor, codec: Codec, k: int, index: int) -> Tensor:
    size = row_bytes(codec, k)
    return decode(bundles[:, index * size : (index + 1) * size], codec, k)


def _product(x: Tensor, w: Tensor, codec: Codec, wide: bool) -> Tensor:
    if wide and x.is_cuda and codec is not Codec.F32 and x.shape[0] > NARROW_TOKENS:
        return (x.to(torch.bfloat16) @ w.to(torch.bfloat16)).to(torch.float32)
    return x @ w


def _linear(
    x: Tensor, bundles: Tensor, codec: Codec, out: Tensor, row0: int, rows: int, bias: Tensor | None, wide: bool
) -> None:
    k, n = x.shape[1], bundles.shape[0]
    size = row_bytes(codec, k)
    w = decode(bundles[:, : MATRIX_ROWS * size].reshape(MATRIX_ROWS * n, size), codec, k)[:rows]
    result = _product(x, w.T, codec, wide)
    out[:, row0 : row0 + rows] = result if bias is None else result + bias


def linear(
    x: Tensor, bundles: Tensor, codec: Codec, out: Tensor, row0: int, rows: int, bias: Tensor | None = None
) -> None:
    """out[b, row0 + r] = x[b] · W[r] + bias[r] for r < rows."""
    _linear(x, bundles, codec, out, row0, rows, bias, wide=False)


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


def _activate(x: Tensor, activation: str) -> Tensor:
    function, threshold = parse(activation)
    if function == "silu":
        return functional.silu(x)
    if function == "relu":
        return x.masked_fill(x <= threshold, 0.0)
    if function == "relu2":
        return functional.relu(x).square()
    return functional.gelu(x, approximate="tanh" if function == "gelu_tanh" else "none")


def _glu(
    x: Tensor,
    weights: FfnWeights[Tensor],
    y: Tensor,
    routed: RoutedTokens[Tensor] | None,
    wide: bool,
    usage: Tensor | None,
) -> None:
    k, bundles, codec = x.shape[1], weights.bundles, weights.codec
    tokens = None if routed is None else routed.tokens.long()
    part = x if tokens is None else x[tokens]
    first = _product(part, _bundle_rows(bundles, codec, k, 0).T, codec, wide)
    if weights.gated:
        up = _product(part, _bundle_rows(bundles, codec, k, 1).T, codec, wide)
        h = _activate(first, weights.activation) * up
    else:
        h = _activate(first if weights.up_bias is None else first + weights.up_bias, weights.activation)
    if routed is not None:
        h = h * routed.factors[:, None]
    if usage is not None:
        usage += h.abs().sum(0)
    result = _product(h, _bundle_rows(bundles, codec, k, 2 if weights.gated else 1), codec, wide)
    if tokens is None:
        y += result
    else:
        y.index_add_(0, tokens, result)


def glu(
    x: Tensor,
    weights: FfnWeights[Tensor],
    y: Tensor,
    routed: RoutedTokens[Tensor] | None = None,
    slots: Tensor | None = None,
    streamed_bundles: Sequence[Tensor] | None = None,
    usage: Tensor | None = None,
) -> None:
    """y[b] += h * down, summed over neurons."""
    if slots is not None:
        own, places = weights.bundles, slots.long()
        every = own if streamed_bundles is None else torch.cat([own, *streamed_bundles])
        taken = every[torch.where(places < 0, len(own) - 1 - places, places)]
        weights = replace(weights, bundles=taken)
    _glu(x, weights, y, routed, False, usage)


def gemm_glu(
    x: Tensor,
    weights: FfnWeights[Tensor],
    y: Tensor,
    routed: RoutedTokens[Tensor] | None = None,
    scratch: Tensor | None = None,
    usage: Tensor | None = None,
) -> None:
    """`glu` for many tokens."""
    _glu(x, weights, y, routed, True, usage)


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """out = x / sqrt(mean(x²) + eps) * weight."""
    out.copy_(x * torch.rsqrt(x.square().mean(1, keepdim=True) + eps) * weight)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, out: Tensor) -> None:
    """out = (x - mean) / sqrt(variance + eps) * weight + bias."""
    out.copy_(functional.layer_norm(x, x.shape[1:], weight, bias, eps))


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotates the halves of each head of x [B, heads, D] in place; cos and sin [B, D / 2]."""
    a, b = x.chunk(2, dim=2)
    c, s = cos[:, None], sin[:, None]
    x.copy_(torch.cat((a * c - b * s, b * c + a * s), dim=2))


def kv_append(k: Tensor, v: Tensor, kv: Tensor, start: int) -> None:
    """Writes k and v [B, KVH, D] at positions start.. of kv [KVH, context, 2, D]."""
    kv[:, start : start + k.shape[0]] = torch.stack((k, v), 2).transpose(0, 1).to(kv.dtype)


def _tokens_before(parents: Tensor) -> Tensor:
    """Bool [B, B]: which tokens of a tree each token follows, itself included."""
    before = torch.eye(len(parents), dtype=torch.bool, device=parents.device)
    for i, parent in enumerate(parents.tolist()):
        if parent >= 0:
            before[i] |= before[parent]
    return before


def attention(
    q: Tensor,
    kv: Tensor,
    start: int,
    window: int | None,
    scale: float,
    softcap: float | None,
    out: Tensor,
    scratch: Tensor | None = None,
    parents: Tensor | None = None,
) -> None:
    """Causal attention of q [B, H, D] at positions start.. over kv [KVH, context, 2, D] into out [B, H * D].

    parents int32 [B] makes the tokens a tree: each follows the one that is named, or with -1 the sequence.
    """
    tokens, heads, dim = q.shape
    grouped = q.reshape(tokens, kv.shape[0], -1, dim).permute(1, 2, 0, 3)  # [KVH, group, B, D]
    for first in range(0, tokens, QUERIES):  # scores of a whole prefill chunk would take gigabytes
        part = grouped[:, :, first : first + QUERIES]
        begin, end = start + first, start + first + part.shape[2]
        low = 0 if window is None else max(0, begin - window + 1)
        keys, values = kv[:, None, low:end].to(torch.float32).unbind(3)  # [KVH, 1, positions, D]
        scores = part @ keys.transpose(2, 3) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        token = torch.arange(begin, end, device=q.device)[:, None]
        position = torch.arange(low, end, device=q.device)[None]
        hidden = position > token
        if parents is not None:
            before = _tokens_before(parents)
            hidden[:, start - low :] = ~before
            token = start - 1 + before.sum(1, keepdim=True)
            position = torch.cat((position[:, : start - low], token.T), 1)
        if window is not None:
            hidden = hidden | (position <= token - window)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(3)
        result = (weights @ values).permute(2, 0, 1, 3)
        out[first : first + QUERIES] = result.reshape(-1, heads * dim)


def attention_scratch_bytes(tokens: int, heads: int, kv_heads: int, dim: int) -> int:
    """Torch allocates for itself."""
    return 0


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def _refit(w: Tensor, q: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and offset (>= 0) that minimise the weighted squared error of scale * q - offset, per group."""
    one, sq, sqq = weight.sum(2), (weight * q).sum(2), (weight * q * q).sum(2)
    sw, swq = (weight * w).sum(2), (weight * w * q).sum(2)
    determinant = one * sqq - sq * sq
    safe = determinant > 1e-6 * one * sqq
    divisor = torch.where(safe, determinant, 1.0)
    low = torch.where(safe, (sqq * sw - sq * swq) / divisor, 0.0).clamp(max=0)
    scale = torch.where(low < 0, (one * swq - sw * sq) / divisor, swq / sqq.clamp(min=1e-30))
    return scale.clamp(min=0), -low


def _codes(w: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    inverse = torch.where(scale > 0, 1 / scale.clamp(min=1e-38), 0.0)
    return ((w + offset[:, :, None]) * inverse[:, :, None]).round().clamp(0, 15)


def _encode_int4(w: Tensor, weight: Tensor) -> Tensor:
    n, kp = w.shape
    w, weight = w.view(n, -1, INT4_GROUP), weight.view(n, -1, INT4_GROUP)
    low, high = w.amin(2).clamp(max=0), w.amax(2)
    best = torch.full_like(low, float("inf"))
    scale, offset = torch.zeros_like(low), torch.zeros_like(low)
    for levels in (14.4, 15.0, 15.8, 16.6, 17.4, 18.2):
        s, m = (high - low).clamp(min=0) / levels, -low
        for _ in range(3):
            error = (weight * (s[:, :, None] * _codes(w, s, m) - m[:, :, None] - w).square()).sum(2)
            better = error < best
            best = torch.where(better, error, best)
            scale, offset = torch.where(better, s, scale), torch.where(better, m, offset)
            s, m = _refit(w, _codes(w, s, m), weight)
    u, v = scale.amax(1, keepdim=True) / 255, offset.amax(1, keepdim=True) / 255
    a = torch.where(u > 0, scale / u.clamp(min=1e-38), 0.0).round()
    b = torch.where(v > 0, offset / v.clamp(min=1e-38), 0.0).round()
    q = _codes(w, u * a, v * b).to(torch.uint8)
    packed = [_span_bytes(q[:, g : g + INT4_SPAN]) for g in range(0, kp // INT4_GROUP, INT4_SPAN)]
    return torch.cat((*packed, a.to(torch.uint8), b.to(torch.uint8), _bytes(u), _bytes(v)), 1)


def _encode_int8(w: Tensor) -> Tensor:
    n, kp = w.shape
    groups = w.view(n, -1, INT8_GROUP)
    top = groups.abs().amax(2)
    scale = (top / 127).to(torch.bfloat16)
    up = (scale.view(torch.int16) + 1).view(torch.bfloat16)
    scale = torch.where(scale.to(torch.float32) * 127 < top, up, scale)  # up: nothing may clip
    wide = scale.to(torch.float32)
    inverse = torch.where(wide > 0, 1 / wide.clamp(min=1e-38), 0.0)
    q = (groups * inverse[:, :, None]).round().clamp(-127, 127)
    return torch.cat((_bytes(q.to(torch.int8).view(n, kp)), _bytes(scale)), 1)


def quantize(weights: Tensor, codec: Codec, out: Tensor, importance: Tensor | None = None) -> None:
    """Encodes weights [n, k] as rows, out uint8 [n, row_bytes]; int4 with a coarser search than the `cpu` backend's."""
    k = weights.shape[1]
    padding = (0, align(k, 64) - k)
    w = functional.pad(weights.to(torch.float32), padding)
    if codec is Codec.INT4:
        ones = torch.ones(k, device=w.device) if importance is None else importance
        out.copy_(_encode_int4(w, functional.pad(ones, padding).expand_as(w).contiguous()))
    elif codec is Codec.INT8:
        out.copy_(_encode_int8(w))
    else:
        out.copy_(_bytes(w.to(torch.float32 if codec is Codec.F32 else torch.bfloat16)))


def dequantize(rows: Tensor, codec: Codec, k: int, out: Tensor) -> None:
    """out [n, k] = the weights of rows uint8 [n, >= row_bytes]."""
    out.copy_(decode(rows, codec, k))


def reserve(k: int) -> int:
    """Torch allocates for itself."""
    return 0


def set_threads(n: int) -> None:
    """Threads of torch's operations on the host."""
    torch.set_num_threads(n)


def threads() -> int:
    """Threads of torch's operations on the host."""
    return torch.get_num_threads()


def isa() -> str:
    """What computes."""
    return "torch"
