"""What a pass computes: rows of any sequences, each with its token and its position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flashrt.kv.cache import KvCache

Array = np.ndarray


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows that one sequence has in a pass.

    They follow one another behind the sequence, after `ahead` drafted tokens. With `parents` they are a tree: row i
    follows row parents[i] < i, or with -1 the sequence.
    """

    kv: KvCache
    tokens: Sequence[int]
    parents: Sequence[int] | None = None
    ahead: int = 0

    @property
    def start(self) -> int:
        """Position of the first row."""
        return self.kv.length + self.ahead

    def positions(self) -> Array:
        """Of each row, int64 [T]."""
        return self.start + (np.arange(len(self.tokens)) if self.parents is None else depths(self.parents))


class Batch:
    """The rows of `parts`, one part after the other.

    A *narrow* pass takes 1 to 16 rows, and reads each weight once; a *wide* one serves prefill. `draft` asks a narrow
    one to use only what is in memory.
    """

    def __init__(self, parts: Sequence[Rows], wide: bool = False, draft: bool = False) -> None:
        """Raises ValueError where a sequence has no room for its rows."""
        for part in parts:
            if part.start + len(part.tokens) > part.kv.capacity:
                raise ValueError(
                    f"{part.start} + {len(part.tokens)} tokens do not fit in a KV cache of {part.kv.capacity}"
                )
        self.wide, self.draft = wide, draft
        self.tokens = [token for part in parts for token in part.tokens]
        self.positions: Array = np.concatenate([part.positions() for part in parts])
        ends = np.cumsum([len(part.tokens) for part in parts]).tolist()
        self.parts = [(slice(end - len(part.tokens), end), part) for part, end in zip(parts, ends, strict=True)]

    def __len__(self) -> int:
        return len(self.tokens)


def depths(parents: Sequence[int]) -> Array:
    """How many rows of its tree each row follows, int64 [T]; parents as in `Rows`."""
    result = np.zeros(len(parents), np.int64)
    for i, parent in enumerate(parents):
        if parent >= 0:
            result[i] = result[parent] + 1
    return result
