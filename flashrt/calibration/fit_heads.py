"""What attention may leave out by head, fitted to samples: a predictor of what each head gives, and thresholds.

A head's *importance* for a token is the length of what it adds to the residual stream, as a share of the stream's own
length. Its logarithm is predicted by ridge regression (Hoerl and Kennard 1970) on the attention's input: Deja Vu's
classifiers (section 4) need a network of their own, and beside a head's queries that would cost more than it saves.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flashrt.calibration.fit_channels import Choice, Inputs
from flashrt.calibration.fit_predictor import held_out
from flashrt.model.predictors.heads import HeadPredictor
from flashrt.model.predictors.low_rank import encode
from flashrt_kernels.ops import Ops

SHARES = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)  # of the heads that choices keep, beside all of them
PROBE_SHARE = 0.5  # the share by which layers are weighed
RIDGE = 0.03  # of the inputs' variance, when there are as many tokens as weights
# What it costs to compute heads apart, in bytes of weights that memory gives in the time: 30 microseconds for the
# prediction, and 6 for every run of neighbouring heads, which takes calls of its own.
SPLIT_BYTES, RUN_BYTES = 1 << 20, 200_000
EVERYTHING = -1e30  # a threshold that every score is above

Array = np.ndarray


@dataclass(frozen=True, slots=True)
class HeadFit:
    """What calibration found out about the heads of one layer; see `HeadPredictor` for `weights` and `bias`."""

    weights: Array  # float32 [heads, hidden]
    bias: Array  # float32 [heads]
    choices: list[Choice]

    @property
    def strong(self) -> Choice:
        return self.choices[1 + SHARES.index(PROBE_SHARE)]


class Attended:
    """What the heads of one layer add to the residual stream.

    `values` float32 [n, heads * head_dim] are sums of values, `out` float32 [hidden, heads * head_dim] projects them.
    """

    def __init__(self, values: Array, out: Array, heads: int) -> None:
        self.values, self.out, self.heads = values, out, heads

    def lengths(self) -> Array:
        """Of what each head adds, float32 [n, heads]."""
        values, out = (matrix.reshape(len(matrix), self.heads, -1) for matrix in (self.values, self.out))
        added = (values[:, head] @ out[:, head].T for head in range(self.heads))
        return np.stack([np.linalg.norm(vectors, axis=1) for vectors in added], axis=1)

    def added(self, tokens: Array, chosen: Array) -> Array:
        """By the heads `chosen` (bool [m, heads]) for `tokens` (indices) together, float32 [m, hidden]."""
        values = self.values[tokens].reshape(len(tokens), self.heads, -1)
        result: Array = np.where(chosen[:, :, None], values, 0).reshape(len(tokens), -1) @ self.out.T
        return result


def fit_heads(given: Inputs, attended: Attended, query_bytes: int, kernels: Ops[Array]) -> HeadFit:
    """Fit one layer to samples of its input. `query_bytes` are those of the weights behind one head's queries."""
    held = held_out(len(given.x))
    importance = np.log(attended.lengths() * np.sqrt(given.weights)[:, None] + 1e-30)
    weights, bias = _ridge(given.x[~held], importance[~held])
    encoded = encode(kernels, weights)
    predictor = HeadPredictor(kernels, encoded, bias)
    tokens = np.flatnonzero(held)
    scores = np.concatenate([predictor.scores(given.x[t : t + 1]) for t in tokens])
    probe = Inputs(given.x[held], given.weights[held])
    nothing = np.zeros((len(tokens), given.x.shape[1]), np.float32)
    choices = [Choice((EVERYTHING,), attended.heads * query_bytes, 0.0, 0)]
    for share in SHARES:
        threshold = float(np.quantile(scores, 1 - share))
        chosen = scores > threshold
        nbytes = SPLIT_BYTES + RUN_BYTES * _runs(chosen) + predictor.nbytes + query_bytes * float(chosen.sum(1).mean())
        error = probe.error(attended.added(tokens, ~chosen), nothing)
        choices.append(Choice((threshold,), nbytes, error, predictor.nbytes))
    return HeadFit(weights, bias, choices)


def _runs(chosen: Array) -> float:
    """Runs of neighbouring heads in a token's, on average, of bool [n, heads]."""
    begins = chosen.copy()
    begins[:, 1:] &= ~chosen[:, :-1]
    return float(begins.sum(1).mean())


def _ridge(x: Array, wanted: Array) -> tuple[Array, Array]:
    """weights float32 [k, K] and bias [k] whose products with x [n, K] are nearest to `wanted` [n, k]."""
    mean, middle = x.mean(0), wanted.mean(0)
    centred = x - mean
    covariance = centred.T @ centred / len(x)
    strength = RIDGE * x.shape[1] / len(x) * np.trace(covariance) / x.shape[1]
    covariance[np.diag_indices_from(covariance)] += strength
    weights = np.linalg.solve(covariance, centred.T @ (wanted - middle) / len(x)).T
    return np.ascontiguousarray(weights, np.float32), (middle - weights @ mean).astype(np.float32)
