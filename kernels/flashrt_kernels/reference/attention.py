"""Attention over a cache of keys and values, bfloat16 or float32."""

from __future__ import annotations

import torch
from torch import Tensor

QUERIES = 64  # tokens whose attention scores exist at once


def kv_append(k: Tensor, v: Tensor, kv: Tensor, start: int) -> None:
    """Writes k and v [B, KVH, D] at positions start.. of kv [KVH, context, 2, D]. Raises ValueError beyond its end."""
    if not 0 <= start <= kv.shape[1] - k.shape[0]:
        raise ValueError(f"start: {start} and {k.shape[0]} tokens do not fit in a context of {kv.shape[1]}")
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
