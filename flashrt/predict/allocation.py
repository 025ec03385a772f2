"""The loss that a model may take, divided among its blocks: each gives up what costs the least for the bytes it saves.

A greedy allocation in Lagrange's form: under one price of loss in bytes, every block makes its own cheapest choice, and
the price is what makes the sum of losses fit (Everett, Operations Research 11(3), 1963).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flashrt.predict.channels import ChannelFit, Choice, cheapest
from flashrt.sparsity import ChannelSparsity

CHEAPEST, DEAREST = 1e-3, 1e15  # bytes that a loss of one nat may be worth
BISECTIONS = 60


@dataclass(frozen=True, slots=True)
class Picked:
    """The choices of one block."""

    channels: Choice
    neurons: Choice

    @property
    def nbytes(self) -> float:
        return self.channels.nbytes + self.neurons.nbytes

    @property
    def error(self) -> float:
        return self.channels.error + self.neurons.error

    def sparsity(self, fine: int) -> ChannelSparsity:
        return ChannelSparsity(fine, *self.channels.thresholds, *self.neurons.thresholds)


def pick(fit: ChannelFit, price: float) -> Picked:
    """The choices of one block when an error of one costs `price` bytes."""
    return Picked(cheapest(fit.channels, price), cheapest(fit.neurons, price))


def allocate(fits: Sequence[ChannelFit], weights: Sequence[float], loss: float) -> list[Picked]:
    """The choices with the fewest bytes whose predicted loss is at most `loss`.

    weights: nats that an error of one in each block costs.
    """

    def at(price: float) -> list[Picked]:
        return [pick(fit, price * weight) for fit, weight in zip(fits, weights, strict=True)]

    def predicted(picked: Sequence[Picked]) -> float:
        return sum(weight * choice.error for weight, choice in zip(weights, picked, strict=True))

    return at(_lowest(lambda price: predicted(at(price)) <= loss))


def _lowest(fits: Callable[[float], bool]) -> float:
    """The lowest price that fits, by bisection: higher prices buy less loss."""
    low, high = CHEAPEST, DEAREST
    for _ in range(BISECTIONS):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
