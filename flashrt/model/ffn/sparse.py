"""What both kinds of sparse FFN have in common: counting what took part, and comparing with all."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from flashrt.model.ffn.base import FfnBlock, FfnKind


@dataclass(slots=True)
class Selection:
    """Of one block, neurons that should have taken part, that did, and that are both."""

    wanted: int = 0
    taken: int = 0
    both: int = 0

    @property
    def recall(self) -> float:
        return self.both / max(self.wanted, 1)

    @property
    def precision(self) -> float:
        return self.both / max(self.taken, 1)


class SparseBlock(FfnBlock):
    """One block of a calibrated pack, with the thresholds of `layer`. `tally` is what narrow passes took part in.

    While there is a `selection`, narrow passes also compute what everything would have given, and compare.
    """

    layer: Any
    tally: Any
    selection: Selection | None = None

    @abstractmethod
    def restart(self, layer: Any) -> None:
        """Count from nothing, with the thresholds of `layer`."""

    @abstractmethod
    def shares(self) -> dict[str, float]:
        """Shares that took part per token in narrow passes, among them 'rows' and 'bytes'."""

    @property
    @abstractmethod
    def decision_bytes(self) -> int:
        """Bytes that are read only to decide what takes part."""

    @property
    @abstractmethod
    def dense_bytes(self) -> int:
        """Bytes of the block in the pack that was calibrated."""


class SparseKind(FfnKind):
    """The blocks of a calibrated pack, which are all there are."""

    FIGURES: ClassVar[tuple[str, ...]] = ("ffn_bytes_share", "ffn_rows_share", "heads_share")

    blocks: Mapping[int, SparseBlock]

    @property
    def layers(self) -> Sequence[Any]:
        """Thresholds, by layer."""
        return [block.layer for block in self.blocks.values()]

    def restart(self, layers: Sequence[Any] | None = None) -> None:
        """Count from nothing, with other thresholds where they are given."""
        for block, layer in zip(self.blocks.values(), self.layers if layers is None else layers, strict=True):
            block.restart(layer)

    @contextlib.contextmanager
    def comparing(self) -> Iterator[list[Selection]]:
        """Compare narrow passes with what everything would have given; counts are afterwards what they were."""
        blocks = list(self.blocks.values())
        tallies = [block.tally for block in blocks]
        self.restart()
        found = [Selection() for _ in blocks]
        for block, selection in zip(blocks, found, strict=True):
            block.selection = selection
        try:
            yield found
        finally:
            for block, tally in zip(blocks, tallies, strict=True):
                block.selection, block.tally = None, tally

    def shares(self, i: int) -> dict[str, float]:
        """See `SparseBlock.shares`."""
        return self.blocks[i].shares()

    def mean_shares(self) -> dict[str, float] | None:
        """`shares` averaged over the blocks; None before the first narrow pass."""
        if not any(block.tally.tokens for block in self.blocks.values()):
            return None
        layers = [block.shares() for block in self.blocks.values()]
        return {key: sum(layer[key] for layer in layers) / len(layers) for key in layers[0]}

    def decision_share(self) -> float:
        """Bytes that are read only to decide what takes part, over those of the blocks that were calibrated."""
        blocks = self.blocks.values()
        return sum(block.decision_bytes for block in blocks) / sum(block.dense_bytes for block in blocks)

    def figures(self, counts: Counter[str]) -> dict[str, Any]:
        """Of the blocks' bytes, what a decoded token touched; of their neurons, and of the heads before them.

        Heads are None where calibration is by channel; all are since the last restart, and None before the first pass.
        """
        shares = self.mean_shares() or {}
        return {f"{name}_share": shares.get(key) for name, key in _SHARES.items()}

    def remarks(self, figures: Mapping[str, Any]) -> list[str]:
        share = figures["ffn_bytes_share"]
        return [f"{share:.0%} of the FFN's bytes"] if share else []


_SHARES = {"ffn_bytes": "bytes", "ffn_rows": "rows", "heads": "heads"}
