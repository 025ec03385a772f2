"""Attention heads that a token can do without, named before they are computed.

Contextual sparsity of multi-head attention (Deja Vu, Liu et al. 2023, section 4). Keys and values are always computed,
so the KV cache has no holes: queries, scores and sums of values are left out, and the output projection adds zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from flashrt.cache.weights import Weights
from flashrt.model.thinned import SINKS
from flashrt.predict.heads import HeadPredictor
from flashrt.spec import Attention
from flashrt.storage.layout import PREDICTOR

Array = np.ndarray


class Heads:
    """The heads of layer `i`, whose pack holds a predictor of them.

    A pass computes a head that any of its tokens chose, and the token that did not gets exactly nothing of it: so a
    token's result does not depend on the others, and a pass of one token leaves out the most.
    """

    def __init__(self, weights: Weights, ops: Any, i: int) -> None:
        name = f"{i}{PREDICTOR}heads"
        self._predictor = HeadPredictor(ops, weights.whole(name), weights.vector(f"{name}.bias"))

    def choose(self, x: Array, start: int, threshold: float) -> Array:
        """Heads that score above `threshold`, bool [B, heads].

        x float32 [B, hidden] are inputs of the attention from position `start` on.
        """
        chosen: Array = self._predictor.scores(x) > threshold
        chosen[: max(SINKS - start, 0)] = True
        return chosen


def spans(chosen: Array) -> Iterator[tuple[int, int]]:
    """Runs (first, end) of heads that any token chose, of bool [B, heads]."""
    edges = np.flatnonzero(np.diff(chosen.any(axis=0), prepend=False, append=False)).tolist()
    yield from zip(edges[::2], edges[1::2], strict=True)


def computed_rows(chosen: Array, attention: Attention) -> list[tuple[int, int]]:
    """Rows (first, end) of the projection to queries, keys and values that a pass computes."""
    dim = attention.head_dim
    queries = [(first * dim, end * dim) for first, end in spans(chosen)]
    return [*queries, (attention.heads * dim, attention.qkv_rows)]
