"""How much each KV head keeps, beside the others: what it is worth, where all together keep a given share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Array = np.ndarray

KEEP = 1 / 16  # of all positions, for which shares are chosen
SHARES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 8.0, 16.0)  # of that; the last keeps everything
KEEPS = tuple(KEEP * share for share in SHARES)
BISECTIONS = 60


def divide(errors: Sequence[Array]) -> list[Array]:
    """Shares for the KV heads of each layer with the least sum of errors; their mean is at most 1.

    errors: by layer, float64 [kv_heads, keeps], those of `KEEPS`. In Lagrange's form: at a price of keeping, every head
    makes its own cheapest choice, and the price is what makes the mean fit.
    """
    shares, every = np.asarray(SHARES), np.concatenate(list(errors))

    def at(price: float) -> Array:
        return shares[(every + price * shares).argmin(axis=1)]

    low, high = 1e-12, 1e6
    for _ in range(BISECTIONS):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if at(middle).mean() <= 1 else (middle, high)
    ends = np.cumsum([len(layer) for layer in errors])[:-1]
    return np.split(at(high), ends)


def is_dense(shares: Array) -> bool:
    """Whether all heads of a layer keep everything, so that it needs no labels."""
    return bool((shares == SHARES[-1]).all())


def error_at(errors: Sequence[Array], shares: Sequence[Array]) -> float:
    """The mean over layers of their errors, where each head keeps its share."""
    places = [[SHARES.index(share) for share in layer] for layer in shares]
    chosen = [layer[np.arange(len(layer)), own].sum() for layer, own in zip(errors, places, strict=True)]
    return float(np.mean(chosen))
