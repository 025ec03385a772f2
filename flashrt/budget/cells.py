"""What a cache of cells of keys and values asks of a budget, where tokens choose what they attend to on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flashrt.kv.cells import KvCells
from flashrt.kv.chosen import PART
from flashrt.kv.far_layout import FarLayout
from flashrt_kernels.limits import NARROW_TOKENS


@dataclass(frozen=True, slots=True)
class CellClaim:
    """For pages of `layout`, where a token chooses `chosen` cells of each layer at the end of the context."""

    layout: FarLayout
    chosen: Sequence[int]  # an upper bound: neighbours may lie in one cell

    @classmethod
    def of(cls, layout: FarLayout | None, chosen: Sequence[int]) -> CellClaim | None:
        """None where no layer has cells."""
        if layout is None or not layout.heads:
            return None
        return cls(layout, [min(count, layout.cells) for count in chosen])

    @property
    def least(self) -> int:
        """Cells without which nothing runs: those of one layer that a token chooses."""
        return max(self.chosen)

    @property
    def chosen_bytes(self) -> int:
        """Bytes of the cells that a token chooses, of all layers."""
        return self.layout.cell_bytes * sum(self.chosen)

    def nbytes(self, cells: int) -> int:
        """Bytes of a cache of so many."""
        together = max(self.least, min(PART, NARROW_TOKENS * self.least))
        return KvCells.nbytes(self.layout, cells, together)

    def spare(self, free: int) -> int:
        """Bytes beside the least that hold what a token chooses in all layers; half of `free` at most.

        Tokens choose much alike. A byte here saves one that is read in small pieces, which takes longer than one of
        the weights.
        """
        wanted = self.nbytes(sum(self.chosen)) - self.nbytes(self.least)
        return max(min(wanted, free // 2), 0)

    @property
    def beside_embeddings(self) -> int:
        """Bytes beside the least that would hold all cells."""
        return self.nbytes(self._all) - self.nbytes(self.least)

    def most(self, free: int) -> int:
        """Cells that `free` bytes hold, no more than there are."""
        one = self.nbytes(1) - self.nbytes(0)
        return min((free - self.nbytes(0)) // one, self._all)

    @property
    def _all(self) -> int:
        return self.layout.cells * len(self.layout.heads)
