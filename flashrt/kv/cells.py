"""Cells of pages on disk, for layers whose rows attend to few positions; one cache holds those of all layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from flashrt.kv.cell_cache import CellCache
from flashrt.kv.far_layout import FarLayout
from flashrt.kv.guesses import Guesses
from flashrt.kv.spill import Reading, Spill

FETCH = 256  # bytes that numpy and the I/O engine take for a cell while it is fetched

Array = np.ndarray


class KvCells:
    """`slots` cells of the layers of `spill` that have cells; `allocate` gives zeroed memory of a shape and type."""

    @classmethod
    def nbytes(cls, layout: FarLayout, slots: int, fetched: int) -> int:
        """Bytes that it takes from `allocate`, and while it computes with `fetched` cells at a time."""
        return slots * layout.cell_bytes + CellCache.nbytes(slots, len(layout.heads), layout.cells) + FETCH * fetched

    def __init__(self, spill: Spill, slots: int, allocate: Callable[..., Array]) -> None:
        self._spill, layout = spill, spill.layout
        self._layers = list(layout.heads)
        self.memory = allocate((slots, layout.cell_bytes), np.uint8)
        self.cache = CellCache(slots, len(self._layers), layout.cells, self._read, allocate)

    def open(self, layer: int) -> LayerCells | None:
        """The cells of a layer; None where it has none."""
        layout = self._spill.layout
        if layer not in layout.heads:
            return None
        count = layout.count * layout.cells_of_page(layer)
        return LayerCells(self._layers.index(layer), count, self.cache, self.memory)

    def _read(self, row: int, cells: Array, slots: Array) -> Reading:
        return self._spill.submit_cells(self._layers[row], cells, self.memory, slots)


class LayerCells:
    """Cells of a layer's pages, `count` for each KV head, of which `cache` holds some in `memory` (uint8 [slots, n]).

    The layer is the one of this `row` to the cache.
    """

    def __init__(self, row: int, count: int, cache: CellCache, memory: np.ndarray) -> None:
        self.count, self.memory, self._row, self._cache = count, memory, row, cache

    @property
    def slots(self) -> int:
        """Cells that can be fetched at a time."""
        return self._cache.slots

    def fetch(self, cells: np.ndarray) -> np.ndarray:
        """Slots (int32 [n]) of cells (int64 [n], KV head * count + cell), all different; valid until the next call.

        Raises DiskError.
        """
        return self._cache.fetch(self._row, cells)

    def fetch_parts(self, parts: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """The same of one part after the other: the next begins to be read before one is waited for.

        All are valid until the next call of either.
        """
        return self._cache.fetch_parts(self._row, parts)

    @property
    def guesses(self) -> Guesses:
        """Whether it pays to guess what is wanted next."""
        return self._cache.guesses

    def prefetch(self, cells: np.ndarray) -> None:
        """Start to read those that are not there."""
        self._cache.prefetch(self._row, cells)

    def forget(self, first: int) -> None:
        """Forget cells of all KV heads from cell `first` on, which are about to change on disk."""
        for begin in range(0, self._cache.cells, self.count):
            self._cache.drop(self._row, slice(begin + first, begin + self.count))
