"""Rows of weights, encoded and decoded."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from flashrt_kernels.reference.formats import decode_kept
from flashrt_kernels.rows import INT4_GROUP, INT4_SPAN, INT8_GROUP, KEPT, Codec, align


def _numbers(rows: Tensor, begin: int, end: int, dtype: torch.dtype) -> Tensor:
    """Bytes [begin, end) of every row, as float32 numbers that were stored as `dtype`."""
    return rows[:, begin:end].contiguous().view(dtype).to(torch.float32)


def _span_codes(span: Tensor) -> Tensor:
    """Bytes uint8 [n, 16 * groups] of one span of int4 codes → uint8 [n, groups, 32]."""
    n, groups = span.shape[0], span.shape[1] // 16
    halves = span.reshape(n, 2, groups, 1, 8)
    return torch.cat((halves & 15, halves >> 4), 3).transpose(1, 2).reshape(n, groups, INT4_GROUP)


def _span_bytes(codes: Tensor) -> Tensor:
    """The inverse of `_span_codes`."""
    parts = codes.view(codes.shape[0], -1, 2, 2, 8).transpose(1, 2)
    return (parts[:, :, :, 0] | parts[:, :, :, 1] << 4).reshape(codes.shape[0], -1)


def decode(rows: Tensor, codec: Codec, k: int) -> Tensor:
    """Rows uint8 [n, >= row_bytes] → float32 [n, k]."""
    if codec in KEPT:
        return decode_kept(rows, codec, k)
    kp, n = align(k, 64), rows.shape[0]
    if codec is Codec.F32:
        return _numbers(rows, 0, 4 * kp, torch.float32)[:, :k]
    if codec is Codec.BF16:
        return _numbers(rows, 0, 2 * kp, torch.bfloat16)[:, :k]
    if codec is Codec.INT8:
        q = _numbers(rows, 0, kp, torch.int8).view(n, kp // INT8_GROUP, INT8_GROUP)
        scale = _numbers(rows, kp, kp + 2 * (kp // INT8_GROUP), torch.bfloat16)
        return (q * scale[:, :, None]).view(n, kp)[:, :k]
    groups, end = kp // INT4_GROUP, kp // 2
    spans = [rows[:, 16 * g : 16 * min(g + INT4_SPAN, groups)] for g in range(0, groups, INT4_SPAN)]
    q = torch.cat([_span_codes(span) for span in spans], 1).to(torch.float32)
    a = rows[:, end : end + groups].to(torch.float32)
    b = rows[:, end + groups : end + 2 * groups].to(torch.float32)
    u, v = _numbers(rows, end + 2 * groups, end + 2 * groups + 8, torch.float32).unsqueeze(2).unbind(1)
    return ((u * a)[:, :, None] * q - (v * b)[:, :, None]).view(n, kp)[:, :k]


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
