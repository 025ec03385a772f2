"""The positions that rows of a narrow pass attend to, as lists for the kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from flashrt.kv.base import Allocate, KvLimits, KvRows
from flashrt.kv.choice import RECENT, recent
from flashrt.kv.index import LabelIndex
from flashrt.spec import Attention
from flashrt_kernels.labels import LABEL_TOKENS
from flashrt_kernels.limits import NARROW_TOKENS

Array = np.ndarray


class Lists(NamedTuple):
    """`places` int32 [T, kv_heads, n], of which `counts` int32 [T, kv_heads] are there; `rest` of the scratch."""

    places: Array
    counts: Array
    rest: Array


class Chosen(NamedTuple):
    """Blocks that rows of a pass chose, int32 [T, kv_heads, n], ascending, of which `counts` are there.

    The first block of all is among them. `paths`: of each row, those of the pass that it attends to, itself last.
    """

    blocks: Array
    counts: Array
    paths: Sequence[Sequence[int]]
    rest: Array  # of the scratch


# Where the tokens of blocks of a KV head begin (int32 [n], ascending blocks), by which the first k lie in memory that
# counts down from -1: (starts, k).
Places = Callable[[int, Array], tuple[Array, int]]


class Chooser:
    """Makes lists by an index of labels, in scratch that `scratch_bytes` says."""

    @classmethod
    def scratch_bytes(cls, attention: Attention, limits: KvLimits, ops: Any) -> int:
        """Bytes for what a pass chooses, and behind that for choosing, or for lists and attention over these."""
        assert limits.choice is not None
        heads, most = attention.kv_heads, limits.choice.most(limits.context)
        each = 4 * NARROW_TOKENS * heads
        choose = each * most + LabelIndex.scratch_bytes(attention, limits, ops)
        attend = ops.attention_list_scratch_bytes(NARROW_TOKENS, attention.heads, heads, attention.head_dim)
        return each * (1 + most) + max(choose, each * _longest(limits.choice.block, most) + int(attend))

    def __init__(self, attention: Attention, limits: KvLimits, ops: Any, allocate: Allocate) -> None:
        assert limits.choice is not None
        self.index = LabelIndex(attention, limits, ops, allocate)
        self._choice, self._most = limits.choice, limits.choice.most(limits.context)

    @property
    def block(self) -> int:
        """Positions of a block."""
        return self._choice.block

    def leaves_out(self, rows: KvRows, count: int, heads: slice) -> bool:
        """Whether any of `count` rows attends to less than everything before it."""
        return any(self.index.leaves_out(rows.start + len(path) - 1, heads) for path in _paths(count, rows.parents))

    def choose(self, query: Array, rows: KvRows, heads: slice, scratch: Array) -> Chosen:
        """What rows of queries [T, H, head_dim] choose."""
        paths, every = _paths(len(query), rows.parents), range(*heads.indices(len(self._choice.shares)))
        blocks, rest = _carve(scratch, (len(query), len(every), 1 + self._most))
        found, scratch = _carve(rest, (len(query), len(every), self._most))
        positions = [rows.start + len(path) - 1 for path in paths]
        counts = self.index.choose(query, positions, heads, found, scratch)
        blocks[:, :, 0] = 0
        blocks[:, :, 1:] = found
        return Chosen(blocks, counts + np.int32(1), paths, rest)

    def lists(self, chosen: Chosen, start: int, first: int, places: Places) -> Lists:
        """Lists of rows whose pass starts at `start`, of a memory whose first position is `first`.

        places: of the blocks chosen, as they follow one another over rows and KV heads
        """
        rows, heads = chosen.counts.shape
        lists, rest = _carve(chosen.rest, (rows, heads, _longest(self.block, self._most)))
        counts = np.empty((rows, heads), np.int32)
        for t, path in enumerate(chosen.paths):
            before = np.arange(recent(start + len(path) - 1), start, dtype=np.int32)
            tail = np.concatenate((before, np.asarray(path, np.int32) + np.int32(start))) - np.int32(first)
            for h in range(heads):
                blocks = chosen.blocks[t, h, : chosen.counts[t, h]]
                counts[t, h] = self._fill(lists[t, h], places(t * heads + h, blocks), tail)
        return Lists(lists, counts, rest)

    def _fill(self, to: Array, places: tuple[Array, int], tail: Array) -> int:
        """The tokens of blocks, and `tail`; returns how many."""
        (starts, down), within = places, np.arange(self.block, dtype=np.int32)
        end = len(starts) * self.block
        tokens = to[:end].reshape(-1, self.block)
        np.subtract(starts[:down, None], within, out=tokens[:down])
        np.add(starts[down:, None], within, out=tokens[down:])
        to[end : end + len(tail)] = tail
        return end + len(tail)


def _longest(block: int, most: int) -> int:
    """Positions in the list of a row that chooses `most` blocks, at most."""
    return (1 + most) * block + LABEL_TOKENS + RECENT + NARROW_TOKENS


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
