"""Seconds that passes and draft steps take, as measured in this run, recent ones weighing more."""

from __future__ import annotations

DECAY = 0.95  # of what was measured, per measurement
PRIOR = 0.1  # how firmly more positions are thought to cost nothing: as one measurement of 1 + sqrt(PRIOR) positions


class PassCost:
    """Seconds of a pass by its number of positions: a line through what was measured, weighted least squares.

    Passes differ little where bytes have to come from disk or memory, and grow with the positions where arithmetic is
    the bound. Since the past fades, the line is the one near the numbers in use. It is not thought to rise until that
    was seen; where it was seen long ago, that fades too, and more positions are tried again.
    """

    def __init__(self) -> None:
        self._weight = self._x = self._xx = self._y = self._xy = 0.0  # sums; x: positions beyond one, y: seconds

    def record(self, positions: int, seconds: float) -> None:
        x = positions - 1
        sums = (self._weight, self._x, self._xx, self._y, self._xy)
        new = (1.0, x, x * x, seconds, x * seconds)
        self._weight, self._x, self._xx, self._y, self._xy = (
            DECAY * old + more for old, more in zip(sums, new, strict=True)
        )

    @property
    def measured(self) -> bool:
        return self._weight > 0

    def seconds(self, limit: int) -> list[float]:
        """Of passes over 1 to `limit` positions; some pass must have been measured."""
        mean_x, mean_y = self._x / self._weight, self._y / self._weight
        spread = self._xx - self._x * mean_x
        slope = max((self._xy - self._x * mean_y) / (spread + PRIOR), 0.0)
        first = max(mean_y - slope * mean_x, 0.0)
        return [first + slope * x for x in range(limit)]


class StepCosts:
    """Seconds of a draft step by drafter."""

    def __init__(self) -> None:
        self._means: dict[str, float] = {}

    def record(self, drafter: str, seconds: float) -> None:
        mean = self._means.get(drafter, seconds)
        self._means[drafter] = DECAY * mean + (1 - DECAY) * seconds

    def seconds(self, drafter: str) -> float:
        """0 for one that was never measured: it is tried."""
        return self._means.get(drafter, 0.0)
