"""Feed-forward blocks stored by input channel: of every token, only what counts is read and computed.

Which channels of gate and up take part is decided by the size of the input, as TEAL does (arXiv:2408.14690), in three
steps instead of two: whole, with the upper bits of their weights, or not at all. Which rows of down take part is
decided by the activations, which are known by then. Nothing is predicted, so nothing is mispredicted.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from flashrt.cache.weights import Weights
from flashrt.model.ffn.sparse import SINKS, Selection, SparseFfn
from flashrt.model.workspace import WIDE_NEURONS
from flashrt.sparsity import ChannelSparsity
from flashrt.storage.layout import channel_columns
from flashrt_kernels.channels import CHANNELS
from flashrt_kernels.curves import function
from flashrt_kernels.rows import bundle_stride

Tensor = Any


@dataclass(slots=True)
class Tally:
    """What the narrow passes through one block took part in, summed over their tokens."""

    tokens: int = 0
    coarse: int = 0  # channels
    fine: int = 0
    neurons: int = 0


def everything(layer: ChannelSparsity) -> ChannelSparsity:
    """Thresholds that let everything through."""
    return replace(layer, coarse_from=-1.0, fine_from=-1.0, neurons_from=-1.0)


class ChannelFfn(SparseFfn[ChannelSparsity]):
    """The blocks of a calibrated pack. `weights` are loaded.

    While `comparing`, narrow passes also compute what all channels would have given, and compare.
    """

    def __init__(self, weights: Weights, ops: Any) -> None:
        sparsity = weights.pack.manifest.sparsity
        assert sparsity is not None
        self.weights, self.ops = weights, ops
        self.layers: Sequence[ChannelSparsity] = ()
        self.tallies: list[Tally] = []
        self.restart(sparsity.channels)
        self._orders = [_order(weights, i) for i in range(len(self.layers))]

    def restart(self, layers: Sequence[ChannelSparsity] | None = None) -> None:
        """Count from nothing, with other thresholds where they are given."""
        self.layers = self.layers if layers is None else layers
        self.tallies = [Tally() for _ in self.layers]

    def add(self, i: int, x: Tensor, positions: np.ndarray, sums: Tensor, y: Tensor) -> None:
        """y += block `i` of x for a few tokens at `positions`, float32 [B, hidden].

        sums float32 [B, columns] is scratch.
        """
        layer, tally = self.layers[i], self.tallies[i]
        later = positions >= SINKS
        parts = [
            (tokens, layer, tally) if later[tokens.start] else (tokens, everything(layer), Tally())
            for tokens in _stretches(later)
        ]
        all_sums = None if self._selections is None else np.zeros_like(sums)
        sums[:] = 0
        for first, groups in self.weights.runs(f"{i}.channels"):
            for tokens, thresholds, counts in parts:
                self._gate_up(i, x[tokens], groups, first, sums[tokens], thresholds, counts)
            if all_sums is not None:
                self._gate_up(i, x, groups, first, all_sums, everything(layer), Tally())
        if self._selections is not None and all_sums is not None:
            self._compare(i, sums[later], all_sums[later], self._selections[i])
        for first, rows in self.weights.runs(f"{i}.down"):
            for tokens, thresholds, counts in parts:
                arguments = self._down(i, sums[tokens], rows, first, y[tokens])
                counts.neurons += self.ops.down(*arguments, thresholds.neurons_from)
        tally.tokens += int(later.sum())

    def _gate_up(
        self, i: int, x: Tensor, groups: Tensor, first: int, sums: Tensor, thresholds: ChannelSparsity, counts: Tally
    ) -> None:
        norms, ratio = (self.weights.vector(f"{i}.channels.{name}") for name in ("norms", "ratio"))
        stored = groups, first, thresholds.fine, self._orders[i], norms, ratio
        coarse, fine = self.ops.gate_up(x, *stored, sums, thresholds.coarse_from, thresholds.fine_from)
        counts.coarse += coarse
        counts.fine += fine

    def add_wide(self, i: int, x: Tensor, sums: Tensor, y: Tensor, scratch: Tensor) -> None:
        """`add` for many tokens, of everything that is stored."""
        ratio = self.weights.vector(f"{i}.channels.ratio")
        sums[:] = 0
        for first, groups in self.weights.runs(f"{i}.channels"):
            self.ops.gemm_gate_up(x, groups, first, self.layers[i].fine, self._orders[i], ratio, sums, scratch)
        for first, rows in self.weights.runs(f"{i}.down"):
            for begin in range(0, len(rows), WIDE_NEURONS):
                part = rows[begin : begin + WIDE_NEURONS]
                self.ops.gemm_down(*self._down(i, sums, part, first + begin, y), scratch)

    def _down(self, i: int, sums: Tensor, rows: Tensor, first: int, y: Tensor) -> tuple[Any, ...]:
        ffn, vector = self.weights.spec.layers[i].ffn, self.weights.vector
        bias = vector(f"{i}.up.bias") if ffn.bias else None
        scale, norms = vector(f"{i}.channels.scale"), vector(f"{i}.down.norms")
        codec = self.weights.layout.tensors[f"{i}.down"].codec
        return sums, scale, norms, ffn.activation, ffn.gated, bias, rows, codec, first, y

    def _compare(self, i: int, sums: Tensor, all_sums: Tensor, selection: Selection) -> None:
        """Count neurons that reach the threshold by what was computed, and by what all channels would have given."""
        norms, threshold = self.weights.vector(f"{i}.down.norms"), self.layers[i].neurons_from
        wanted = abs(self._hidden(i, all_sums)) * norms >= threshold
        taken = abs(self._hidden(i, sums)) * norms >= threshold
        selection.wanted += int(wanted.sum())
        selection.taken += int(taken.sum())
        selection.both += int((wanted & taken).sum())

    def _hidden(self, i: int, sums: Tensor) -> Tensor:
        """Activations float32 [B, neurons] of block `i`."""
        ffn, vector = self.weights.spec.layers[i].ffn, self.weights.vector
        act, values = function(ffn.activation), sums * vector(f"{i}.channels.scale")
        if ffn.gated:
            half = values.shape[1] // 2
            return act(values[:, : ffn.neurons]) * values[:, half : half + ffn.neurons]
        return act(values[:, : ffn.neurons] + (vector(f"{i}.up.bias") if ffn.bias else 0))

    def decision_share(self) -> float:
        """Bytes that are read only to decide what takes part, over those of the blocks that were calibrated."""
        spec = self.weights.spec
        norms = sum(4 * (spec.hidden + layer.ffn.neurons) for layer in spec.layers)
        return norms / sum(map(self._dense_bytes, range(len(spec.layers))))

    def _dense_bytes(self, i: int) -> int:
        """Bytes of block `i` in the pack that was calibrated."""
        spec = self.weights.spec
        codec, ffn = self.weights.layout.tensors[f"{i}.down"].codec, spec.layers[i].ffn
        return bundle_stride(codec, spec.hidden, ffn.bundle_rows) * ffn.neurons

    @property
    def counted(self) -> int:
        return max(tally.tokens for tally in self.tallies)

    def shares(self, i: int) -> dict[str, float]:
        """Shares of block `i` that took part per token: of channels (at all, and whole), of rows, and of bytes.

        Bytes are those that a token's computation touches, thresholds' norms and scales included, over those of the
        block in the pack that was calibrated.
        """
        tally, layout, spec = self.tallies[i], self.weights.layout, self.weights.spec
        columns = channel_columns(spec, i)
        tokens, ffn = max(tally.tokens, 1), spec.layers[i].ffn
        row = layout.tensors[f"{i}.down"].stride
        half = columns // 4
        groups = layout.tensors[f"{i}.channels"].run_bundles
        touched = half * (tally.coarse + tally.fine) / tokens + 2 * columns * groups + row * tally.neurons / tokens
        touched += 4 * (2 * columns + spec.hidden + groups * CHANNELS + ffn.neurons)
        return {
            "channels": tally.coarse / tokens / spec.hidden,
            "whole_channels": tally.fine / tokens / spec.hidden,
            "rows": tally.neurons / tokens / ffn.neurons,
            "bytes": touched / self._dense_bytes(i),
        }


def _stretches(marks: np.ndarray) -> list[slice]:
    """Neighbours that are marked alike, of bool [B]."""
    cuts = [0, *(np.flatnonzero(np.diff(marks)) + 1).tolist(), len(marks)]
    return [slice(begin, end) for begin, end in itertools.pairwise(cuts)]


def _order(weights: Weights, i: int) -> np.ndarray:
    """The channel at each place as int32, in the memory that held it as float32."""
    values = weights.vector(f"{i}.channels.order")
    order = values.view(np.int32)
    order[:] = values.astype(np.int32)
    return order
