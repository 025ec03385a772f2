"""Finds the factors of a low-rank predictor from calibration samples, with numpy alone.

First a closed form: of all matrices of the rank, the one whose products with the samples come nearest to those of the
weights (reduced-rank regression; Izenman 1975). Then Adam on the logistic loss of "the neuron is active", a neuron that
is counting by its importance, so that scores rank neurons by what leaving them out costs. At last the threshold, on
samples that were held out.

A non-linearity in the bottleneck (Deja Vu) was tried and made predictions worse at equal bytes.
"""

from __future__ import annotations

import numpy as np

from flashrt.calibration.samples import Samples
from flashrt.errors import UsageError
from flashrt.model.predictors.low_rank import Factors

Array = np.ndarray

HELD_OUT = 8  # every eighth stretch of text decides the threshold; the others are fitted to
STRETCH = 64  # tokens: neighbours are too much alike to be on both sides
LEAST_TOKENS = HELD_OUT * STRETCH
ITERATIONS = 5  # of the subspace; the spectrum of activations falls steeply
OVERSAMPLING = 16
LOGIT = 1.702  # the logistic function of 1.702 x is within 0.01 of the normal distribution's
EPOCHS = 8
BATCH = 256
RATE = 0.02  # of Adam, relative to the size of the numbers in a matrix
WARM_UP = 50  # steps
BETAS = 0.9, 0.99
CHUNK = 1024  # tokens whose products exist at once


def fit(samples: Samples, weights: Array, bias: Array | None, rank: int, recall: float) -> Factors:
    """Factors of `rank` that find neurons with a share `recall` of all importance, on text not fitted to.

    `weights` (float32 [neurons, K]) and `bias` (float32 [neurons]) decide whether a neuron is active; see `Oracle`.
    Raises UsageError when there are too few samples, or none of them activates any neuron.
    """
    if samples.count < LEAST_TOKENS:
        raise UsageError(f"a predictor takes {LEAST_TOKENS} tokens at least, found {samples.count}: use a longer text")
    held = held_out(samples.count)
    start = closed_form(samples.inputs, weights, np.zeros(len(weights), np.float32) if bias is None else bias, rank)
    factors = refine(start, samples, np.flatnonzero(~held))
    threshold = find_threshold(factors, samples, np.flatnonzero(held), recall)
    return Factors(factors.down, factors.up, factors.bias - threshold)


def held_out(count: int) -> Array:
    """Which of `count` tokens nothing but the threshold is fitted to, bool [count]."""
    return np.arange(count) // STRETCH % HELD_OUT == HELD_OUT - 1


def closed_form(inputs: Array, weights: Array, bias: Array, rank: int) -> Factors:
    """Factors of `rank` whose scores are nearest to weights · x + bias, as logits of being positive.

    With the covariance S of the inputs and the leading eigenvectors U of W S W^T, U U^T W is the best matrix of its
    rank. U is found by subspace iteration (Halko et al. 2011).
    """
    mean = inputs.mean(axis=0)
    covariance = _covariance(inputs, mean)
    basis = np.random.default_rng(0).standard_normal((weights.shape[1], min(rank + OVERSAMPLING, *weights.shape)))
    subspace = np.linalg.qr(weights @ basis.astype(np.float32))[0]
    for _ in range(ITERATIONS):
        subspace = np.linalg.qr(weights @ (covariance @ (weights.T @ subspace)))[0]
    inner = subspace.T @ weights
    _, vectors = np.linalg.eigh(inner @ covariance @ inner.T)
    up = subspace @ vectors[:, ::-1][:, :rank]
    down = up.T @ weights
    residual = weights - up @ down
    deviation = np.sqrt(np.maximum(np.einsum("nk,nk->n", residual @ covariance, residual), 1e-12))
    scale = (LOGIT / np.maximum(deviation, 1e-3 * deviation.mean() + 1e-12)).astype(np.float32)
    return Factors(down, up * scale[:, None], (bias + residual @ mean) * scale)


def refine(factors: Factors, samples: Samples, tokens: Array) -> Factors:
    """Lower the weighted logistic loss on `tokens` (indices) by Adam (Kingma and Ba 2015)."""
    down, up, bias = factors.down.copy(), factors.up.copy(), factors.bias.copy()
    typical = _typical_importance(samples, tokens)
    steps = EPOCHS * -(-len(tokens) // BATCH)
    adam = _Adam([down, up, bias], RATE, steps)
    shuffle = np.random.default_rng(0)
    for _ in range(EPOCHS):
        shuffled = shuffle.permutation(tokens)
        for begin in range(0, len(tokens), BATCH):
            batch = shuffled[begin : begin + BATCH]
            x = samples.inputs[batch]
            inner = x @ down.T
            slope = _slope(inner @ up.T + bias, samples.importance(batch) / typical)
            adam.step([(slope @ up).T @ x, slope.T @ inner, slope.sum(axis=0)])
    return Factors(down, up, bias)


def find_threshold(factors: Factors, samples: Samples, tokens: Array, recall: float) -> float:
    """The largest score that a share `recall` of the importance of `tokens` (indices) lies above."""
    scores, importance = [], []
    for part in np.array_split(tokens, -(-len(tokens) // CHUNK)):
        found = samples.importance(part)
        active = found > 0
        scores.append((samples.inputs[part] @ factors.down.T @ factors.up.T + factors.bias)[active])
        importance.append(found[active])
    return recall_threshold(np.concatenate(scores), np.concatenate(importance), recall)


def recall_threshold(scores: Array, importance: Array, recall: float) -> float:
    """The largest score that a share `recall` of all importance lies above; both float32 [n], of active neurons.

    Raises UsageError where no neuron is active.
    """
    if len(scores) == 0:
        raise UsageError("no neuron of a layer was active in the text: use a longer one")
    order = np.argsort(-scores, kind="stable")
    sums = np.cumsum(importance[order], dtype=np.float64)
    last = min(int(np.searchsorted(sums, recall * sums[-1])), len(order) - 1)
    return float(np.nextafter(scores[order[last]], np.float32(-np.inf)))


def _covariance(inputs: Array, mean: Array) -> Array:
    total = np.zeros((len(mean), len(mean)), np.float32)
    for begin in range(0, len(inputs), CHUNK):
        centred = inputs[begin : begin + CHUNK] - mean
        total += centred.T @ centred
    return total / np.float32(len(inputs))


def _typical_importance(samples: Samples, tokens: Array) -> float:
    """Mean importance of neurons that are active."""
    total = active = 0.0
    for part in np.array_split(tokens, -(-len(tokens) // CHUNK)):
        importance = samples.importance(part)
        total += float(importance.sum(dtype=np.float64))
        active += float(np.count_nonzero(importance))
    return max(total / max(active, 1.0), 1e-30)


def _slope(scores: Array, weight: Array) -> Array:
    """Derivative of the mean loss by the scores, in their place: p where inactive, weight (p - 1) where active."""
    p = np.clip(scores, -30, 30, out=scores)
    np.negative(p, out=p)
    np.exp(p, out=p)
    p += 1
    np.reciprocal(p, out=p)
    np.subtract(p, 1, out=p, where=weight > 0)
    np.multiply(p, weight, out=p, where=weight > 0)
    p /= np.float32(len(p))
    return p


class _Adam:
    """Adam with a step in proportion to the size of each parameter's numbers, falling to zero over `steps`."""

    def __init__(self, parameters: list[Array], rate: float, steps: int) -> None:
        self._parameters, self._steps, self._done = parameters, steps, 0
        self._rates = [rate * float(np.sqrt(np.mean(np.square(p), dtype=np.float64))) for p in parameters]
        self._first = [np.zeros_like(p) for p in parameters]
        self._second = [np.zeros_like(p) for p in parameters]

    def step(self, gradients: list[Array]) -> None:
        """Change the parameters, in place."""
        self._done += 1
        schedule = min(1.0, self._done / WARM_UP) * (1 - (self._done - 1) / self._steps)
        one, two = BETAS
        for i, gradient in enumerate(gradients):
            first, second = self._first[i], self._second[i]
            first += (1 - one) * (gradient - first)
            second += (1 - two) * (gradient * gradient - second)
            unbiased = np.sqrt(second / (1 - two**self._done)) + 1e-12
            self._parameters[i] -= self._rates[i] * schedule / (1 - one**self._done) * first / unbiased
