"""What a sampler draws from, as tests compare it."""

from __future__ import annotations

import numpy as np

from flashrt.config import Sampling
from flashrt.engine.sampling import draw_weights

Array = np.ndarray


def distribution(logits: Array, sampling: Sampling) -> tuple[Array, Array]:
    """The tokens that may be drawn, most likely first, and their probabilities (float64, sum 1)."""
    weights = draw_weights(logits, sampling)
    tokens = np.flatnonzero(weights)
    tokens = tokens[np.argsort(-weights[tokens], kind="stable")]
    probabilities = weights[tokens].astype(np.float64)
    return tokens, probabilities / probabilities.sum()
