"""What choosing by labels costs each KV head, on text that the labels were not fitted to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from flashrt.calibration.kv_fit import LAST_CODE
from flashrt.kv.choice import recent
from flashrt.labels import LayerLabels
from flashrt.spec import Attention

Array = np.ndarray


ROWS = 16  # computed at a time: what is computed for all keys and one KV head does not grow with the rows


class Rows(NamedTuple):
    """Queries of some positions of a layer, and how to get at all keys and values; after RoPE, float32.

    sinks: of the layer's heads (see `Attention.sinks`), float32 [heads]
    """

    positions: Array  # int64 [R]
    queries: Array  # [R, heads, head_dim]
    stored: Callable[[int], tuple[Array, Array]]  # keys and values of a KV head, each [n, head_dim]
    sinks: Array | None = None


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
        keys, values = rows.stored(h)
        codes = np.clip(np.rint((keys @ labels.keys[h].T - labels.low[h]) / labels.step[h]), 0, LAST_CODE)
        codes, own = codes.astype(np.float32), slice(h * group, (h + 1) * group)
        sinks = None if rows.sinks is None else rows.sinks[own]
        for begin in range(0, len(rows.positions), ROWS):
            part = slice(begin, begin + ROWS)
            queries = rows.queries[part, own]
            scores = _times(queries, keys.T) * attention.scale  # [R, group, n]
            guesses = _times(queries @ labels.queries[h].T * labels.step[h], codes.T) * attention.scale
            masks = chosen(guesses, rows.positions[part], block, keeps)
            errors[part, h], found = _of_masks(scores, values, rows.positions[part], masks, sinks)
            squares[part] += found
    return Errors(errors, squares)


def _of_masks(
    scores: Array, values: Array, positions: Array, masks: Sequence[Array], sinks: Array | None
) -> tuple[Array, Array]:
    """Squared errors by what is attended to, float64 [R, masks], and the squares of what is attended to exactly."""
    seen = np.arange(scores.shape[-1]) <= positions[:, None]
    shares, rest = _shares(scores, seen, sinks)
    exact = _times(shares, values)
    errors = np.empty((len(positions), len(masks)))
    for i, mask in enumerate(masks):
        kept = shares * mask[:, None]
        found = _times(kept, values) / (kept.sum(axis=-1, keepdims=True) + rest)
        errors[:, i] = ((found - exact).astype(np.float64) ** 2).sum(axis=(1, 2))
    return errors, (exact.astype(np.float64) ** 2).sum(axis=(1, 2))


def _shares(scores: Array, seen: Array, sinks: Array | None) -> tuple[Array, Array | float]:
    """The softmax of scores [R, group, n], and what sinks [group] have of it."""
    if sinks is None:
        return softmax(scores, seen), 0.0
    own = np.broadcast_to(sinks[None, :, None], (*scores.shape[:2], 1))
    every = softmax(np.concatenate((scores, own), -1), np.pad(seen, ((0, 0), (0, 1)), constant_values=True))
    return every[..., :-1], every[..., -1:]


def _times(rows: Array, matrix: Array) -> Array:
    """[R, group, n] times [n, m] in one product: one for each row would be of a few rows, and slow."""
    return (rows.reshape(-1, rows.shape[-1]) @ matrix).reshape(*rows.shape[:-1], matrix.shape[-1])


def measure_bytes(attention: Attention, count: int) -> int:
    """Bytes that `measure` takes beside its arguments, for `count` keys of each KV head: about, and at most."""
    group, dim = attention.heads // attention.kv_heads, attention.head_dim
    scores, masks = ROWS * group * count * 4, ROWS * count * 16
    return (9 if attention.sinks else 8) * scores + masks + 4 * count * 4 * dim


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
