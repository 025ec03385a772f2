"""Seconds that passes and draft steps take, as measured of late: medians, which one disturbed time cannot move."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable

RECENT = 5  # measurements of a kind that count
ENOUGH = 3  # measurements of which one that was disturbed does not move the median
MEMORY = 150  # passes after which what was not tried, more positions or a drafter, is tried again
FLAT = 1  # how firmly more positions are thought to cost nothing: as what one pair of measurements tells
GROWTH = 2  # times as many positions as are remembered are tried at most


class PassCost:
    """Seconds of a pass by its number of positions: a line through medians (Theil 1950, Sen 1968).

    Passes differ little where bytes have to come from disk or memory, and grow with the positions where arithmetic is
    the bound. The slope is the weighted median of the slopes between any two numbers of positions, each of which stands
    for the median of its last times. The level follows the last few passes, whatever their numbers: a machine that gets
    slower for a while is no reason to draft less.
    """

    def __init__(self) -> None:
        self._times: dict[int, deque[float]] = {}  # by positions
        self._last: deque[tuple[int, float]] = deque(maxlen=RECENT)
        self._single = 0  # passes over one position since one over more

    def record(self, positions: int, seconds: float) -> None:
        """A pass over `positions` took `seconds`."""
        self._single = self._single + 1 if positions == 1 else 0
        if self._single == MEMORY:
            self._times = {1: self._times[1]}
        self._times.setdefault(positions, deque(maxlen=RECENT)).append(seconds)
        self._last.append((positions, seconds))

    @property
    def measured(self) -> bool:
        return bool(self._last)

    def seconds(self, limit: int) -> list[float]:
        """Of passes over 1 to `limit` positions, or fewer where none near is remembered; some must have been measured.

        They are not thought to rise until that was seen.
        """
        slope = self._slope()
        first = statistics.median(max(seconds - slope * (positions - 1), 0.0) for positions, seconds in self._last)
        return [first + slope * x for x in range(min(limit, GROWTH * max(self._times)))]

    def _slope(self) -> float:
        points = [(n, statistics.median(times), len(times)) for n, times in self._times.items()]
        slopes: list[tuple[float, int]] = [(0.0, FLAT)]
        for i, (x, y, weight) in enumerate(points):
            for other_x, other_y, other in points[:i]:
                slopes.append(((y - other_y) / (x - other_x), min(weight, other)))
        return max(_weighted_median(slopes), 0.0)


class StepCosts:
    """Seconds of a draft step by drafter: medians of the last ones, the least of them while they are few.

    One disturbed step must not keep a drafter out for good: what a drafter took is forgotten once it was not asked for
    MEMORY passes.
    """

    def __init__(self) -> None:
        self._times: dict[str, deque[float]] = {}
        self._unasked: dict[str, int] = {}  # passes in a row

    def record(self, drafter: str, seconds: float) -> None:
        """A step took `seconds`."""
        self._times.setdefault(drafter, deque(maxlen=RECENT)).append(seconds)
        self._unasked[drafter] = 0

    def pass_by(self, drafter: str) -> None:
        """For a whole pass no step of it seemed to pay."""
        self._unasked[drafter] = self._unasked.get(drafter, 0) + 1
        if self._unasked[drafter] == MEMORY:
            self._times.pop(drafter, None)

    def seconds(self, drafter: str) -> float:
        """0 for one of which nothing is remembered: it is tried."""
        times = self._times.get(drafter)
        if not times:
            return 0.0
        return statistics.median(times) if len(times) >= ENOUGH else min(times)


def _weighted_median(pairs: Iterable[tuple[float, int]]) -> float:
    """The smallest value up to which half of the weight lies, of (value, weight)."""
    ordered = sorted(pairs)
    half, total = sum(weight for _, weight in ordered) / 2, 0
    for value, weight in ordered:
        total += weight
        if total >= half:
            return value
    return ordered[-1][0]
