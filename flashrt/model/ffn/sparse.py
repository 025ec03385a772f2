"""What the ways to thin out feed-forward blocks have in common: counting what took part, and comparing with all."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

Layer = TypeVar("Layer")

# Tokens at the start of a sequence that leave nothing out: all later tokens attend to them, and activations a thousand
# times larger than any other token's, which must come out right, arise in them (Xiao et al., arXiv:2309.17453).
SINKS = 4


@dataclass(slots=True)
class Selection:
    """Of one block, neurons that should have taken part, that did, and that are both."""

    wanted: int = 0
    taken: int = 0
    both: int = 0

    @property
    def recall(self) -> float:
        return self.both / max(self.wanted, 1)

    @property
    def precision(self) -> float:
        return self.both / max(self.taken, 1)


class SparseFfn(ABC, Generic[Layer]):
    """The feed-forward blocks of a calibrated pack.

    While `comparing`, narrow passes also compute what everything would have given.
    """

    layers: Sequence[Layer]
    tallies: Sequence[Any]
    _selections: Sequence[Selection] | None = None

    @contextlib.contextmanager
    def comparing(self) -> Iterator[Sequence[Selection]]:
        """Meanwhile, compare what takes part with what should, layer by layer; nothing else is counted."""
        tallies = self.tallies
        self.restart()
        self._selections = [Selection() for _ in self.layers]
        try:
            yield self._selections
        finally:
            self._selections, self.tallies = None, tallies

    @abstractmethod
    def restart(self, layers: Sequence[Layer] | None = None) -> None:
        """Count from nothing, with other thresholds where they are given."""

    @abstractmethod
    def shares(self, i: int) -> dict[str, float]:
        """Shares of block `i` that took part per token in narrow passes, among them 'rows' and 'bytes'."""

    @abstractmethod
    def decision_share(self) -> float:
        """Bytes that are read only to decide what takes part, over those of the blocks that were calibrated."""

    @property
    @abstractmethod
    def counted(self) -> int:
        """Tokens counted since the last restart."""

    def mean_shares(self) -> dict[str, float] | None:
        """`shares` averaged over the blocks; None before the first narrow pass."""
        if not self.counted:
            return None
        layers = [self.shares(i) for i in range(len(self.layers))]
        return {key: sum(layer[key] for layer in layers) / len(layers) for key in layers[0]}
