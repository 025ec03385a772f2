"""Whether to draft at all, by what it has really brought: tokens per second with drafts, against those without.

The control (`control`) weighs chances and costs, each estimated for itself. This looks at the outcome alone, so that no
error of an estimate, nor what none of them knows of, can make drafting slower than no drafting for long.
"""

from __future__ import annotations

import statistics
from collections import deque

TRIAL = 6  # passes with drafts after which they are judged
RECENT = 12  # passes with drafts, and without, that count
REST = (8, 16, 32, 64)  # passes without drafts, after so many judgements in a row that they do not pay
FRESH = 64  # passes with drafts after which one without is measured again
OUTLIER = 3.0  # times the median that a pass counts as at most
MARGIN = 1.05  # by which drafts may seem slower before they rest: noise


class Switch:
    """Says before each pass whether to draft; is told afterwards what the pass brought."""

    def __init__(self) -> None:
        self._with: deque[tuple[int, float]] = deque(maxlen=RECENT)  # (tokens, seconds)
        self._without: deque[float] = deque(maxlen=RECENT)
        self._trial = TRIAL  # passes with drafts before they are judged
        self._rest = 0  # passes without drafts that are to come
        self._losses = 0  # judgements in a row that drafts do not pay
        self._age = 0  # passes with drafts since one without

    def drafts(self) -> bool:
        """Whether the next pass may have a draft."""
        return self._rest == 0 and self._age < FRESH

    def record(self, drafted: bool, tokens: int, seconds: float) -> None:
        """A pass gave `tokens` in `seconds`, drafting included."""
        if drafted:
            self._with.append((tokens, seconds))
            self._age += 1
            self._trial = max(self._trial - 1, 0)
            if self._trial == 0:
                self._judge()
        else:
            self._without.append(seconds)
            self._age = 0
            self._rest = max(self._rest - 1, 0)

    def _judge(self) -> None:
        """Drafts that are slower rest, for longer each time; what they brought is forgotten, and tried afresh then."""
        if not self._without or self._seconds_per_token() <= MARGIN * statistics.median(self._without):
            self._losses = 0
            return
        self._rest = REST[min(self._losses, len(REST) - 1)]
        self._losses += 1
        self._trial = TRIAL
        self._with.clear()

    def _seconds_per_token(self) -> float:
        most = OUTLIER * statistics.median(seconds for _, seconds in self._with)
        return sum(min(seconds, most) for _, seconds in self._with) / sum(tokens for tokens, _ in self._with)
