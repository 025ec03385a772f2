"""Attention to chosen tokens: labels of keys, the choice of blocks by them, and attention over lists."""

from __future__ import annotations

import torch
from torch import Tensor

from flashrt_kernels.labels import LABEL_CHANNELS, LABEL_CODES, LABEL_TOKENS
from flashrt_kernels.reference.attention import softmax_with
from flashrt_kernels.reference.kv import keys_and_values

HALF = LABEL_CHANNELS // 2


def label_append(values: Tensor, low: Tensor, step: Tensor, labels: Tensor, position: int) -> None:
    """Encodes values [n, KVH, r] into labels (`flashrt_kernels.labels`) from `position` on.

    Raises ValueError beyond their end.
    """
    tokens, heads, channels = values.shape
    context = labels.shape[1] * LABEL_TOKENS
    if not 0 <= position <= context - tokens:
        raise ValueError(f"position: {position} and {tokens} labels do not fit in a context of {context}")
    codes = ((values - low) / step).nan_to_num(0.0).clamp(0, LABEL_CODES - 1).round().to(torch.uint8)
    pairs = codes.reshape(tokens, heads, channels // LABEL_CHANNELS, 2, HALF)
    at = torch.arange(position, position + tokens, device=values.device)
    packed = pairs[:, :, :, 0] | pairs[:, :, :, 1] << 4
    labels[:, at // LABEL_TOKENS, :, at % LABEL_TOKENS] = packed


def _codes(labels: Tensor) -> Tensor:
    """labels → codes [KVH, context, r], float64: products of theirs are exact."""
    both = torch.stack((labels & 15, labels >> 4), 4)  # [KVH, groups, channels / 8, 16, 2, 4]
    return both.permute(0, 1, 3, 2, 4, 5).reshape(labels.shape[0], labels.shape[1] * LABEL_TOKENS, -1).to(torch.float64)


def _in_steps(q: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """q [KVH, group, r] times the labels' steps → 8-bit codes, and the scale of each query [KVH, group, 1]."""
    w = q * step[:, None]
    top = w.abs().amax(2, keepdim=True)
    inverse = torch.where(top > 1e-30, 127 / top, 0)
    return (w * inverse).round().to(torch.float64), torch.where(top > 1e-30, top / 127, 0)


def select(
    q: Tensor,
    labels: Tensor,
    step: Tensor,
    scale: float,
    first: int,
    ends: Tensor,
    keep: Tensor,
    block: int,
    chosen: Tensor,
    counts: Tensor,
    scratch: Tensor | None = None,
) -> None:
    """The heaviest blocks of each row of q [T, H, r] and KV head into chosen [T, KVH, most], counts [T, KVH]."""
    heads = labels.shape[0]
    codes = _codes(labels)
    for t in range(len(q)):
        end = max(int(ends[t]), first)
        query, query_scale = _in_steps(q[t].reshape(heads, -1, q.shape[2]), step)
        scores = query @ codes[:, first * block : end * block].transpose(1, 2) * (scale * query_scale)
        weights = scores.softmax(2).sum(1).reshape(heads, end - first, block).sum(2)
        order = weights.sort(dim=1, descending=True, stable=True).indices
        for h in range(heads):
            count = min(int(keep[t, h]), end - first)
            chosen[t, h, :count] = first + order[h, :count].sort().values
            counts[t, h] = count


def select_scratch_bytes(heads: int, kv_heads: int, context: int, block: int) -> int:
    """Torch allocates for itself."""
    return 0


def attention_list(
    q: Tensor,
    near: Tensor,
    far: Tensor | None,
    lists: Tensor,
    counts: Tensor,
    scale: float,
    softcap: float | None,
    out: Tensor,
    scratch: Tensor | None = None,
    sinks: Tensor | None = None,
) -> None:
    """Attention of each row of q [T, H, D] and KV head over lists [T, KVH, most], counts [T, KVH], into out [T, H * V].

    i >= 0 is near[head, i] of [KVH, slots, *pair], -1 - i is far[i] of [tokens, *pair]. An empty list gives zeros.
    """
    tokens, _, dim = q.shape
    kv_heads = near.shape[0]
    width = out.shape[1] // q.shape[1]
    result = out.view(tokens, kv_heads, -1, width)
    for t in range(tokens):
        for h in range(kv_heads):
            places = lists[t, h, : int(counts[t, h])].to(torch.int64)
            pairs = near[h, places.clamp(min=0)]
            if far is not None and len(far):
                pairs = torch.where((places < 0)[:, None, None], far[(-1 - places).clamp(min=0)], pairs)
            keys, values = keys_and_values(pairs, dim)
            scores = q[t].reshape(kv_heads, -1, dim)[h] @ keys.T * scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            weights = softmax_with(None if sinks is None else sinks.view(kv_heads, -1, 1)[h], scores)
            result[t, h] = weights @ values[:, :width]


def attention_list_scratch_bytes(tokens: int, heads: int, kv_heads: int, dim: int) -> int:
    """Torch allocates for itself."""
    return 0
