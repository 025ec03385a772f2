"""The exact answer, for as much work as it is to save: for tests, and as what predictors are compared with."""

from __future__ import annotations

import numpy as np

Array = np.ndarray


class Oracle:
    """Neurons that a ReLU or ReLU² lets through.

    `weights` (float32 [neurons, K]) are the rows that decide: gate, or up where there is no gate. `bias` (float32
    [neurons]) is added to their products.
    """

    def __init__(self, weights: Array, bias: Array | None = None) -> None:
        self._weights, self._bias = weights, np.zeros(len(weights), np.float32) if bias is None else bias
        self.nbytes = weights.nbytes + self._bias.nbytes

    def predict(self, hidden: Array) -> Array:
        """See `Predictor.predict`."""
        return np.flatnonzero((hidden @ self._weights.T + self._bias > 0).any(axis=0)).astype(np.int32)
