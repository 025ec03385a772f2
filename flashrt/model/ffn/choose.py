"""Which kind of feed-forward block each layer has: decided once, when a model is built. A new kind is added here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from flashrt.cache.device import Progress
from flashrt.errors import UnsupportedModelError
from flashrt.model.ffn.adaptive import AdaptiveKind
from flashrt.model.ffn.base import FfnBlock, FfnKind
from flashrt.model.ffn.dense import DenseKind
from flashrt.model.ffn.experts import MixtureKind
from flashrt.model.ffn.matrices import MatricesKind
from flashrt.model.ffn.sparse import SparseKind
from flashrt.model.ffn.sparse_channels import ChannelKind
from flashrt.model.ffn.sparse_rows import RowKind
from flashrt.model.workspace import Workspace

Kinds = Sequence[type[FfnKind]]

# The first that computes a layer has it.
KINDS: Kinds = (ChannelKind, RowKind, AdaptiveKind, MixtureKind, DenseKind, MatricesKind)


class Ffns:
    """The feed-forward blocks of a model whose weights are loaded: `blocks`, one a layer, and their kinds.

    Raises UnsupportedModelError where no kind computes a layer.
    """

    def __init__(self, work: Workspace, kinds: Kinds = KINDS) -> None:
        count = range(len(work.spec.layers))
        chosen = [next((kind for kind in kinds if kind.computes(work, i)), None) for i in count]
        if None in chosen:
            raise UnsupportedModelError(f"the feed-forward block of layer {chosen.index(None)} is of no known kind")
        layers = {kind: [i for i in count if chosen[i] is kind] for kind in kinds}
        self.kinds = [kind(work, own) for kind, own in layers.items() if own]
        by_layer = {i: block for kind in self.kinds for i, block in kind.blocks.items()}
        self.blocks: list[FfnBlock] = [by_layer[i] for i in count]
        self._names = [name for kind in kinds for name in kind.FIGURES]

    @property
    def mixes(self) -> bool:
        """Whether rows for the kernels of many tokens and of few may share a pass."""
        return all(block.mixes for block in self.blocks)

    @property
    def sparse(self) -> SparseKind | None:
        """The blocks of a calibrated pack."""
        return next((kind for kind in self.kinds if isinstance(kind, SparseKind)), None)

    @property
    def wait_s(self) -> float:
        """Seconds that compute has waited for reads that are not the ring's."""
        return sum(kind.wait_s for kind in self.kinds)

    def load(self, arrived: Progress) -> None:
        """Read what kinds keep in memory beside pinned blocks."""
        for kind in self.kinds:
            kind.load(arrived)

    def counts(self) -> Counter[str]:
        """What all kinds have counted so far, by name."""
        return sum((kind.counts() for kind in self.kinds), Counter())

    def figures(self, counts: Counter[str]) -> dict[str, Any]:
        """Figures of a request by name, None where a kind has none; `counts` were added while it decoded."""
        figures: dict[str, Any] = dict.fromkeys(self._names)
        for kind in self.kinds:
            figures |= kind.figures(counts)
        return figures

    def remarks(self, figures: Mapping[str, Any]) -> list[str]:
        """What the closing line of `flashrt run` says of such figures."""
        return [remark for kind in self.kinds for remark in kind.remarks(figures)]
