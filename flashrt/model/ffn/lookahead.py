"""A guess at the input of a feed-forward block, made before the attention of its layer has run."""

from __future__ import annotations

import time
from collections import deque
from statistics import median

import numpy as np

Array = np.ndarray

RATE = 1 / 8  # weight of the last token in a running mean
ROUND = 32  # tokens after which it is tried again whether guessing pays
TRIED = 4  # of these, with and without guessing in turns
KEPT = 16  # times that are remembered of either way: one read that takes long must not decide


class Lookahead:
    """Guesses for one block, one token after the other: `begin`, then `guess` where that says so, and `end`.

    Attention moves the input of most tokens in much the same direction: what it has moved it by lately, on average, is
    added to what the input would be without it. Deja Vu (section 4.3) takes an earlier input as it is.

    Reads that are under way during attention save as much as attention takes, at most, and cost a prediction and, on a
    machine with few cores, part of a core. So the clock decides: both ways are tried again and again.
    """

    def __init__(self, hidden: int) -> None:
        self._before, self._moved, self._guess = (np.zeros((1, hidden), np.float32) for _ in range(3))
        self._seconds: tuple[deque[float], deque[float]] = (deque(maxlen=KEPT), deque(maxlen=KEPT))  # without, with
        self._token, self._guessing, self._began = 0, False, 0.0

    def begin(self) -> bool:
        """Whether to guess for the token whose attention comes next."""
        place = self._token % ROUND
        if place < TRIED:
            self._guessing = place % 2 == 1
        elif place == TRIED:
            without, guessing = map(median, self._seconds)
            self._guessing = guessing < without
        self._token += 1
        self._began = time.perf_counter()
        return self._guessing

    def guess(self, before: Array) -> Array:
        """The input to expect where it would be `before` (float32 [1, hidden], normed) without attention.

        Valid until the next call.
        """
        self._before[:] = before
        return np.add(before, self._moved, out=self._guess)

    def end(self, x: Array) -> None:
        """The block has been computed; its input was `x`."""
        self._seconds[self._guessing].append(time.perf_counter() - self._began)
        if self._guessing:
            self.learn(x)

    def learn(self, x: Array) -> None:
        """Take note of what the input was that `guess` was to find."""
        self._moved += RATE * (x - self._before - self._moved)
