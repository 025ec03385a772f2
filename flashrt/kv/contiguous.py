"""Keys and values of all positions, in one array."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from flashrt.kv.base import Allocate, Kernels, KvLimits, KvRows, KvStore, Tensor
from flashrt.kv.reach import reach
from flashrt.spec import Attention


class ContiguousStore(KvStore):
    """`memory` is [kv_heads, slots, *pair]: K and V of a token and head lie together, a slot for each position.

    `first` is the position of the first slot.
    """

    chooses: ClassVar[bool] = False  # whether few rows may attend to chosen positions only

    @classmethod
    def slots(cls, attention: Attention, limits: KvLimits) -> int:
        """Positions that are held at a time."""
        return limits.context

    @classmethod
    def claim(cls, attention: Attention, limits: KvLimits) -> int | None:
        if limits.choice is not None and not cls.chooses:
            return None
        return limits.nbytes(attention, cls.slots(attention, limits))

    def __init__(self, attention: Attention, limits: KvLimits, kernels: Kernels, allocate: Allocate) -> None:
        self._attention, self._kernels = attention, kernels
        pair, slots = attention.kv_pair(limits.codec), self.slots(attention, limits)
        self.memory = allocate((attention.kv_heads, slots, *pair), limits.codec.dtype)
        self.first = 0

    def append(self, key: Tensor, value: Tensor | None, start: int) -> None:
        self._kernels.ops.kv_append(key, value, self.memory, start - self.first)

    def attend(self, query: Tensor, rows: KvRows, heads: slice, out: Tensor, sinks: Tensor | None = None) -> None:
        kernels = self._kernels
        own = self._attention
        options = (rows.start - self.first, own.window, own.scale, own.softcap or None)
        others = {"sinks": sinks, "wide": rows.wide}
        kernels.ops.attention(query, self.memory[heads], *options, out, kernels.scratch, rows.parents, **others)

    def commit(self, start: int, path: Sequence[int]) -> None:
        base = start - self.first
        for place, row in enumerate(path):
            if row != place:  # always behind its place: nothing is overwritten that is still to come
                self.memory[:, base + place] = self.memory[:, base + row]

    def restart(self, first: int = 0) -> None:
        self.first = 0

    def read_page(self, begin: int, heads: slice, out: Tensor) -> None:
        out[...] = self._page(begin, heads, out.shape[1])

    def write_page(self, begin: int, heads: slice, page: Tensor) -> None:
        self._page(begin, heads, page.shape[1])[...] = page

    def truncate(self, length: int, top: int) -> int:
        return reach(self._attention.window, length, top)

    def _page(self, begin: int, heads: slice, count: int) -> Tensor:
        slot = begin - self.first
        return self.memory[heads, slot : slot + count]
