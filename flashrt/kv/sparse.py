"""Keys and values of all positions, of which rows of narrow passes attend to those that labels choose.

Wide passes attend to everything.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np

from flashrt.kv.base import Allocate, Kernels, KvLimits, KvRows
from flashrt.kv.contiguous import ContiguousStore
from flashrt.kv.index import LabelIndex
from flashrt.kv.lists import Chooser, Chosen, Lists
from flashrt.kv.numbers import keys_of
from flashrt.spec import Attention
from flashrt_kernels.limits import NARROW_TOKENS

Array = np.ndarray


class ChoosingStore(ContiguousStore):
    """A store with labels of its keys, for kinds to inherit beside one that says where older positions are."""

    chooses = True

    @classmethod
    def beside(cls, attention: Attention, limits: KvLimits) -> int:
        return LabelIndex.nbytes(attention, limits)

    @classmethod
    def scratch_bytes(cls, attention: Attention, limits: KvLimits, ops: Any) -> int:
        return max(super().scratch_bytes(attention, limits, ops), Chooser.scratch_bytes(attention, limits, ops))

    def __init__(self, attention: Attention, limits: KvLimits, kernels: Kernels, allocate: Allocate) -> None:
        super().__init__(attention, limits, kernels, allocate)
        self._chooser = Chooser(attention, limits, kernels.ops, allocate)

    def append(self, key: Array, value: Array | None, start: int) -> None:
        self._label(start)
        super().append(key, value, start)

    def restart(self, first: int = 0) -> None:
        super().restart(first)
        self._chooser.index.restart()

    def attend(self, query: Array, rows: KvRows, heads: slice, out: Array, sinks: Array | None = None) -> None:
        if rows.wide or self.attends_to_all(rows):
            super().attend(query, rows, heads, out, sinks)
            return
        for begin in range(0, len(query), NARROW_TOKENS):  # a text may be scored in longer passes
            own, part = slice(begin, begin + NARROW_TOKENS), rows._replace(start=rows.start + begin)
            if begin > 0:
                self._label(part.start)
            self._attend_few(query[own], part, heads, out[own], sinks)

    def attends_to_all(self, rows: KvRows) -> bool:
        """Whether these narrow rows choose nothing."""
        return False

    def _attend_few(self, query: Array, rows: KvRows, heads: slice, out: Array, sinks: Array | None) -> None:
        if self.first == 0 and not self._chooser.leaves_out(rows, len(query), heads):
            ContiguousStore.attend(self, query, rows, heads, out, sinks)  # all are in memory
            return
        chosen = self._chooser.choose(query, rows, heads, self._kernels.scratch)
        self._attend_to(query, chosen, rows.start, heads, out, sinks)

    @abstractmethod
    def _attend_to(
        self, query: Array, chosen: Chosen, start: int, heads: slice, out: Array, sinks: Array | None
    ) -> None:
        """Attention of rows, whose pass starts at `start`, to what they chose, into `out`."""

    def _attend_list(
        self, query: Array, far: Array | None, lists: Lists, heads: slice, out: Array, sinks: Array | None
    ) -> None:
        """Attention over lists of what is in memory, and in `far` (see `Ops.attention_list`)."""
        scale, softcap = self._attention.scale, self._attention.softcap or None
        near, (places, counts, rest) = self.memory[heads], lists
        self._kernels.ops.attention_list(query, near, far, places, counts, scale, softcap, out, rest, sinks)

    def _label(self, start: int) -> None:
        """Label what rows from position `start` on may choose."""
        self._chooser.index.begin(start, self._keys)

    def _keys(self, begin: int, end: int) -> Array:
        """float32 [kv_heads, positions, head_dim]"""
        pairs = self.memory[:, begin - self.first : end - self.first]
        return keys_of(self._kernels.ops, pairs, self._attention.head_dim)


class SparseStore(ChoosingStore):
    """A `ContiguousStore` with labels of its keys."""

    @classmethod
    def claim(cls, attention: Attention, limits: KvLimits) -> int | None:
        return None if limits.choice is None else super().claim(attention, limits)

    def _attend_to(
        self, query: Array, chosen: Chosen, start: int, heads: slice, out: Array, sinks: Array | None
    ) -> None:
        self._attend_list(query, None, self._chooser.lists(chosen, start, 0, self._places), heads, out, sinks)

    def _places(self, which: int, blocks: Array) -> tuple[Array, int]:
        return blocks * np.int32(self._chooser.block), 0
