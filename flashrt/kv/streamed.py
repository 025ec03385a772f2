"""Keys and values that do not fit in memory: the last positions in one array, older ones in pages on disk.

What is in memory slides by whole segments, as in a `WindowStore`, but the segments that leave become pages. Attention
passes over the pages in order, from a running softmax on, and ends with what is in memory: sums are those of a store
that holds all positions, bit for bit.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from flashrt.kv.base import Allocate, Kernels, KvLimits, KvRows, Tensor
from flashrt.kv.contiguous import ContiguousStore
from flashrt.kv.far import LayerPages
from flashrt.kv.reach import LOST
from flashrt.kv.window import slide_down
from flashrt.spec import Attention
from flashrt_kernels.limits import ATTENTION_SEGMENT as SEGMENT
from flashrt_kernels.limits import NARROW_TOKENS

NEAR = 2 * SEGMENT  # positions in memory beside the rows of a pass: drafts see no others


class StreamedStore(ContiguousStore):
    """A `ContiguousStore` of the last positions, before which pages hold all others."""

    whole = True
    behind: ClassVar[int] = 0  # positions before the end of a sequence that have to be in memory to go on from it

    @classmethod
    def slots(cls, attention: Attention, limits: KvLimits) -> int:
        return min(NEAR + limits.rows, limits.context)

    @classmethod
    def claim(cls, attention: Attention, limits: KvLimits) -> int | None:
        if limits.held is None or limits.choice is not None or attention.window is not None:
            return None
        return limits.nbytes(attention, cls.slots(attention, limits) + limits.held * SEGMENT)

    @classmethod
    def scratch_bytes(cls, attention: Attention, limits: KvLimits, ops: Any) -> int:
        heads, kv_heads, dim = attention.heads, attention.kv_heads, attention.head_dim
        counts = range(1, limits.rows + 1)  # a few rows may take more than many, which are cut into tiles
        most = max(ops.attention_scratch_bytes(count, heads, kv_heads, dim) for count in counts)
        return 4 * limits.rows * heads * int(ops.attention_state_width(attention.value_width)) + int(most)

    @classmethod
    def far_pages(cls, attention: Attention, limits: KvLimits) -> int:
        return _pages_before(limits.context + NARROW_TOKENS, cls.slots(attention, limits))

    def __init__(self, attention: Attention, limits: KvLimits, kernels: Kernels, allocate: Allocate) -> None:
        super().__init__(attention, limits, kernels, allocate)
        assert limits.held is not None, "without pages, positions are not let go of"
        assert kernels.pages is not None, "a page needs a place to go to"
        held = allocate((limits.held, attention.kv_heads, SEGMENT, *self.memory.shape[2:]), limits.codec.dtype)
        self._pages: LayerPages = kernels.pages(held)

    def far(self, start: int, rows: int) -> int:
        return max(self.first // SEGMENT, _pages_before(start + max(rows, NARROW_TOKENS), self.memory.shape[1]))

    def append(self, key: Tensor, value: Tensor | None, start: int) -> None:
        self._make_room(start, len(key))
        super().append(key, value, start)

    def attend(self, query: Tensor, rows: KvRows, heads: slice, out: Tensor, sinks: Tensor | None = None) -> None:
        if self.first == 0 or rows.draft:
            super().attend(query, rows, heads, out, sinks)
            return
        ops, scale, softcap = self._kernels.ops, self._attention.scale, self._attention.softcap or None
        tokens, count, _ = query.shape
        shape = tokens, count, ops.attention_state_width(self._attention.value_width)
        end = 4 * int(np.prod(shape))
        state, scratch = self._kernels.scratch[:end].view(np.float32).reshape(shape), self._kernels.scratch[end:]
        for segment in range(self.first // SEGMENT):
            page = self._pages.take(segment)
            ops.attend_page(query, page[heads], scale, softcap, state, segment == 0, scratch, sinks, rows.wide)
        self._pages.release()
        options = (rows.start - self.first, None, scale, softcap)
        others = {"state": state, "wide": rows.wide}
        ops.attention(query, self.memory[heads], *options, out, scratch, rows.parents, **others)

    def restart(self, first: int = 0) -> None:
        super().restart(first)
        self._pages.restart()

    def read_page(self, begin: int, heads: slice, out: Tensor) -> None:
        if begin < self.first:
            out[...] = self._pages.fetch(begin // SEGMENT)[heads, : out.shape[1]]
        else:
            super().read_page(begin, heads, out)

    def write_page(self, begin: int, heads: slice, page: Tensor) -> None:
        self._make_room(begin, page.shape[1])
        super().write_page(begin, heads, page)

    def truncate(self, length: int, top: int) -> int:
        return 0 if self.first == LOST or self._pages.failed else super().truncate(length, top)

    def cut(self, length: int) -> None:
        before, first = self.first, max(length - self.behind, 0) // SEGMENT * SEGMENT
        if first >= before:
            return
        self.first = LOST
        if length > before:
            self.memory[:, before - first : length - first] = self.memory[:, : length - before]
        for begin in range(first, min(length, before), SEGMENT):
            self.memory[:, begin - first : begin - first + SEGMENT] = self._pages.fetch(begin // SEGMENT)
        self._pages.forget(first // SEGMENT)
        self.first = first

    def close(self) -> None:
        self._pages.close()

    def _make_room(self, start: int, rows: int) -> None:
        """Let the oldest segments become pages where rows from `start` on need it: all that they hold is committed."""
        far, before = self.far(start, rows), self.first // SEGMENT
        if far == before:
            return
        self.first = LOST
        for segment in range(before, far):
            begin = (segment - before) * SEGMENT
            self._pages.put(segment, self.memory[:, begin : begin + SEGMENT])
        slide_down(self.memory, (far - before) * SEGMENT)
        self.first = far * SEGMENT


def _pages_before(end: int, slots: int) -> int:
    """Whole segments that have left `slots` slots by the time that positions up to `end` are in them."""
    return max(-(-(end - slots) // SEGMENT), 0)
