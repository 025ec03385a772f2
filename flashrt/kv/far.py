"""Keys and values of older positions, in pages of a segment: the first of each layer in memory, the others on disk.

Where few positions are wanted, cells of pages come from disk, through a cache."""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np

from flashrt.kv.base import Tensor
from flashrt.kv.cells import LayerCells
from flashrt.kv.far_layout import PageId
from flashrt.kv.spill import Spill


class PageStream(Protocol):
    """Brings pages in the order in which passes want them; see `flashrt.cache.pages.RingPages`."""

    def take(self, page: PageId) -> np.ndarray:
        """The bytes of the page that comes next, uint8 [n]; valid until the next is taken, or `release`."""

    def release(self) -> None:
        """Let go of what was taken last."""


class LayerPages:
    """Pages of `layer`: `held` [n, kv_heads, 256, *pair] has memory for the first n; `stream` brings others.

    cells: those of its pages, where few positions of it are wanted
    """

    def __init__(
        self, layer: int, held: Tensor, spill: Spill, stream: PageStream, cells: LayerCells | None = None
    ) -> None:
        self.layer, self.held, self._spill = layer, held, spill
        self._stream, self.cells = stream, cells

    def put(self, segment: int, values: Tensor) -> None:
        """Take over a page, [kv_heads, 256, *pair]. Raises DiskError for one that could not be written before."""
        if segment < len(self.held):
            self.held[segment] = values
        else:
            self._spill.put(PageId(self.layer, segment), values)

    def take(self, segment: int) -> Tensor:
        """A page, in the order in which a pass wants them; valid until the next is taken. Raises DiskError."""
        if segment < len(self.held):
            return self.held[segment]
        return self._shaped(self._stream.take(PageId(self.layer, segment)))

    def fetch(self, segment: int) -> Tensor:
        """A page, whatever the order; valid until the next is put or fetched. Raises DiskError."""
        if segment < len(self.held):
            return self.held[segment]
        return self._shaped(self._spill.fetch(PageId(self.layer, segment)))

    def release(self) -> None:
        """What was taken last is done with."""
        self._stream.release()

    @property
    def failed(self) -> bool:
        """Whether a page could not be written, and is lost."""
        return self._spill.failed

    def restart(self) -> None:
        """Begin again without any page."""
        self._forget_cells(0)
        self._spill.restart()

    def forget(self, segment: int) -> None:
        """Pages from `segment` on are no longer those of the sequence."""
        self._forget_cells(segment)
        self._spill.forget(self.layer, segment)

    def close(self) -> None:
        """Give up the file. Closing again does nothing."""
        self._spill.close()

    def _forget_cells(self, segment: int) -> None:
        if self.cells is not None:
            self.cells.forget(segment * self._spill.layout.cells_of_page(self.layer))

    def _shaped(self, landed: np.ndarray) -> Tensor:
        shape = self.held.shape[1:]
        return landed.view(self.held.dtype)[: math.prod(shape)].reshape(shape)
