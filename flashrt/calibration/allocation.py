"""The loss that a model may take, divided among its blocks: each gives up what costs the least for the bytes it saves.

A greedy allocation in Lagrange's form: under one price of loss in bytes, every block makes its own cheapest choice, and
the price is what makes the sum of losses fit (Everett, Operations Research 11(3), 1963).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from flashrt.calibration.fit_channels import Choice, cheapest

CHEAPEST, DEAREST = 1e-3, 1e15  # bytes that a loss of one nat may be worth
BISECTIONS = 60

Picked = tuple[Choice, ...]  # of one block, one choice of each part
Weight = tuple[float, ...]  # nats that an error of one costs in one block, by parts


class Fit(Protocol):
    """What was fitted to one block: the choices of each of its parts, and what they make of it."""

    @property
    def parts(self) -> tuple[list[Choice], ...]: ...

    @property
    def strong(self) -> tuple[Choice, ...]:
        """The choices by which the parts are weighed: what they leave out can be measured."""

    @property
    def whole(self) -> Any:
        """What a pack is made of on which every choice can be tried: all is stored, and let through."""

    def sparsity(self, picked: Picked) -> Any: ...

    def figures(self, picked: Picked) -> dict[str, float]:
        """What is known about the choices, by name."""


def pick(fit: Fit, weight: Weight, price: float, stored: float) -> Picked:
    """The choices of one block when a nat costs `price` bytes."""
    return tuple(cheapest(part, price * nats, stored) for part, nats in zip(fit.parts, weight, strict=True))


def allocate(fits: Sequence[Fit], weights: Sequence[Weight], loss: float, stored: float) -> list[Picked]:
    """The cheapest choices whose predicted loss, in nats, is at most `loss`.

    `stored` is what a byte that has to be stored is worth beside one that a token touches.
    """

    def at(price: float) -> list[Picked]:
        return [pick(fit, weight, price, stored) for fit, weight in zip(fits, weights, strict=True)]

    def predicted(picked: Sequence[Picked]) -> float:
        return sum(
            nats * choice.error
            for weight, choices in zip(weights, picked, strict=True)
            for nats, choice in zip(weight, choices, strict=True)
        )

    return at(_lowest(lambda price: predicted(at(price)) <= loss))


def cost(picked: Sequence[Picked], stored: float) -> float:
    """Bytes touched and stored, in bytes touched."""
    return sum(choice.cost(stored) for choices in picked for choice in choices)


def _lowest(fits: Callable[[float], bool]) -> float:
    """The lowest price that fits, by bisection: higher prices buy less loss."""
    low, high = CHEAPEST, DEAREST
    for _ in range(BISECTIONS):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
