"""Whether a guess of what the next layer will choose saves more waiting than it costs: by what both have been.

A guess costs the computation of a choice. Where a disk is quick, or a cache large, that takes longer than the wait that
it saves.
"""

from __future__ import annotations

MEMORY = 1 / 64  # weight of what was measured last in an average
PROBE = 32  # one token of so many is computed in the other way, to learn what that costs


class Guesses:
    """Learns from `layers` layers that take turns."""

    def __init__(self, layers: int) -> None:
        self._layers, self._turn = layers, 0
        self._guessed, self._cost = False, 0.0
        self._wait_per_cell: float | None = None  # seconds that a cell took which nobody had guessed
        self._gain: float | None = None  # seconds that a guess saved

    @property
    def pay(self) -> bool:
        """Whether guesses are made, but for tokens that try the other way."""
        return self._gain is None or self._gain > 0

    def wanted(self) -> bool:
        """Whether to guess for the layer whose turn is next."""
        return self.pay != (self._turn // self._layers % PROBE == 0)

    def made(self, seconds: float) -> None:
        """A guess was made for that layer, and took so long."""
        self._guessed, self._cost = True, seconds

    def fetched(self, misses: int, useful: int, wait_s: float) -> None:
        """The layer has had its turn: `useful` cells had been read for a guess, `misses` had to be read then."""
        self._turn += 1
        guessed, self._guessed = self._guessed, False
        if not guessed:
            if misses:
                self._wait_per_cell = _averaged(self._wait_per_cell, wait_s / misses)
        elif self._wait_per_cell is not None:
            saved = self._wait_per_cell * (misses + useful) - wait_s
            self._gain = _averaged(self._gain, saved - self._cost)


def _averaged(before: float | None, value: float) -> float:
    return value if before is None else before + MEMORY * (value - before)
