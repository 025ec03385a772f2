"""Attention heads that a token can do without, named before they are computed.

Contextual sparsity of multi-head attention (Deja Vu, Liu et al. 2023, section 4). Keys and values are always computed,
so the KV cache has no holes: queries, scores and sums of values are left out, and the output projection adds zeros.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from flashrt.cache.weights import Weights
from flashrt.model.predictors.heads import HeadPredictor
from flashrt.sparsity import SINKS
from flashrt.spec import Attention
from flashrt.storage.layout import PREDICTOR

Array = np.ndarray
HeadRange = tuple[int, int]  # the first of some neighbours, and the end of them


class Chosen(NamedTuple):
    """Heads that take part in a pass."""

    each: Array  # bool [B, heads]: for every token
    spans: list[HeadRange]  # of heads, for any of them


class Heads:
    """The heads of layer `i`, whose pack holds a predictor of them.

    A pass computes a head that any of its tokens chose, and the token that did not gets exactly nothing of it: so a
    token's result does not depend on the others, and a pass of one token leaves out the most.
    """

    def __init__(self, weights: Weights, ops: Any, i: int) -> None:
        name = f"{i}{PREDICTOR}heads"
        self._predictor = HeadPredictor(ops, weights.pinned(name), weights.vector(f"{name}.bias"))

    def choose(self, x: Array, positions: Array, threshold: float) -> Chosen:
        """Heads that score above `threshold`, for inputs x of the attention, float32 [B, hidden], at `positions`."""
        each = self._predictor.scores(x) > threshold
        each[positions < SINKS] = True
        return Chosen(each, runs(each))


def runs(chosen: Array) -> list[HeadRange]:
    """Runs of heads that any token chose, of bool [B, heads]. A loop: numpy takes longer for so few."""
    found, first = [], -1
    for head, taken in enumerate([*np.logical_or.reduce(chosen).tolist(), False]):
        if taken and first < 0:
            first = head
        elif first >= 0 and not taken:
            found.append((first, head))
            first = -1
    return found


def computed_rows(spans: list[HeadRange], attention: Attention) -> list[HeadRange]:
    """Rows of the projection to queries, keys and values that a pass computes."""
    dim = attention.head_dim
    return [*((first * dim, end * dim) for first, end in spans), (attention.heads * dim, attention.qkv_rows)]
