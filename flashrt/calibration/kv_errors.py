"""What choosing by labels costs each KV head, on text that the labels were not fitted to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from flashrt.calibration.kv_fit import LAST_CODE
from flashrt.kv.choice import recent
from flashrt.labels import LayerLabels
from flashrt.spec import Attention

Array = np.ndarray


class Rows(NamedTuple):
    """Queries of some positions of a layer, and all keys and values; after RoPE, float32."""

    positions: Array  # int64 [R]
    queries: Array  # [R, heads, head_dim]
    keys: Array  # [kv_heads, n, head_dim]
    values: Array  # [kv_heads, n, head_dim]


@dataclass(frozen=True, slots=True)
class Errors:
    """Squared errors of what the heads of each KV head give: float64 [rows, kv_heads, keeps].

    `squares` [rows] are the squares of what the layer's heads give together.
    """

    errors: Array
    squares: Array

    def relative(self, rows: slice) -> Array:
        """Errors of some rows as shares of the layer's squares, float64 [kv_heads, keeps]."""
        return self.errors[rows].sum(axis=0) / max(self.squares[rows].sum(), np.finfo(np.float64).tiny)

    @classmethod
    def joined(cls, parts: Sequence[Errors]) -> Errors:
        """Those of several windows."""
        return cls(np.concatenate([part.errors for part in parts]), np.concatenate([part.squares for part in parts]))


def measure(attention: Attention, labels: LayerLabels, rows: Rows, block: int, keeps: Sequence[float]) -> Errors:
    """Errors where these shares of all positions are kept."""
    group = attention.heads // attention.kv_heads
    errors = np.empty((len(rows.positions), attention.kv_heads, len(keeps)))
    squares = np.zeros(len(rows.positions))
    for h in range(attention.kv_heads):
        queries = rows.queries[:, h * group : (h + 1) * group]
        scores = queries @ rows.keys[h].T * attention.scale  # [R, group, n]
        seen = np.arange(scores.shape[-1]) <= rows.positions[:, None]
        shares = softmax(scores, seen)
        exact = shares @ rows.values[h]
        squares += (exact.astype(np.float64) ** 2).sum(axis=(1, 2))
        codes = np.clip(np.rint((rows.keys[h] @ labels.keys[h].T - labels.low[h]) / labels.step[h]), 0, LAST_CODE)
        guesses = (queries @ labels.queries[h].T * labels.step[h]) @ codes.T.astype(np.float32) * attention.scale
        for i, mask in enumerate(chosen(guesses, rows.positions, block, keeps)):
            kept = shares * mask[:, None]
            found = (kept @ rows.values[h]) / kept.sum(axis=-1, keepdims=True)
            errors[:, h, i] = ((found - exact).astype(np.float64) ** 2).sum(axis=(1, 2))
    return Errors(errors, squares)


def chosen(guesses: Array, positions: Array, block: int, keeps: Sequence[float]) -> list[Array]:
    """Which positions rows attend to, bool [R, n] for every share kept, by guesses of their scores [R, group, n]."""
    count = guesses.shape[-1]
    ends = np.array([recent(int(p)) for p in positions]) // block  # blocks before these may be chosen, but the first
    blocks = np.arange(-(-count // block))
    candidates = (blocks >= 1) & (blocks < ends[:, None])
    weights = softmax(guesses, np.repeat(candidates, block, axis=1)[:, :count]).sum(axis=1)
    weights = np.add.reduceat(weights, blocks * block, axis=1)
    order = np.argsort(np.where(candidates, -weights, np.inf), axis=1, kind="stable")
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.broadcast_to(blocks, order.shape), axis=1)
    always = (blocks == 0) | (blocks >= ends[:, None])
    seen = np.arange(count) <= positions[:, None]
    masks = []
    for keep in keeps:
        wanted = np.ceil(keep * (positions + 1) / block)[:, None]
        taken = always | (candidates & (ranks < wanted))
        masks.append(np.repeat(taken, block, axis=1)[:, :count] & seen)
    return masks


def softmax(scores: Array, seen: Array) -> Array:
    """Softmax of [R, group, n] over the positions seen, bool [R, n]; zeros for a row that sees none."""
    masked = np.where(seen[:, None], scores, -np.inf)
    top = masked.max(axis=-1, keepdims=True)
    weights = np.exp(masked - np.where(np.isfinite(top), top, 0))
    return weights / np.maximum(weights.sum(axis=-1, keepdims=True), np.finfo(np.float32).tiny)
