"""How likely each expert of a mixture is to be named by the next token: what a cache of experts is ordered by.

Experts have favourites among themselves, and tokens stick to the experts of the token before. Either alone misleads:
least recently used forgets the favourites, least frequently used the last token. So the forecast is a frequency with
exponential decay, raised for the experts of the last token by as much as routers have been seen to repeat themselves.
"""

from __future__ import annotations

import numpy as np

Array = np.ndarray

DECAY = 0.98  # of the frequency, per token
REPETITION_DECAY = 0.999  # of what is known of repetition, per layer and pass
DISTANCE = 0.1  # of probability, between the layer whose turn is next and the one whose turn was last


class Forecast:
    """`probabilities`, float64 [layers, experts]: that the next token names an expert, as far as past ones tell."""

    def __init__(self, layers: int, experts: int) -> None:
        self._sums = np.zeros((layers, experts))  # of past uses, fading
        self._weights = np.ones((layers, 1))  # what the sums would be of an expert that every token names, and doubt
        self._last = np.zeros((layers, experts), bool)  # named by the last token
        self._repeated = self._by_chance = self._seen = 0.0

    def update(self, layer: int, chosen: Array) -> None:
        """Learn what the router of `layer` chose: int [T, k], the experts of T consecutive tokens."""
        tokens, last = len(chosen), self._last[layer]
        frequency = (self._sums[layer] - last) / self._weights[layer]  # of the tokens before the last
        named = np.zeros((tokens + 1, len(last)), bool)
        named[0] = last
        named[np.arange(1, tokens + 1)[:, None], chosen] = True
        self._repeated = REPETITION_DECAY * self._repeated + np.count_nonzero(named[1:] & named[:-1])
        self._by_chance = REPETITION_DECAY * self._by_chance + float((named[:-1] @ frequency).sum())
        self._seen = REPETITION_DECAY * self._seen + np.count_nonzero(named[:-1])
        fades = DECAY ** np.arange(tokens, -1, -1)
        self._sums[layer] = fades[0] * self._sums[layer] + fades[1:] @ named[1:]
        self._weights[layer] = fades[0] * self._weights[layer] + fades[1:].sum()
        self._last[layer] = named[-1]

    @property
    def stickiness(self) -> float:
        """By how much the last token's experts are likelier than their frequency says, as a share of what is left."""
        beyond_chance = self._repeated - self._by_chance
        return min(max(beyond_chance / max(self._seen - self._by_chance, 1e-9), 0.0), 1.0)

    @property
    def probabilities(self) -> Array:
        stickiness = self.stickiness
        return (1 - stickiness) * self._sums / self._weights + stickiness * self._last

    def values(self, layer: int) -> Array:
        """What it is worth to keep each expert while `layer` computes, float64 [layers, experts].

        The layer that computes comes last: of two experts equally likely to be named, its own is needed later.
        """
        layers = len(self._sums)
        distance = (np.arange(layers) - layer - 1) % layers / layers
        return self.probabilities - DISTANCE * distance[:, None]
