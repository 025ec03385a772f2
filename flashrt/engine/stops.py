"""Texts before which an answer ends."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Holds back text that may turn out to be the beginning of a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [s for s in stops if s]
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Text that is now certain to belong to the answer."""
        if not self._stops:
            return text
        self._held += text
        hits = [i for s in self._stops if (i := self._held.find(s)) >= 0]
        if hits:
            self.found = True
            answer, self._held = self._held[: min(hits)], ""
            return answer
        keep = max(overlap(self._held, s) for s in self._stops)
        cut = len(self._held) - keep
        answer, self._held = self._held[:cut], self._held[cut:]
        return answer

    def flush(self, text: str) -> str:
        """What is left at the end."""
        if self.found:
            return ""
        answer = self.push(text) + self._held
        self._held = ""
        return answer


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, and not all of it."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0
