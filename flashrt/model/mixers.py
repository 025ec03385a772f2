"""Which kind of block mixes the tokens in each layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flashrt.kv.base import KvRows
from flashrt.model.attention import AttentionBlocks
from flashrt.model.batch import Batch
from flashrt.model.delta_net import DeltaNetBlocks
from flashrt.model.latent import LatentBlocks
from flashrt.model.mixer import MixedRows, MixerBlocks
from flashrt.model.workspace import Workspace

# The first that fits a layer has it.
KINDS: Sequence[type[MixerBlocks]] = (LatentBlocks, AttentionBlocks, DeltaNetBlocks)


class Mixers:
    """The blocks of a model by layer, `blocks`, and by kind."""

    def __init__(self, work: Workspace) -> None:
        self._work = work
        kinds = [kind(work) for kind in KINDS]
        layers = work.spec.layers
        self.blocks = [next(kind for kind in kinds if isinstance(layer.mixer, kind.mixer)) for layer in layers]
        self.kinds = list(dict.fromkeys(self.blocks))

    @property
    def attention(self) -> AttentionBlocks:
        """Those of the layers that attend."""
        return next(kind for kind in self.kinds if isinstance(kind, AttentionBlocks))

    def begin(self, batch: Batch) -> None:
        """Prepare what all layers need of a pass: where its rows stand, and its trees."""
        parts, make = [], self._work.device.make
        for own, part in batch.parts:
            parents = None if part.parents is None else make(np.asarray(part.parents, np.int32))
            parts.append(MixedRows(own, part.kv, KvRows(part.start, parents, own.stop <= batch.wide_rows, batch.draft)))
        for kind in self.kinds:
            kind.begin(batch, parts)
