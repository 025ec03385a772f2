"""The loss that a model may take, divided among its blocks: each gives up what costs the least for the bytes it saves.

A greedy allocation in Lagrange's form: under one price of loss in bytes, every block makes its own cheapest choice, and
the price is what makes the sum of losses fit (Everett, Operations Research 11(3), 1963).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flashrt.predict.channels import STORED, ChannelFit, Choice, cheapest
from flashrt.sparsity import ChannelSparsity

CHEAPEST, DEAREST = 1e-3, 1e15  # bytes that a loss of one nat may be worth
BISECTIONS = 60


@dataclass(frozen=True, slots=True)
class Picked:
    """The choices of one block."""

    channels: Choice
    neurons: Choice

    @property
    def cost(self) -> float:
        return sum(choice.nbytes + STORED * choice.stored for choice in (self.channels, self.neurons))

    @property
    def sparsity(self) -> ChannelSparsity:
        return ChannelSparsity(self.channels.fine, *self.channels.thresholds, *self.neurons.thresholds)


@dataclass(frozen=True, slots=True)
class Weight:
    """Nats that an error of one costs, in one block: by channels left out, and by neurons."""

    channels: float
    neurons: float

    def loss(self, picked: Picked) -> float:
        return self.channels * picked.channels.error + self.neurons * picked.neurons.error


def pick(fit: ChannelFit, weight: Weight, price: float) -> Picked:
    """The choices of one block when a nat costs `price` bytes."""
    channels = cheapest(fit.channels, price * weight.channels)
    return Picked(channels, cheapest(fit.neurons, price * weight.neurons))


def allocate(fits: Sequence[ChannelFit], weights: Sequence[Weight], loss: float) -> list[Picked]:
    """The cheapest choices whose predicted loss, in nats, is at most `loss`."""

    def at(price: float) -> list[Picked]:
        return [pick(fit, weight, price) for fit, weight in zip(fits, weights, strict=True)]

    def predicted(picked: Sequence[Picked]) -> float:
        return sum(weight.loss(choice) for weight, choice in zip(weights, picked, strict=True))

    return at(_lowest(lambda price: predicted(at(price)) <= loss))


def _lowest(fits: Callable[[float], bool]) -> float:
    """The lowest price that fits, by bisection: higher prices buy less loss."""
    low, high = CHEAPEST, DEAREST
    for _ in range(BISECTIONS):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
