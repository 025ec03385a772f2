"""What the decoder knows of the block that mixes the tokens of a sequence, whatever kind it is of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

from flashrt.kv.base import KvRows
from flashrt.kv.cache import KvCache
from flashrt.model.batch import Batch
from flashrt.model.heads import Chosen
from flashrt.model.workspace import Tensor, Wide, Workspace
from flashrt.spec import Mixer


class MixedRows(NamedTuple):
    """The rows that one sequence has in a pass."""

    own: slice  # of the pass
    kv: KvCache
    rows: KvRows


class MixerBlocks(ABC):
    """Computes the blocks of the layers of one kind for the rows of a pass, of which their sequences keep something."""

    mixer: ClassVar[type[Mixer]]  # what a spec says of such layers

    def __init__(self, work: Workspace) -> None:
        self.work, self.ops = work, work.ops
        self.parts: Sequence[MixedRows] = ()

    def begin(self, batch: Batch, parts: Sequence[MixedRows]) -> None:
        """Prepare what all layers need of a pass."""
        self.parts = parts

    @abstractmethod
    def mix(self, i: int, normed: Tensor, wide: Wide, chosen: Chosen | None) -> Tensor:
        """What the chosen heads (None: all) of layer `i` give, float32 [T, width], a view of a buffer.

        normed: what the block is given, float32 [T, hidden]
        """

    def look_ahead(self, i: int, residual: Tensor) -> None:
        """Start to bring what narrow rows will probably need in layer `i`, by the stream before the layer ahead."""

    def output(self, i: int, mixed: Tensor, wide: Wide) -> Tensor:
        """What the block adds to the residual stream, float32 [T, hidden]."""
        work, name = self.work, f"{i}.out.bias"
        y = work.view("y", len(mixed), work.spec.hidden)
        work.linear(f"{i}.out", mixed, y, wide, name if name in work.layout.vectors else None)
        work.block_output(i, "attention", y)
        return y
