"""Feed-forward blocks whose neurons are mostly zero: of every token, only those that a predictor names.

Each token is predicted and computed by itself, in a pass of several as well: a neuron that only another token needs
would change its result. Prefill computes all neurons, as dense blocks do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from flashrt.budget.claims.rows import RowTier
from flashrt.cache.rows import Pass, RowCache, RowStatistics
from flashrt.model.ffn.base import BeforeAttention, Tokens
from flashrt.model.ffn.dense import DenseBlock
from flashrt.model.ffn.lookahead import Lookahead
from flashrt.model.ffn.sparse import SparseBlock, SparseKind
from flashrt.model.heads import Chosen, Heads
from flashrt.model.predictors.low_rank import LowRank
from flashrt.model.workspace import Workspace
from flashrt.sparsity import RowSparsity
from flashrt.storage.layout import PREDICTOR, Block
from flashrt_kernels.curves import function
from flashrt_kernels.ffn import FfnWeights
from flashrt_kernels.rows import row_bytes

Array = np.ndarray

COMPARED = 1024  # neurons that are decoded at a time to compare predictions with


@dataclass(slots=True)
class RowTally:
    """What the narrow passes through one block computed, summed over their tokens."""

    tokens: int = 0
    neurons: int = 0
    idle_heads: int = 0  # that were left out of the attention before it
    before: RowStatistics = field(default_factory=RowStatistics)  # of the cache, when counting began


class RowBlock(SparseBlock):
    """A block calibrated by row. Where not all rows are pinned, `cache` has those that recent tokens needed."""

    layer: RowSparsity
    tally: RowTally

    def __init__(self, work: Workspace, i: int, layer: RowSparsity) -> None:
        super().__init__(work, i)
        weights, name = work.weights, f"{i}{PREDICTOR}"
        self._dense = DenseBlock(work, i)
        self._thresholded = np.empty_like(weights.vector(f"{name}bias"))
        factors = weights.pinned(f"{name}down"), weights.pinned(f"{name}up")
        self.predictor = LowRank(work.ops, *factors, self._thresholded, layer.rank, 1)
        self.heads = None if layer.heads_from is None else Heads(weights, work.ops, i)
        self.cache = self._make_cache()
        self.partial = self.cache is not None
        self._ahead = None if self.cache is None else Lookahead(work.spec.hidden)
        self.restart(layer)

    @property
    def before_attention(self) -> BeforeAttention | None:
        return None if self.heads is None and self._ahead is None else self

    def restart(self, layer: RowSparsity) -> None:
        self.layer, before = layer, RowStatistics()
        if self.cache is not None:
            before = replace(self.cache.statistics)
        self.tally = RowTally(before=before)
        np.subtract(self.weights.vector(f"{self.i}{PREDICTOR}bias"), layer.threshold, out=self._thresholded)

    def expect(self, wide: bool) -> Iterable[Block]:
        return self._dense.expect(wide) if wide or self.cache is None else ()

    def prefill(self, x: Array, y: Array, tokens: Tokens) -> None:
        self._dense.prefill(x, y, tokens)

    def decode(self, x: Array, y: Array, tokens: Tokens) -> None:
        for token in range(len(x)):
            self._add(x[token : token + 1], y[token : token + 1])
        if len(x) == 1 and self._ahead is not None:
            self._ahead.end(x)

    def look_ahead(self, residual: Array) -> None:
        """See `BeforeAttention`. What is computed does not depend on it."""
        if len(residual) == 1 and self._ahead is not None and self.cache is not None and self._ahead.begin():
            normed = self.work.view("normed", 1, self.work.spec.hidden)
            normed = self.work.block_input(self.i, "ffn", residual, normed)
            self.cache.prefetch(self.predictor.predict(self._ahead.guess(normed)))

    def choose_heads(self, x: Array, positions: Array) -> Chosen | None:
        """See `BeforeAttention`."""
        if self.heads is None or self.layer.heads_from is None:
            return None
        chosen = self.heads.choose(x, positions, self.layer.heads_from)
        self.tally.idle_heads += chosen.each.size - np.count_nonzero(chosen.each)
        return chosen

    def shares(self) -> dict[str, float]:
        """Shares that took part per token: of rows, of bytes, the predictor's included, and of the heads before it."""
        tally, attention = self.tally, self.work.spec.layers[self.i].attention
        rows = tally.neurons / max(tally.tokens, 1) / self.ffn.neurons
        idle = tally.idle_heads / max(tally.tokens, 1) / attention.heads
        predictor = self.decision_bytes / self.dense_bytes
        return {"rows": rows, "bytes": rows + predictor, "predictor": predictor, "heads": 1 - idle}

    @property
    def decision_bytes(self) -> int:
        tensors = (self.work.layout.tensors[f"{self.i}{PREDICTOR}{kind}"] for kind in ("down", "up"))
        return sum(t.stride * t.run_bundles for t in tensors) + 4 * self.ffn.neurons

    @property
    def dense_bytes(self) -> int:
        return self._dense.tensor.stride * self._dense.tensor.run_bundles

    def _make_cache(self) -> RowCache | None:
        """Where the plan gives the layer slots."""
        weights, tensor = self.weights, self._dense.tensor
        if tensor.name not in weights.plan.tier(RowTier).slots:
            return None
        memory, pinned = weights.memory(tensor.name), len(weights.pinned(tensor.name))
        return RowCache(weights.reader, weights.verifier, tensor, memory, pinned)

    def _add(self, x: Array, y: Array) -> None:
        rows = self.predictor.predict(x)
        self.tally.tokens += 1
        self.tally.neurons += len(rows)
        if self.selection is not None:
            self._compare(x, rows)
        memory = self._memory
        for part in self._passes(rows):
            bias = None if self.bias is None else self.bias[part.rows]
            self.work.ops.glu(x, FfnWeights(memory, *self._dense.form, bias), y, slots=part.slots)

    def _passes(self, rows: Array) -> Iterator[Pass]:
        if self.cache is not None:
            yield from self.cache.ensure(rows)
        elif len(rows):
            yield Pass(rows, rows)

    @property
    def _memory(self) -> Array:
        """Where the rows of the block are."""
        return self.weights.memory(self._dense.tensor.name)[: self._rows]

    @property
    def _rows(self) -> int:
        """Rows of the memory that are no padding."""
        return self.ffn.neurons if self.cache is None else len(self.cache.memory)

    def _compare(self, x: Array, rows: Array) -> None:
        """Count the neurons that are not zero, those predicted, and those that are both."""
        assert self.selection is not None
        active = np.concatenate([part.rows[self._hidden(x, part) != 0] for part in self._every()])
        self.selection.wanted += len(active)
        self.selection.taken += len(rows)
        self.selection.both += len(np.intersect1d(active, rows, assume_unique=True))

    def _every(self) -> Iterator[Pass]:
        neurons = np.arange(self.ffn.neurons, dtype=np.int32)
        for begin in range(0, len(neurons), COMPARED):
            yield from self._passes(neurons[begin : begin + COMPARED])

    def _hidden(self, x: Array, part: Pass) -> Array:
        """Activations float32 [rows of the part] for one token x [1, hidden]."""
        ffn, codec, memory = self.ffn, self._dense.tensor.codec, self._memory
        size, hidden = row_bytes(codec, x.shape[1]), x.shape[1]
        products = []
        for r in range(ffn.bundle_rows - 1):
            weights = np.empty((len(part.slots), hidden), np.float32)
            self.work.ops.dequantize(memory[part.slots, r * size : (r + 1) * size], codec, hidden, weights)
            products.append(weights @ x[0])
        if ffn.gated:
            return function(ffn.activation)(products[0]) * products[1]
        return function(ffn.activation)(products[0] + (0 if self.bias is None else self.bias[part.rows]))


class RowKind(SparseKind):
    """The blocks of a pack calibrated by row."""

    FIGURES = (*SparseKind.FIGURES, "row_hit_rate")

    blocks: dict[int, RowBlock]

    @classmethod
    def computes(cls, work: Workspace, i: int) -> bool:
        return bool(work.layout.rows)

    def __init__(self, work: Workspace, layers: Sequence[int]) -> None:
        self.blocks = {i: RowBlock(work, i, work.layout.rows[i]) for i in layers}

    @property
    def wait_s(self) -> float:
        return sum(cache.statistics.wait_s for cache in self._caches)

    def cancel(self) -> None:
        for cache in self._caches:
            cache.abandon()

    def hit_rate(self) -> float | None:
        """Share of the rows asked for since the last restart that were in memory; None before the first.

        A row that was guessed and is being read for the first time was not.
        """
        asked = sum(block.tally.neurons for block in self.blocks.values())
        if not asked:
            return None
        read = 0
        for block in self.blocks.values():
            if block.cache is not None:
                now, before = block.cache.statistics, block.tally.before
                read += now.misses + now.useful - before.misses - before.useful
        return 1 - read / asked

    def figures(self, counts: Counter[str]) -> dict[str, Any]:
        """Those of all sparse kinds, and of the neurons that were asked for, the share in memory."""
        return super().figures(counts) | {"row_hit_rate": self.hit_rate()}

    @property
    def _caches(self) -> list[RowCache]:
        return [block.cache for block in self.blocks.values() if block.cache is not None]
