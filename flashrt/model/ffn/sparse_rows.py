"""Feed-forward blocks whose neurons are mostly zero: of every token, only those that a predictor names.

Each token is predicted and computed by itself, in a pass of several as well: a neuron that only another token needs
would change its result. Prefill computes all neurons, in the decoder's way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from flashrt.cache.rows import Pass, RowStatistics
from flashrt.cache.weights import Weights
from flashrt.model.ffn.lookahead import Lookahead
from flashrt.model.ffn.sparse import Selection, SparseFfn
from flashrt.model.heads import Chosen, Heads
from flashrt.model.predictors.low_rank import LowRank
from flashrt.sparsity import RowSparsity
from flashrt.storage.layout import PREDICTOR
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


class RowFfn(SparseFfn[RowSparsity]):
    """The blocks of a pack calibrated by row. `weights` are loaded.

    While `comparing`, narrow passes also compute which neurons are active, and compare.
    """

    def __init__(self, weights: Weights, ops: Any, layers: Sequence[RowSparsity]) -> None:
        self.weights, self.ops = weights, ops
        self.layers = layers
        self.tallies: list[RowTally] = []
        count = range(len(layers))
        self._thresholded = [np.empty_like(weights.vector(f"{i}{PREDICTOR}bias")) for i in count]
        self.predictors = [self._predictor(i) for i in count]
        self._heads = [None if layer.heads_from is None else Heads(weights, ops, i) for i, layer in enumerate(layers)]
        self._caches = [weights.row_cache(f"{i}.ffn") for i in count]
        self._lookaheads = [None if cache is None else Lookahead(weights.spec.hidden) for cache in self._caches]
        self._before: list[RowStatistics] = []
        self.restart(layers)

    def restart(self, layers: Sequence[RowSparsity] | None = None) -> None:
        """Count from nothing, with other thresholds where they are given."""
        self.layers = self.layers if layers is None else layers
        self.tallies = [RowTally() for _ in self.layers]
        self._before = [replace(cache.statistics) for cache in self._caches if cache is not None]
        for i, (layer, bias) in enumerate(zip(self.layers, self._thresholded, strict=True)):
            np.subtract(self.weights.vector(f"{i}{PREDICTOR}bias"), layer.threshold, out=bias)

    def choose_heads(self, i: int, x: Array, positions: Array) -> Chosen | None:
        """See `Heads.choose`; None, which is all of them, where heads are not predicted."""
        heads, threshold = self._heads[i], self.layers[i].heads_from
        if heads is None or threshold is None:
            return None
        chosen = heads.choose(x, positions, threshold)
        self.tallies[i].idle_heads += chosen.each.size - np.count_nonzero(chosen.each)
        return chosen

    def looks_ahead(self, i: int, tokens: int) -> bool:
        """Whether to call `look_ahead` before the attention of layer `i`, in a pass of so many tokens."""
        ahead = self._lookaheads[i]
        return tokens == 1 and ahead is not None and ahead.begin()

    def look_ahead(self, i: int, before: Array) -> None:
        """Start to read what block `i` will probably need, whose input would be `before` were there no attention.

        float32 [1, hidden]. What is computed does not depend on it.
        """
        ahead, cache = self._lookaheads[i], self._caches[i]
        if ahead is not None and cache is not None:
            cache.prefetch(self.predictors[i].predict(ahead.guess(before)))

    def add(self, i: int, x: Array, y: Array) -> None:
        """y += block `i` of x for a few tokens, float32 [B, hidden]."""
        for token in range(len(x)):
            self._add(i, x[token : token + 1], y[token : token + 1])
        ahead = self._lookaheads[i]
        if len(x) == 1 and ahead is not None:
            ahead.end(x)

    def abandon(self) -> None:
        """Forget what is being read, after a failure or an interrupt."""
        for cache in self._caches:
            if cache is not None:
                cache.abandon()

    @property
    def wait_s(self) -> float:
        """Seconds that compute has waited for rows."""
        return sum(cache.statistics.wait_s for cache in self._caches if cache is not None)

    def hit_rate(self) -> float | None:
        """Share of the rows asked for since the last restart that were in memory; None before the first.

        A row that was guessed and is being read for the first time was not.
        """
        if not any(tally.neurons for tally in self.tallies):
            return None
        read = self._counted("misses") + self._counted("useful")
        return 1 - read / sum(tally.neurons for tally in self.tallies)

    @property
    def counted(self) -> int:
        return max(tally.tokens for tally in self.tallies)

    def shares(self, i: int) -> dict[str, float]:
        """Shares of block `i` that took part per token: of rows, and of bytes, the predictor's included.

        'heads' are those of the attention before it.
        """
        tally, layer = self.tallies[i], self.weights.spec.layers[i]
        rows = tally.neurons / max(tally.tokens, 1) / layer.ffn.neurons
        idle = tally.idle_heads / max(tally.tokens, 1) / layer.attention.heads
        predictor = self._predictor_bytes(i) / self._dense_bytes(i)
        return {"rows": rows, "bytes": rows + predictor, "predictor": predictor, "heads": 1 - idle}

    def decision_share(self) -> float:
        """Bytes that are read only to decide what takes part, over those of the blocks."""
        layers = range(len(self.layers))
        return sum(map(self._predictor_bytes, layers)) / sum(map(self._dense_bytes, layers))

    def _add(self, i: int, x: Array, y: Array) -> None:
        rows = self.predictors[i].predict(x)
        self.tallies[i].tokens += 1
        self.tallies[i].neurons += len(rows)
        if self._selections is not None:
            self._compare(i, x, rows, self._selections[i])
        ffn, codec = self.weights.spec.layers[i].ffn, self.weights.layout.tensors[f"{i}.ffn"].codec
        memory, bias = self._memory(i), self._up_bias(i)
        for part in self._passes(i, rows):
            own = None if bias is None else bias[part.rows]
            self.ops.glu(x, FfnWeights(memory, codec, ffn.activation, ffn.gated, own), y, slots=part.slots)

    def _passes(self, i: int, rows: Array) -> Iterator[Pass]:
        cache = self._caches[i]
        if cache is not None:
            yield from cache.ensure(rows)
        elif len(rows):
            yield Pass(rows, rows)

    def _memory(self, i: int) -> Array:
        """Where the rows of a block are."""
        cache = self._caches[i]
        if cache is not None:
            return cache.memory
        return self.weights.whole(f"{i}.ffn")[: self.weights.spec.layers[i].ffn.neurons]

    def _predictor(self, i: int) -> LowRank:
        name = f"{i}{PREDICTOR}"
        down, up = self.weights.whole(f"{name}down"), self.weights.whole(f"{name}up")
        return LowRank(self.ops, down, up, self._thresholded[i], self.layers[i].rank, 1)

    def _up_bias(self, i: int) -> Array | None:
        return self.weights.vector(f"{i}.up.bias") if self.weights.spec.layers[i].ffn.bias else None

    def _compare(self, i: int, x: Array, rows: Array, selection: Selection) -> None:
        """Count the neurons that are not zero, those predicted, and those that are both."""
        active = np.concatenate([part.rows[self._hidden(i, x, part) != 0] for part in self._every(i)])
        selection.wanted += len(active)
        selection.taken += len(rows)
        selection.both += len(np.intersect1d(active, rows, assume_unique=True))

    def _every(self, i: int) -> Iterator[Pass]:
        neurons = np.arange(self.weights.spec.layers[i].ffn.neurons, dtype=np.int32)
        for begin in range(0, len(neurons), COMPARED):
            yield from self._passes(i, neurons[begin : begin + COMPARED])

    def _hidden(self, i: int, x: Array, part: Pass) -> Array:
        """Activations float32 [rows of the part] for one token x [1, hidden]."""
        ffn, codec = self.weights.spec.layers[i].ffn, self.weights.layout.tensors[f"{i}.ffn"].codec
        memory, bias = self._memory(i), self._up_bias(i)
        size, hidden = row_bytes(codec, x.shape[1]), x.shape[1]
        products = []
        for r in range(ffn.bundle_rows - 1):
            weights = np.empty((len(part.slots), hidden), np.float32)
            self.ops.dequantize(memory[part.slots, r * size : (r + 1) * size], codec, hidden, weights)
            products.append(weights @ x[0])
        if ffn.gated:
            return function(ffn.activation)(products[0]) * products[1]
        return function(ffn.activation)(products[0] + (0 if bias is None else bias[part.rows]))

    def _counted(self, name: str) -> int:
        """A count of the caches since the last restart."""
        caches = [cache for cache in self._caches if cache is not None]
        return sum(getattr(c.statistics, name) - getattr(b, name) for c, b in zip(caches, self._before, strict=True))

    def _predictor_bytes(self, i: int) -> int:
        tensors, neurons = self.weights.layout.tensors, self.weights.spec.layers[i].ffn.neurons
        return sum(t.stride * t.run_bundles for t in (tensors[f"{i}{PREDICTOR}{kind}"] for kind in ("down", "up"))) + (
            4 * neurons
        )

    def _dense_bytes(self, i: int) -> int:
        tensor = self.weights.layout.tensors[f"{i}.ffn"]
        return tensor.stride * tensor.run_bundles
