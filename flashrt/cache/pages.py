"""Pages of older keys and values through the ring of the weights, read ahead as these are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence

import numpy as np

from flashrt.cache.device import BlockStream
from flashrt.cache.streamer import Place, Submit
from flashrt.kv.base import Tensor
from flashrt.kv.cells import KvCells
from flashrt.kv.far import LayerPages
from flashrt.kv.far_layout import PageId
from flashrt.kv.spill import Reading, Spill
from flashrt.storage.layout import Block
from flashrt.storage.reader import Reader
from flashrt_kernels.limits import ATTENTION_SEGMENT

Array = np.ndarray


class RingPages:
    """Brings pages of `spill` through `ring`, to whose users they are blocks of a tensor for each layer.

    cells: where narrow passes take cells of pages
    """

    def __init__(self, spill: Spill, ring: BlockStream, cells: KvCells | None = None) -> None:
        self._spill, self._ring, self.cells = spill, ring, cells

    @property
    def layers(self) -> Collection[int]:
        """Layers that have pages."""
        return self._spill.layout.page_bytes

    @property
    def version(self) -> int:
        """Changes where what was read ahead may hold what is gone."""
        return self._spill.version

    def open(self, layer: int, held: Tensor) -> LayerPages:
        """The pages of a layer, the first of them in the memory `held`."""
        cells = None if self.cells is None else self.cells.open(layer)
        return LayerPages(layer, held, self._spill, self, cells)

    def cancel(self) -> None:
        """Forget what is being read beside the ring, after a pass that was left half-way."""
        if self.cells is not None:
            self.cells.cache.cancel()

    def counts(self) -> Counter[str]:
        """Bytes read of keys and values (`bytes`), and what the cache of cells counts; see `CellCache`."""
        found = Counter() if self.cells is None else Counter(self.cells.cache.counts)
        found["bytes"] = self._spill.bytes_read
        return found

    @property
    def wait_s(self) -> float:
        """Seconds that compute has waited for cells."""
        return 0.0 if self.cells is None else self.cells.cache.wait_s

    def blocks(self, layer: int, far: int, wide: bool) -> Iterator[Block]:
        """What a pass takes that finds `far` pages before what is in memory. Narrow ones may take cells instead."""
        if not wide and layer in self._spill.layout.heads:
            return iter(())
        return (self._block(PageId(layer, segment)) for segment in range(self._spill.layout.held, far))

    def submit(self, layer: int) -> Submit:
        """Starts reading pages of a layer."""
        spill = self._spill

        def begin(reader: Reader, places: Sequence[Place], memory: Array) -> list[Reading]:
            return [
                spill.submit(PageId(layer, block.index), memory[buffer, : block.nbytes]) for block, buffer in places
            ]

        return begin

    def take(self, page: PageId) -> Array:
        """See `flashrt.kv.far.PageStream`."""
        return self._ring.take(self._block(page))

    def release(self) -> None:
        """See `flashrt.kv.far.PageStream`."""
        self._ring.release()

    def _block(self, page: PageId) -> Block:
        place = self._spill.layout.place(page)
        first = ATTENTION_SEGMENT * page.segment
        return Block(f"{page.layer}.kv", page.segment, "", place.offset, place.nbytes, first, ATTENTION_SEGMENT)
