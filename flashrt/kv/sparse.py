"""Keys and values of all positions, of which rows of narrow passes attend to those that labels choose.

Wide passes attend to everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from flashrt.kv.base import Allocate, Kernels, KvLimits, KvRows
from flashrt.kv.choice import RECENT, Choice, recent
from flashrt.kv.contiguous import ContiguousStore
from flashrt.kv.index import LabelIndex
from flashrt.spec import Attention
from flashrt_kernels.labels import LABEL_TOKENS
from flashrt_kernels.limits import NARROW_TOKENS

Array = np.ndarray


class SparseStore(ContiguousStore):
    """A `ContiguousStore` with an index of its keys."""

    chooses = True

    @classmethod
    def claim(cls, attention: Attention, limits: KvLimits) -> int | None:
        return None if limits.choice is None else super().claim(attention, limits)

    @classmethod
    def beside(cls, attention: Attention, limits: KvLimits) -> int:
        return LabelIndex.nbytes(attention, limits)

    @classmethod
    def scratch_bytes(cls, attention: Attention, limits: KvLimits, ops: Any) -> int:
        assert limits.choice is not None
        heads, dim, most = attention.kv_heads, attention.head_dim, limits.choice.most(limits.context)
        lists = NARROW_TOKENS * heads * (most + longest(limits.choice, most))
        attend = ops.attention_list_scratch_bytes(NARROW_TOKENS, attention.heads, heads, dim)
        return 4 * lists + max(LabelIndex.scratch_bytes(attention, limits, ops), int(attend))

    def __init__(self, attention: Attention, limits: KvLimits, kernels: Kernels, allocate: Allocate) -> None:
        super().__init__(attention, limits, kernels, allocate)
        assert limits.choice is not None
        self._index = LabelIndex(attention, limits, kernels.ops, allocate)
        self._choice, self._most = limits.choice, limits.choice.most(limits.context)

    def append(self, key: Array, value: Array, start: int) -> None:
        self._index.begin(start, self._keys)
        super().append(key, value, start)

    def restart(self, first: int = 0) -> None:
        super().restart(first)
        self._index.restart()

    def attend(self, query: Array, rows: KvRows, heads: slice, out: Array) -> None:
        if rows.wide:
            return super().attend(query, rows, heads, out)
        for begin in range(0, len(query), NARROW_TOKENS):  # a text may be scored in longer passes
            own, part = slice(begin, begin + NARROW_TOKENS), rows._replace(start=rows.start + begin)
            if begin > 0:
                self._index.begin(part.start, self._keys)
            self._attend_few(query[own], part, heads, out[own])

    def _attend_few(self, query: Array, rows: KvRows, heads: slice, out: Array) -> None:
        paths = _paths(len(query), rows.parents)
        positions = [rows.start + len(path) - 1 for path in paths]
        if not any(self._index.leaves_out(position, heads) for position in positions):
            return super().attend(query, rows, heads, out)
        memory = self.memory[heads]
        shape = len(query), len(memory)
        chosen, rest = _carve(self._kernels.scratch, (*shape, self._most))
        lists, rest = _carve(rest, (*shape, longest(self._choice, self._most)))
        chosen_counts = self._index.choose(query, positions, heads, chosen, rest)
        counts = np.empty(shape, np.int32)
        for t, path in enumerate(paths):
            before = np.arange(recent(positions[t]), rows.start, dtype=np.int32)
            tail = np.concatenate((before, np.asarray(path, np.int32) + np.int32(rows.start)))
            for h in range(shape[1]):
                counts[t, h] = self._fill(lists[t, h], chosen[t, h, : chosen_counts[t, h]], tail)
        scale = self._attention.scale
        self._kernels.ops.attention_list(query, memory, None, lists, counts, scale, None, out, rest)

    def _fill(self, to: Array, chosen: Array, tail: Array) -> int:
        """The positions of the first block, of those chosen, and `tail`; returns how many."""
        block, end = self._choice.block, (1 + len(chosen)) * self._choice.block
        within = np.arange(block, dtype=np.int32)
        to[:block] = within
        np.add(chosen[:, None] * block, within, out=to[block:end].reshape(-1, block))
        to[end : end + len(tail)] = tail
        return end + len(tail)

    def _keys(self, begin: int, end: int) -> Array:
        """float32 [kv_heads, positions, head_dim]"""
        keys = self.memory[:, begin - self.first : end - self.first, 0]
        return keys if keys.dtype == np.float32 else (keys.astype(np.uint32) << 16).view(np.float32)


def longest(choice: Choice, most: int) -> int:
    """Positions in the list of a row that chooses `most` blocks, at most."""
    return (1 + most) * choice.block + LABEL_TOKENS + RECENT + NARROW_TOKENS


def _carve(scratch: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """An int32 array at the beginning of the scratch, and the rest of that."""
    end = 4 * int(np.prod(shape))
    return scratch[:end].view(np.int32).reshape(shape), scratch[end:]


def _paths(count: int, parents: Sequence[int] | None) -> list[list[int]]:
    """For each row of a pass, those of its own that it attends to, itself last."""
    paths: list[list[int]] = []
    for row in range(count):
        parent = row - 1 if parents is None else int(parents[row])
        paths.append([*(paths[parent] if parent >= 0 else ()), row])
    return paths
