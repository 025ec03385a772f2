"""Scores of a layer's heads from the input of its attention: how much each will give, as the logarithm of a share.

One row of weights a head. A bottleneck, as for neurons, would be larger than what it saves: heads are few.
"""

from __future__ import annotations

import numpy as np

from flashrt.model.predictors.low_rank import CODEC
from flashrt_kernels.ops import Ops

Array = np.ndarray


class HeadPredictor:
    """score = weights · x + bias, by bundles of eight int4 rows (uint8 [n, stride]) and a bias float32 [heads].

    `nbytes` is the memory that it takes.
    """

    def __init__(self, ops: Ops[Array], weights: Array, bias: Array) -> None:
        self._ops, self._weights, self._bias = ops, weights, bias
        self.nbytes = weights.nbytes + bias.nbytes

    def scores(self, x: Array) -> Array:
        """Of every head, float32 [B, heads], for a few tokens x float32 [B, hidden]."""
        scores = np.empty((len(x), len(self._bias)), np.float32)
        self._ops.linear(x, self._weights, CODEC, scores, 0, scores.shape[1], self._bias)
        return scores
