"""What a read costs by its size, from measured rates: the rule by which neighbouring rows are read together."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Mapping

from flashrt.storage.layout import PAGE


class CostCurve:
    """Seconds that one read of n bytes takes of a disk that is kept busy.

    `rates` maps the size of a read to bytes per second: at least one point. Between points, and beyond them, costs are
    interpolated on logarithmic scales. Noise is taken out such that a larger read never costs less, as one may read
    more than one needs, and never costs more per byte, as one may read in smaller pieces: so reading two adjacent
    ranges at once never costs more than one by one.
    """

    def __init__(self, rates: Mapping[int, float]) -> None:
        sizes = sorted(rates)
        best = itertools.accumulate((rates[size] for size in sizes), max)
        costs = [size / rate for size, rate in zip(sizes, best, strict=True)]
        costs = list(itertools.accumulate(reversed(costs), min))[::-1]
        self._sizes = [math.log(size) for size in sizes]
        self._costs = [math.log(cost) for cost in costs]

    def seconds(self, nbytes: int) -> float:
        """Cost of reading `nbytes` > 0 bytes."""
        x, sizes, costs = math.log(nbytes), self._sizes, self._costs
        i = bisect.bisect_right(sizes, x)
        if i == 0:
            return math.exp(costs[0])  # a read smaller than any that was measured saves nothing
        if i == len(sizes):
            return math.exp(costs[-1] + x - sizes[-1])
        share = (x - sizes[i - 1]) / (sizes[i] - sizes[i - 1])
        return math.exp(costs[i - 1] + share * (costs[i] - costs[i - 1]))

    def table(self, pages: int) -> list[float]:
        """Costs of reads of 1 to `pages` pages."""
        return [self.seconds(PAGE * n) for n in range(1, pages + 1)]
