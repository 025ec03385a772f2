"""Samples of a made-up layer: ReLU neurons over inputs of few dimensions, that come in topics as text does."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flashrt.calibration.samples import Samples

Array = np.ndarray


@dataclass(frozen=True, slots=True)
class ReluLayer:
    weights: Array  # float32 [neurons, K]
    bias: Array
    norms: Array  # of the down rows

    def h(self, x: Array) -> Array:
        return np.maximum(x @ self.weights.T + self.bias, 0)

    def samples(self, x: Array, room: int = 0) -> Samples:
        samples = Samples(max(room, len(x)), x.shape[1], self.norms)
        samples.add(x, self.h(x))
        return samples


def relu_layer(seed: int = 0, neurons: int = 300, k: int = 72) -> ReluLayer:
    draw = np.random.default_rng(seed)
    weights = draw.standard_normal((neurons, k)).astype(np.float32)
    bias = -draw.uniform(0.5, 2.5, neurons).astype(np.float32) * np.linalg.norm(weights, axis=1) / 2
    return ReluLayer(weights, bias.astype(np.float32), draw.uniform(0.5, 2, neurons).astype(np.float32))


def text(seed: int, tokens: int, k: int = 72, dimensions: int = 9) -> Array:
    """Inputs float32 [tokens, k], mostly in a subspace; each token resembles the one before. Not centred."""
    basis = np.random.default_rng(1).standard_normal((dimensions, k)) / np.sqrt(dimensions)
    draw = np.random.default_rng(seed)
    state, states = np.zeros(dimensions), []
    for _ in range(tokens):
        state = 0.7 * state + 0.7 * draw.standard_normal(dimensions)
        states.append(state)
    x = np.array(states) @ basis + 0.1 * draw.standard_normal((tokens, k)) + 0.3 * basis[0]
    return x.astype(np.float32)
