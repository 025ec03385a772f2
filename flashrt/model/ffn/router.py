"""Which experts a token goes to, and with what weight."""

from __future__ import annotations

import numpy as np

from flashrt.spec import Ffn

Array = np.ndarray


def route(logits: Array, ffn: Ffn, correction: Array | None = None, scales: Array | None = None) -> tuple[Array, Array]:
    """Choose `ffn.experts_per_token` experts for each token.

    logits: float32 [T, experts]; correction: float32 [experts], added to scores for the choice alone; scales: float32
    [experts], of their weights. Returns (experts int64 [T, k], weights float32 [T, k]). Ties go to the lower index.
    """
    scores = sigmoid(logits) if ffn.router_scores == "sigmoid" else _softmax(logits)
    grouped = ffn.router_groups_used < ffn.router_groups
    if correction is None and not grouped:
        worth = logits  # scores have their order, but lose differences where they round
    else:
        worth = scores if correction is None else scores + correction
    chosen = _best(_in_best_groups(worth, ffn) if grouped else worth, ffn.experts_per_token)
    weights = np.take_along_axis(scores, chosen, axis=1)
    if ffn.normalize_router:
        weights = weights / np.maximum(weights.sum(axis=1, keepdims=True), np.float32(1e-20))
    weights = weights * ffn.router_scale
    return chosen, (weights if scales is None else weights * scales[chosen]).astype(np.float32)


def sigmoid(logits: Array) -> Array:
    """1 / (1 + exp(-x)), without overflow."""
    small = np.exp(-np.abs(logits))
    return np.where(logits < 0, small, np.float32(1)) / (1 + small)


def _softmax(logits: Array) -> Array:
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def _best(worth: Array, count: int) -> Array:
    return np.argsort(-worth, axis=1, kind="stable")[:, :count]


def _in_best_groups(worth: Array, ffn: Ffn) -> Array:
    """What experts are worth, -inf outside of the groups that a token uses."""
    tokens, groups = len(worth), ffn.router_groups
    grouped = worth.reshape(tokens, groups, -1)
    sums = -np.sort(-grouped, axis=2)[:, :, : ffn.router_group_best].sum(axis=2)
    used = np.zeros((tokens, groups, 1), bool)
    np.put_along_axis(used, _best(sums, ffn.router_groups_used)[:, :, None], True, axis=1)
    return np.where(used, grouped, -np.inf).reshape(tokens, -1)
