"""What a pass computes: rows of any sequences, each with its token and its position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flashrt.kv.cache import KvCache
from flashrt.model.workspace import Wide, leading

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

    *Narrow* rows give a token the same bits whoever shares its pass; *wide* ones serve prefill. `wide` says of all rows
    which they are, or how many of the leading ones are wide: whole parts. `draft` asks a narrow pass to use only what
    is in memory.
    """

    def __init__(self, parts: Sequence[Rows], wide: Wide = False, draft: bool = False) -> None:
        """Raises ValueError where a sequence has no room for its rows, and where a part is wide only in part."""
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
        self.wide_rows = leading(wide, len(self.tokens))
        if self.wide_rows not in (0, *ends):
            raise ValueError(f"{self.wide_rows} wide rows end within a part: parts end at {ends}")

    @property
    def mixed(self) -> bool:
        """Whether rows of both kinds share the pass."""
        return 0 < self.wide_rows < len(self.tokens)

    def __len__(self) -> int:
        return len(self.tokens)


def depths(parents: Sequence[int]) -> Array:
    """How many rows of its tree each row follows, int64 [T]; parents as in `Rows`."""
    result = np.zeros(len(parents), np.int64)
    for i, parent in enumerate(parents):
        if parent >= 0:
            result[i] = result[parent] + 1
    return result
