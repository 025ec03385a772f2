"""Keys and values of all positions, of which rows of narrow passes attend to those that labels choose.

Wide passes attend to everything.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from flashrt.kv.base import Allocate, Kernels, KvLimits, KvRows
from flashrt.kv.contiguous import ContiguousStore
from flashrt.kv.index import LabelIndex
from flashrt.kv.lists import Chooser
from flashrt.spec import Attention
from flashrt_kernels.limits import NARROW_TOKENS

Array = np.ndarray


class SparseStore(ContiguousStore):
    """A `ContiguousStore` with labels of its keys."""

    chooses = True

    @classmethod
    def claim(cls, attention: Attention, limits: KvLimits) -> int | None:
        return None if limits.choice is None else super().claim(attention, limits)

    @classmethod
    def beside(cls, attention: Attention, limits: KvLimits) -> int:
        return LabelIndex.nbytes(attention, limits)

    @classmethod
    def scratch_bytes(cls, attention: Attention, limits: KvLimits, ops: Any) -> int:
        return Chooser.scratch_bytes(attention, limits, ops)

    def __init__(self, attention: Attention, limits: KvLimits, kernels: Kernels, allocate: Allocate) -> None:
        super().__init__(attention, limits, kernels, allocate)
        self._chooser = Chooser(attention, limits, kernels.ops, allocate)

    def append(self, key: Array, value: Array, start: int) -> None:
        self._chooser.index.begin(start, self._keys)
        super().append(key, value, start)

    def restart(self, first: int = 0) -> None:
        super().restart(first)
        self._chooser.index.restart()

    def attend(self, query: Array, rows: KvRows, heads: slice, out: Array) -> None:
        if rows.wide:
            return super().attend(query, rows, heads, out)
        for begin in range(0, len(query), NARROW_TOKENS):  # a text may be scored in longer passes
            own, part = slice(begin, begin + NARROW_TOKENS), rows._replace(start=rows.start + begin)
            if begin > 0:
                self._chooser.index.begin(part.start, self._keys)
            self._attend_few(query[own], part, heads, out[own])

    def _attend_few(self, query: Array, rows: KvRows, heads: slice, out: Array) -> None:
        if not self._chooser.leaves_out(rows, len(query), heads):
            return super().attend(query, rows, heads, out)
        chosen = self._chooser.choose(query, rows, heads, self._kernels.scratch)
        lists = self._chooser.lists(chosen, rows.start, 0, self._places)
        scale = self._attention.scale
        self._kernels.ops.attention_list(
            query, self.memory[heads], None, lists.places, lists.counts, scale, None, out, lists.rest
        )

    def _places(self, which: int, blocks: Array) -> tuple[Array, int]:
        return blocks * np.int32(self._chooser.block), 0

    def _keys(self, begin: int, end: int) -> Array:
        """float32 [kv_heads, positions, head_dim]"""
        return keys_of(self.memory[:, begin - self.first : end - self.first])


def keys_of(pairs: Array) -> Array:
    """Keys of [kv_heads, positions, 2, head_dim], float32."""
    keys = pairs[:, :, 0]
    return keys if keys.dtype == np.float32 else (keys.astype(np.uint32) << 16).view(np.float32)
