"""How far a drafter's confidence can be trusted: estimates from how its candidates have fared so far.

Confidence tells candidates of one kind apart, but may be off for all of them: a draft gets worse with depth, and what a
draft model thinks likely is not what the target takes. So candidates are counted by kind, and confidence is multiplied
by how many came true for each one that confidence promised. Counts fade with every pass, whether or not it tells
anything new: what was not tried for long is thought of as at the beginning, and so is tried again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

DECAY = 0.98  # of the counts, per pass
PRIOR = 1.0  # candidates that came true as promised, before any was seen
CERTAIN = 0.99  # nothing is thought likelier
BINS = 5  # of confidence
LAST_RANK = 2  # further choices are counted with this one


class Promise(NamedTuple):
    """What a drafter said of one token."""

    drafter: str
    rank: int  # among the drafter's candidates for the same place, from 0
    depth: int  # behind the root, from 1
    confidence: float

    @property
    def kind(self) -> tuple[str, int, int, int]:
        """Promises that are counted together: depths 1, 2 to 3, 4 to 7, 8 to 15 and so on."""
        return self.drafter, min(self.rank, LAST_RANK), self.depth.bit_length(), int(self.confidence * BINS)


@dataclass(slots=True)
class _Count:
    right: float = 0.0
    promised: float = 0.0  # the sum of the confidences
    asof: int = 0  # the pass up to which it has faded


class Accuracy:
    """Counts of promises of one or several drafters, in memory that grows with the kinds of promises only."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, int, int, int], _Count] = {}
        self._passes = 0

    def estimate(self, promise: Promise) -> float:
        """The probability that the promised token is right, if those before it are."""
        count = self._current(promise)
        return min(promise.confidence * (count.right + PRIOR) / (count.promised + PRIOR), CERTAIN)

    def record(self, promise: Promise, right: bool) -> None:
        """The tokens before the promised one were right; `right` says whether it was too."""
        count = self._current(promise)
        count.right += right
        count.promised += promise.confidence

    def end_pass(self) -> None:
        """Let the past fade."""
        self._passes += 1

    def _current(self, promise: Promise) -> _Count:
        count = self._counts.setdefault(promise.kind, _Count())
        fade = DECAY ** (self._passes - count.asof)
        count.right, count.promised, count.asof = count.right * fade, count.promised * fade, self._passes
        return count
