"""Chooses the next token from its logits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flashrt.config import Sampling

Array = np.ndarray


class Sampler:
    """One sequence's sampler: the same seed and logits give the same tokens."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int]) -> None:
        self.sampling = sampling
        self._random = np.random.default_rng(sampling.seed) if sampling.temperature > 0 else None
        self._seen = set(prompt)

    def choose(self, logits: Array) -> int:
        """The next token. logits: float32 [vocab]; may be changed."""
        if self.sampling.repetition_penalty != 1.0:
            self._penalize(logits)
        token = int(logits.argmax()) if self._random is None else self._draw(logits)
        self._seen.add(token)
        return token

    def _penalize(self, logits: Array) -> None:
        seen = np.fromiter(self._seen, np.int64, len(self._seen))
        values, penalty = logits[seen], self.sampling.repetition_penalty
        logits[seen] = np.where(values > 0, values / penalty, values * penalty)

    def _draw(self, logits: Array) -> int:
        assert self._random is not None
        tokens, probabilities = distribution(logits, self.sampling)
        return int(self._random.choice(tokens, p=probabilities))


def distribution(logits: Array, sampling: Sampling) -> tuple[Array, Array]:
    """The tokens that may be drawn, most likely first, and their probabilities (float64, sum 1)."""
    tokens = _candidates(logits, sampling.top_k)
    scaled = logits[tokens].astype(np.float64) / sampling.temperature
    probabilities = np.exp(scaled - scaled[0])
    probabilities /= probabilities.sum()
    keep = len(tokens)
    if sampling.top_p < 1.0:
        keep = int(np.searchsorted(probabilities.cumsum(), sampling.top_p)) + 1
    if sampling.min_p > 0.0:
        keep = min(keep, int((probabilities >= sampling.min_p * probabilities[0]).sum()))
    keep = max(keep, 1)
    return tokens[:keep], probabilities[:keep] / probabilities[:keep].sum()


def _candidates(logits: Array, top_k: int) -> Array:
    """Indices of the `top_k` largest logits (0: of all), in descending order, ties by index."""
    if 0 < top_k < len(logits):
        threshold = np.partition(logits, -top_k)[-top_k]
        indices = np.flatnonzero(logits >= threshold)
        return indices[np.argsort(-logits[indices], kind="stable")][:top_k]
    return np.argsort(-logits, kind="stable")
