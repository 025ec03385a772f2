"""How likely the tokens of a text are, and which are likeliest in their places."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

Array = np.ndarray


class Scores(NamedTuple):
    """Natural logarithms of probabilities after each of T states."""

    values: Array  # float64 [T], of the token that follows
    tokens: Array  # int64 [T, top], the likeliest first
    tops: Array  # float64 [T, top], theirs


class Likeliest:
    """The `top` largest logits after each of `count` states, of strips of the vocabulary that come one by one."""

    def __init__(self, count: int, top: int) -> None:
        self.logits = np.full((count, top), -np.inf)
        self.tokens = np.zeros((count, top), np.int64)

    def take(self, strip: Array, first: int) -> None:
        """Logits of tokens from `first` on, float32 [count, rows]; as before when this returns.

        No array as large as the strip is made: one maximum after the other is taken out, and put back.
        """
        rows, taken = np.arange(len(strip)), []
        for _ in range(min(self.logits.shape[1], strip.shape[1])):
            columns = strip.argmax(axis=1)
            values = strip[rows, columns]
            if not (values > self.logits[:, -1]).any():
                break
            taken.append((columns, values.copy()))
            strip[rows, columns] = -np.inf
            self._insert(values, columns + first)
        for columns, values in taken:
            strip[rows, columns] = values

    def _insert(self, values: Array, tokens: Array) -> None:
        """One more for each row. Of those that are equal, the first that came stays first."""
        logits = np.concatenate([self.logits, values[:, None]], axis=1)
        order = np.argsort(-logits, axis=1, kind="stable")[:, :-1]
        self.logits = np.take_along_axis(logits, order, axis=1)
        self.tokens = np.take_along_axis(np.concatenate([self.tokens, tokens[:, None]], axis=1), order, axis=1)
