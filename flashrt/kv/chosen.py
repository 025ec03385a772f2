"""Keys and values that do not fit in memory, of which rows of narrow passes attend to those that labels choose.

The last positions lie in one array, older ones in pages on disk, as in a `StreamedStore`, and labels of all keys in
memory. What a row chooses of older positions comes from disk by cells, through a cache that layers share.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import numpy as np

from flashrt.kv.base import Allocate, Kernels, KvLimits, KvRows
from flashrt.kv.cells import LayerCells
from flashrt.kv.choice import RECENT
from flashrt.kv.lists import Chosen, Lists
from flashrt.kv.sparse import ChoosingStore
from flashrt.kv.streamed import StreamedStore
from flashrt.spec import Attention
from flashrt_kernels.labels import LABEL_TOKENS

PART = 1 << 14  # cells that rows choose which are fetched together: numpy takes some 100 bytes for each meanwhile

Array = np.ndarray


class ChosenStore(ChoosingStore, StreamedStore):
    """A `StreamedStore` with labels of its keys."""

    behind = RECENT + LABEL_TOKENS  # what a row attends to in any case

    @classmethod
    def claim(cls, attention: Attention, limits: KvLimits) -> int | None:
        if limits.held is None or limits.choice is None or not limits.cell_bytes:
            return None
        return limits.nbytes(attention, cls.slots(attention, limits))

    @classmethod
    def cells(cls, attention: Attention, limits: KvLimits) -> int:
        if limits.choice is None:
            return 0
        shares = range(len(limits.choice.shares))
        return sum(1 + limits.choice.kept(limits.context - 1, head) for head in shares)

    def __init__(self, attention: Attention, limits: KvLimits, kernels: Kernels, allocate: Allocate) -> None:
        super().__init__(attention, limits, kernels, allocate)
        assert self._pages.cells is not None, "chosen positions come from disk by cells"
        self._cells: LayerCells = self._pages.cells
        token = self.memory[0, 0].nbytes
        self._cell = limits.cell_bytes // token  # positions of a cell
        memory = self._cells.memory.view(self.memory.dtype)
        self._fetched = memory.reshape(-1, *self.memory.shape[2:])  # [slots * positions, *pair]

    @property
    def looks_ahead(self) -> bool:
        return self.first > 0 and self._cells.guesses.wanted()

    def write_page(self, begin: int, heads: slice, page: Array) -> None:
        self._label(begin)  # before older positions leave for the disk
        super().write_page(begin, heads, page)

    def attends_to_all(self, rows: KvRows) -> bool:
        return rows.draft  # to all that is near: it reads nothing

    def look_ahead(self, query: Array, rows: KvRows, seconds: float) -> None:
        began = time.perf_counter()
        self._label(rows.start)
        every = slice(0, len(self.memory))
        for part in _parts(self._chooser.choose(query, rows, every, self._kernels.scratch)):
            self._cells.prefetch(_distinct(self._far_cells(part), len(part.paths))[0])
        self._cells.guesses.made(seconds + time.perf_counter() - began)

    def _attend_few(self, query: Array, rows: KvRows, heads: slice, out: Array, sinks: Array | None) -> None:
        if self.first == 0 or len(query) > 1:
            super()._attend_few(query, rows, heads, out, sinks)
        else:
            self._attend_by_head(query, rows, out, sinks)

    def _attend_by_head(self, query: Array, rows: KvRows, out: Array, sinks: Array | None) -> None:
        """Attention of one row: what a KV head chose is read while the next chooses, and while one is computed."""
        count = len(self.memory)
        queries, outs = query.shape[1] // count, out.shape[1] // count
        found: list[tuple[Chosen, Array]] = []
        rest = self._kernels.scratch

        def wanted() -> Iterator[Array]:
            for head in range(count):
                own = query[:, head * queries : (head + 1) * queries]
                free = found[-1][0].rest if found else rest
                chosen = self._chooser.choose(own, rows, slice(head, head + 1), free)
                cells, at = _distinct(self._far_cells(chosen, head), 1)
                found.append((chosen, at))
                yield cells

        for head, slots in enumerate(self._cells.fetch_parts(wanted())):
            own, of_head = slice(head * queries, (head + 1) * queries), slice(head, head + 1)
            chosen, at = found[head]
            lists = self._lists(chosen._replace(rest=found[-1][0].rest), rows.start, [slots[at]])
            beside = None if sinks is None else sinks[own]
            part = out[:, head * outs : (head + 1) * outs]
            self._attend_list(query[:, own], self._fetched, lists, of_head, part, beside)

    def _attend_to(
        self, query: Array, chosen: Chosen, start: int, heads: slice, out: Array, sinks: Array | None
    ) -> None:
        done = 0
        for part in _parts(chosen, self._cells.slots):
            own = slice(done, done + len(part.paths))
            self._attend_list(query[own], self._fetched, self._fetch(part, start), heads, out[own], sinks)
            done = own.stop

    def _fetch(self, chosen: Chosen, start: int) -> Lists:
        """Lists of what rows chose, whose cells are there until the next are fetched."""
        wanted = self._far_cells(chosen)
        cells, at = _distinct(wanted, len(chosen.paths))
        ends = np.cumsum([len(part) for part in wanted])[:-1]
        return self._lists(chosen, start, np.split(self._cells.fetch(cells)[at], ends))

    def _lists(self, chosen: Chosen, start: int, slots: Sequence[Array]) -> Lists:
        """Lists of rows, whose cells by row and KV head are in `slots`."""

        def places(which: int, blocks: Array) -> tuple[Array, int]:
            return self._places(blocks, slots[which])

        return self._chooser.lists(chosen, start, self.first, places)

    def _places(self, blocks: Array, slots: Array) -> tuple[Array, int]:
        """Where blocks begin, of which the first are in `slots` of the cache."""
        starts, down = blocks * np.int32(self._chooser.block), len(slots)
        starts[:down] = -1 - (slots * np.int32(self._cell) + starts[:down] % self._cell)
        starts[down:] -= self.first
        return starts, down

    def _far_cells(self, chosen: Chosen, first: int = 0) -> list[Array]:
        """By row and KV head, from `first` on, the cells (int64) of the blocks that are not in memory."""
        block, found = self._chooser.block, []
        for row, counts in zip(chosen.blocks, chosen.counts, strict=True):
            for head, (blocks, count) in enumerate(zip(row, counts, strict=True), first):
                far = blocks[: np.searchsorted(blocks[:count], self.first // block)].astype(np.int64)
                found.append(head * self._cells.count + far * block // self._cell)
        return found


def _parts(chosen: Chosen, slots: int = PART) -> Iterator[Chosen]:
    """The choice of rows, of so many at a time as choose `PART` cells or fewer, and no more than there are `slots`.

    One row's may be more than `PART`.
    """
    rows = max(min(PART, slots) // max(int(chosen.counts.sum(axis=1).max()), 1), 1)
    for begin in range(0, len(chosen.paths), rows):
        own = slice(begin, begin + rows)
        yield Chosen(chosen.blocks[own], chosen.counts[own], chosen.paths[own], chosen.rest)


def _distinct(found: list[Array], rows: int) -> tuple[Array, Array]:
    """The distinct of all cells, ascending, and where each of them is among these; those of one row are in order."""
    cells = np.concatenate(found)
    if rows > 1:
        distinct, at = np.unique(cells, return_inverse=True)
        return distinct, at
    new = np.ones(len(cells), bool)
    np.not_equal(cells[1:], cells[:-1], out=new[1:])
    return cells[new], np.cumsum(new) - 1
