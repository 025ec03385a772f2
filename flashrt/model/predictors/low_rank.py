"""Scores of all neurons through a bottleneck: two small matrices instead of one large one.

As in LLM in a Flash (section 3.1) and Deja Vu (section 3.2); `flashrt.calibration.fit_predictor` finds the matrices.
Rows of 4 bits predict nearly as well as rows of 8 and leave room for almost twice the rank, which names far fewer
neurons.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flashrt_kernels.ops import Ops
from flashrt_kernels.rows import MATRIX_ROWS, Codec, align, bundle_stride, row_bytes

Array = np.ndarray

CODEC = Codec.INT4  # rows are padded to 64 weights: other ranks than multiples of it waste bytes


@dataclass(frozen=True, slots=True)
class Factors:
    """score = up · (down · x) + bias; a neuron is predicted when its score is positive."""

    down: Array  # float32 [rank, K]
    up: Array  # float32 [neurons, rank]
    bias: Array  # float32 [neurons], the threshold included

    @property
    def nbytes(self) -> int:
        """Bytes of the encoded factors, as `LowRank` keeps them."""
        return sum(_bundles_bytes(*matrix.shape) for matrix in (self.down, self.up)) + self.bias.nbytes


class LowRank:
    """A predictor by encoded factors: bundles of eight int4 rows, which `ops.linear` takes (uint8 [n, stride]).

    `down` holds `rank` rows of K weights, `up` one row of `rank` weights for each neuron; `bias` is float32 [neurons].
    At most `tokens` at a time. Nothing is allocated per call but the answer.
    """

    def __init__(self, ops: Ops[Array], down: Array, up: Array, bias: Array, rank: int, tokens: int) -> None:
        self._ops, self._down, self._up, self._bias = ops, down, up, bias
        self._inner = np.zeros((tokens, rank), np.float32)
        self._scores = np.zeros((tokens, len(bias)), np.float32)
        self._chosen = np.zeros(len(bias), bool)
        self._top = np.zeros(len(bias), np.float32)
        kept = (down, up, bias, self._inner, self._scores, self._chosen, self._top)
        self.nbytes = sum(array.nbytes for array in kept)

    def predict(self, hidden: Array) -> Array:
        """See `Predictor.predict`."""
        np.max(self.scores(hidden), axis=0, out=self._top)
        np.greater(self._top, 0, out=self._chosen)
        return np.flatnonzero(self._chosen).astype(np.int32)

    def scores(self, hidden: Array) -> Array:
        """Of every neuron, float32 [B, neurons]; valid until the next call."""
        inner, scores = self._inner[: len(hidden)], self._scores[: len(hidden)]
        self._ops.linear(hidden, self._down, CODEC, inner, 0, inner.shape[1])
        self._ops.linear(inner, self._up, CODEC, scores, 0, scores.shape[1], self._bias)
        return scores


def encode(ops: Ops[Array], matrix: Array) -> Array:
    """float32 [rows, k] → bundles uint8 [n, stride] of int4 rows; the last bundle is filled up with zeros."""
    rows, k = matrix.shape
    size = row_bytes(CODEC, k)
    bundles = np.zeros((-(-rows // MATRIX_ROWS), bundle_stride(CODEC, k, MATRIX_ROWS)), np.uint8)
    encoded = np.zeros((len(bundles) * MATRIX_ROWS, size), np.uint8)
    ops.quantize(matrix, CODEC, encoded[:rows])
    bundles[:, : MATRIX_ROWS * size] = encoded.reshape(len(bundles), -1)
    return bundles


def _bundles_bytes(rows: int, k: int) -> int:
    return align(rows, MATRIX_ROWS) // MATRIX_ROWS * bundle_stride(CODEC, k, MATRIX_ROWS)
