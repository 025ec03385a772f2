"""How likely the model holds a token to be, before any parameter of sampling changes that."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Array = np.ndarray

MOST_LIKELIEST = 20  # tokens that are named beside one, at most; as OpenAI's API bounds them
PIECE = 1 << 13  # logits whose exponentials are held in float64 at a time


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Natural logarithms of probabilities: of one token, and of the `top` tokens in its place, the likeliest first."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def log_total(logits: Array) -> float:
    """log(sum(exp(logits))) of float32 [vocab], in float64."""
    peak = float(logits.max())
    pieces = (logits[begin : begin + PIECE].astype(np.float64) for begin in range(0, len(logits), PIECE))
    return peak + float(np.log(sum(float(np.exp(piece - peak).sum()) for piece in pieces)))


def likeliest(logits: Array, count: int) -> list[int]:
    """The `count` tokens of the largest logits, float32 [vocab]; of those that are equal, the first."""
    if count == 0:
        return []
    ordered = logits.copy()
    ordered.partition(max(len(logits) - count, 0))
    found = np.flatnonzero(logits >= ordered[-count:].min())
    return [int(token) for token in found[np.argsort(-logits[found], kind="stable")][:count]]
