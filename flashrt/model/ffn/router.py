"""Which experts a token goes to, and with what weight."""

from __future__ import annotations

import numpy as np

from flashrt.spec import Ffn

Array = np.ndarray


def route(logits: Array, ffn: Ffn) -> tuple[Array, Array]:
    """Choose `ffn.experts_per_token` experts for each token.

    logits: float32 [T, experts]. Returns (experts int64 [T, k], weights float32 [T, k]), softmax weights over all
    experts, rescaled to sum to one where the model does so. Ties go to the lower index.
    """
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = shifted / shifted.sum(axis=1, keepdims=True)
    chosen = np.argsort(-logits, axis=1, kind="stable")[:, : ffn.experts_per_token]
    weights = np.take_along_axis(probabilities, chosen, axis=1)
    if ffn.normalize_router:
        weights = weights / weights.sum(axis=1, keepdims=True)
    return chosen, weights.astype(np.float32)
