"""Attention over a cache of keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from flashrt_kernels.reference.kv import keys_and_values

QUERIES = 64  # tokens whose attention scores exist at once


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
    state: Tensor | None = None,
    sinks: Tensor | None = None,
    wide: bool = False,
) -> None:
    """Causal attention of q [B, H, D] at positions start.. over kv [KVH, context, *pair] into out [B, H * V].

    parents int32 [B] makes the tokens a tree: each follows the one that is named, or with -1 the sequence. state
    [B, H, attention_state_width(V)] holds what `attend_page` has gathered of positions before those of kv; without one
    each head begins with its sink (sinks [H]), a score whose value is zero. wide: here all passes round alike.
    """
    tokens, heads, dim = q.shape
    width = out.shape[1] // heads
    grouped = q.reshape(tokens, kv.shape[0], -1, dim).permute(1, 2, 0, 3)  # [KVH, group, B, D]
    for first in range(0, tokens, QUERIES):  # scores of a whole prefill chunk would take gigabytes
        part = grouped[:, :, first : first + QUERIES]
        begin, end = start + first, start + first + part.shape[2]
        low = 0 if window is None else max(0, begin - window + 1)
        keys, values = keys_and_values(kv[:, None, low:end], dim)  # [KVH, 1, positions, D]
        values = values[..., :width]
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
        scores = scores.masked_fill(hidden, float("-inf"))
        if state is None:
            result = softmax_with(None if sinks is None else sinks.view(kv.shape[0], -1, 1, 1), scores) @ values
        else:
            seen = state[first : first + QUERIES].unflatten(1, grouped.shape[:2]).permute(1, 2, 0, 3)
            _, total, weighted = _merged(seen, scores, values)
            result = weighted / total
        out[first : first + QUERIES] = result.permute(2, 0, 1, 3).reshape(-1, heads * width)


def attend_page(
    q: Tensor,
    page: Tensor,
    scale: float,
    softcap: float | None,
    state: Tensor,
    first: bool,
    scratch: Tensor | None = None,
    sinks: Tensor | None = None,
    wide: bool = False,
) -> None:
    """Takes positions that all tokens see, page [KVH, n, *pair], into state [B, H, attention_state_width(V)].

    Before the `first`, nothing is in state, or the sinks.
    """
    dim = q.shape[2]
    grouped = q.unflatten(1, (page.shape[0], -1)).permute(1, 2, 0, 3)  # [KVH, group, B, D]
    keys, values = keys_and_values(page[:, None], dim)
    values = values[..., : state.shape[2] - 2]
    scores = grouped @ keys.transpose(2, 3) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if first:
        state[..., 0], state[..., 1:] = float("-inf"), 0
        if sinks is not None:
            state[..., 0], state[..., 1] = sinks, 1
    seen = state.unflatten(1, grouped.shape[:2]).permute(1, 2, 0, 3)
    merged = torch.cat(_merged(seen, scores, values), 3)
    state[..., : merged.shape[3]] = merged.permute(2, 0, 1, 3).flatten(1, 2)


def softmax_with(sinks: Tensor | None, scores: Tensor) -> Tensor:
    """Softmax over the last dimension, beside a score whose weight is left out (None: none); it broadcasts."""
    if sinks is None:
        return scores.softmax(-1)
    every = torch.cat((scores, sinks.expand(*scores.shape[:-1], 1)), -1)
    return every.softmax(-1)[..., :-1]


def attention_state_width(values: int) -> int:
    """Numbers of the running softmax of one query: best score, sum of weights, weighted values, and zeros."""
    return (values + 15) // 16 * 16 + 2


def _merged(seen: Tensor, scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Running softmax over what is `seen` [.., width] and positions of which scores and values are given."""
    best, total, weighted = seen[..., :1], seen[..., 1:2], seen[..., 2 : 2 + values.shape[3]]
    top = torch.maximum(best, scores.amax(3, keepdim=True))
    old, weights = (best - top).exp(), (scores - top).exp()
    return top, total * old + weights.sum(3, keepdim=True), weighted * old + weights @ values


def attention_scratch_bytes(tokens: int, heads: int, kv_heads: int, dim: int) -> int:
    """Torch allocates for itself."""
    return 0
