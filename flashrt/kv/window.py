"""Keys and values of a layer that sees a window: the last positions only, which slide down when memory is full.

A ring whose positions wrap would split what kernels see as one array. Moved down in one piece it stays one, and costs
little: slots move once in 256 positions or more. Attention sums in segments of positions. Since slots move by whole
segments, sums are those of a store that holds all positions, bit for bit.
"""

from __future__ import annotations

from flashrt.kv.base import KvLimits, Tensor
from flashrt.kv.contiguous import ContiguousStore
from flashrt.kv.reach import KEPT, LOST
from flashrt.spec import Attention
from flashrt_kernels.limits import ATTENTION_SEGMENT


class WindowStore(ContiguousStore):
    """A `ContiguousStore` of the window, of what is `KEPT` before it, and of the rows of a pass."""

    @classmethod
    def slots(cls, attention: Attention, limits: KvLimits) -> int:
        if attention.window is None:
            return limits.context
        return min(attention.window - 1 + KEPT + ATTENTION_SEGMENT - 1 + limits.rows, limits.context)

    @classmethod
    def claim(cls, attention: Attention, limits: KvLimits) -> int | None:
        return None if attention.window is None else super().claim(attention, limits)

    def append(self, key: Tensor, value: Tensor | None, start: int) -> None:
        if start - self.first + len(key) > self.memory.shape[1]:
            self._slide(start)
        super().append(key, value, start)

    def restart(self, first: int = 0) -> None:
        self.first = first

    def truncate(self, length: int, top: int) -> int:
        return 0 if self.first == LOST else super().truncate(length, top)

    def _needed(self, position: int) -> int:
        """The first position that a token at `position` sees."""
        assert self._attention.window is not None
        return position - self._attention.window + 1

    def _slide(self, start: int) -> None:
        """Make room for rows from `start` on; what the tokens before them and the window needs stays."""
        first = (self._needed(start) - KEPT) // ATTENTION_SEGMENT * ATTENTION_SEGMENT
        moved, self.first = first - self.first, LOST
        slide_down(self.memory, moved)
        self.first = first


def slide_down(memory: Tensor, moved: int) -> None:
    """Move what lies in `memory` [kv_heads, slots, *pair] down by `moved` slots."""
    for head in memory:
        for begin in range(moved, len(head), moved):  # in pieces that do not overlap
            piece = head[begin : begin + moved]
            head[begin - moved : begin - moved + len(piece)] = piece
