"""Whether to draft at all, by what it has really brought: tokens per second with drafts, against those without.

The control (`control`) weighs chances and costs, each estimated for itself. This looks at the outcome alone, so that no
error of an estimate, nor what none of them knows of, can make drafting slower than no drafting for long.
"""

from __future__ import annotations

import statistics
from collections import deque

TRIAL = 6  # passes with drafts after which they are judged
CLEAR = 1.5  # times as slow as without that half a trial is enough to tell
MARGIN = 1.05  # times as slow that drafts may seem before they rest: noise
REST = (16, 32, 64)  # passes without drafts, after so many trials in a row that they lost
RECENT = 12  # passes with drafts that count
FRESH = (12, 64)  # passes with drafts after which some without are measured again, sooner at first
CHECK = 3  # passes without drafts that are measured then, and count: one of them may be disturbed
OUTLIER = 3.0  # times the median that a pass counts as at most


class Switch:
    """Says before each pass whether to draft; is told afterwards what the pass brought."""

    def __init__(self) -> None:
        self._with: deque[tuple[int, float]] = deque(maxlen=RECENT)  # (tokens, seconds)
        self._without: deque[float] = deque(maxlen=CHECK)  # seconds
        self._rest = 0  # passes without drafts that are to come
        self._losses = 0  # trials in a row that drafts lost
        self._age = 0  # passes with drafts since passes without were due
        self._checks = 0  # times that they were measured again while drafts went on

    def drafts(self) -> bool:
        """Whether the next pass may have a draft."""
        return self._rest == 0

    def record(self, drafted: bool, tokens: int, seconds: float) -> None:
        """A pass gave `tokens` in `seconds`, drafting included."""
        if drafted:
            self._with.append((tokens, seconds))
            self._age += 1
            self._check()
            self._judge()
        else:
            self._without.append(seconds)
            self._rest = max(self._rest - 1, 0)

    def _check(self) -> None:
        """Passes without drafts are measured again when the last ones are old: the machine may have changed."""
        if self._age >= FRESH[min(self._checks, len(FRESH) - 1)]:
            self._rest, self._age = CHECK, 0
            self._checks += 1

    def _judge(self) -> None:
        """Drafts that are slower rest, for longer each time; what they brought is forgotten, and tried afresh then."""
        if not self._without or len(self._with) < TRIAL // 2:
            return
        slower = self._seconds_per_token() / statistics.median_low(self._without)
        if slower > (MARGIN if len(self._with) >= TRIAL else CLEAR):
            self._rest, self._age = REST[min(self._losses, len(REST) - 1)], 0
            self._losses += 1
            self._with.clear()
        elif len(self._with) == RECENT:
            self._losses = 0

    def _seconds_per_token(self) -> float:
        most = OUTLIER * statistics.median(seconds for _, seconds in self._with)
        return sum(min(seconds, most) for _, seconds in self._with) / sum(tokens for tokens, _ in self._with)
