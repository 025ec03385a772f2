"""Feed-forward blocks stored by input channel: of every token, only what counts is read and computed.

Which channels of gate and up take part is decided by the size of the input, as TEAL does (arXiv:2408.14690), in three
steps instead of two: whole, with the upper bits of their weights, or not at all. Which rows of down take part is
decided by the activations, which are known by then. Nothing is predicted, so nothing is mispredicted.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from flashrt.cache.weights import Weights
from flashrt.model.ffn.base import Tokens
from flashrt.model.ffn.sparse import SparseBlock, SparseKind
from flashrt.model.workspace import WIDE_NEURONS, Tensor, Workspace
from flashrt.sparsity import SINKS, ChannelSparsity
from flashrt.storage.layout import channel_columns
from flashrt_kernels.channels import CHANNELS
from flashrt_kernels.curves import function
from flashrt_kernels.rows import Codec, bundle_stride


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


class ChannelBlock(SparseBlock):
    """A block calibrated by channel. Prefill computes everything that is stored."""

    layer: ChannelSparsity
    tally: Tally

    def __init__(self, work: Workspace, i: int, layer: ChannelSparsity) -> None:
        super().__init__(work, i)
        self.restart(layer)
        self._order = _order(work.weights, i)
        self._columns = work.layout.tensors[f"{i}.channels"].columns
        vector = work.weights.vector
        self._scale, self._ratio = (vector(f"{i}.channels.{name}") for name in ("scale", "ratio"))
        self._channel_norms, self._norms = vector(f"{i}.channels.norms"), vector(f"{i}.down.norms")

    @property
    def tensors(self) -> Sequence[str]:
        return f"{self.i}.channels", f"{self.i}.down"

    def restart(self, layer: ChannelSparsity) -> None:
        self.layer, self.tally = layer, Tally()

    def prefill(self, x: Tensor, y: Tensor, tokens: Tokens) -> None:
        ops, scratch, sums = self.work.ops, self.work.scratch, self._sums(x)
        for first, groups in self.weights.runs(f"{self.i}.channels"):
            ops.gemm_gate_up(x, groups, first, self.layer.fine, self._order, self._ratio, sums, scratch)
        for first, rows in self.weights.runs(f"{self.i}.down"):
            for begin in range(0, len(rows), WIDE_NEURONS):
                part = rows[begin : begin + WIDE_NEURONS]
                ops.gemm_down(*self._down(sums, part, first + begin, y), scratch)

    def decode(self, x: Tensor, y: Tensor, tokens: Tokens) -> None:
        sums, everywhere = self._sums(x), everything(self.layer)
        parts = [
            (own, everywhere, Tally()) if sink else (own, self.layer, self.tally)
            for own, sink in _stretches(tokens.positions < SINKS)
        ]
        all_sums = None if self.selection is None else np.zeros_like(sums)
        for first, groups in self.weights.runs(f"{self.i}.channels"):
            for own, thresholds, counts in parts:
                self._gate_up(x[own], groups, first, sums[own], thresholds, counts)
            if all_sums is not None:
                self._gate_up(x, groups, first, all_sums, everywhere, Tally())
        thinned = tokens.positions >= SINKS
        if all_sums is not None:
            self._compare(sums[thinned], all_sums[thinned])
        for first, rows in self.weights.runs(f"{self.i}.down"):
            for own, thresholds, counts in parts:
                arguments = self._down(sums[own], rows, first, y[own])
                counts.neurons += self.work.ops.down(*arguments, thresholds.neurons_from)
        self.tally.tokens += int(np.count_nonzero(thinned))

    def shares(self) -> dict[str, float]:
        """Shares that took part per token: of channels (at all, and whole), of rows, and of bytes.

        Bytes are those that a token's computation touches, thresholds' norms and scales included, over those of the
        block in the pack that was calibrated.
        """
        tally, layout, hidden = self.tally, self.work.layout, self.work.spec.hidden
        columns = channel_columns(self.work.spec, self.i)
        tokens = max(tally.tokens, 1)
        row = layout.tensors[f"{self.i}.down"].stride
        half = columns // 4
        groups = layout.tensors[f"{self.i}.channels"].run_bundles
        touched = half * (tally.coarse + tally.fine) / tokens + 2 * columns * groups + row * tally.neurons / tokens
        touched += 4 * (2 * columns + hidden + groups * CHANNELS + self.ffn.neurons)
        return {
            "channels": tally.coarse / tokens / hidden,
            "whole_channels": tally.fine / tokens / hidden,
            "rows": tally.neurons / tokens / self.ffn.neurons,
            "bytes": touched / self.dense_bytes,
        }

    @property
    def decision_bytes(self) -> int:
        return 4 * (self.work.spec.hidden + self.ffn.neurons)

    @property
    def dense_bytes(self) -> int:
        codec = self.work.layout.tensors[f"{self.i}.down"].codec
        return bundle_stride(codec, self.work.spec.hidden, self.ffn.bundle_rows) * self.ffn.neurons

    def _sums(self, x: Tensor) -> Tensor:
        """Zeros float32 [T, columns]."""
        sums = self.work.view("sums", len(x), self._columns)
        sums[:] = 0
        return sums

    def _gate_up(
        self, x: Tensor, groups: Tensor, first: int, sums: Tensor, thresholds: ChannelSparsity, counts: Tally
    ) -> None:
        stored = groups, first, thresholds.fine, self._order, self._channel_norms, self._ratio
        coarse, fine = self.work.ops.gate_up(x, *stored, sums, thresholds.coarse_from, thresholds.fine_from)
        counts.coarse += coarse
        counts.fine += fine

    def _down(
        self, sums: Tensor, rows: Tensor, first: int, y: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, str, bool, Tensor, Tensor, Codec, int, Tensor]:
        ffn, codec = self.ffn, self.work.layout.tensors[f"{self.i}.down"].codec
        return sums, self._scale, self._norms, ffn.activation, ffn.gated, self.bias, rows, codec, first, y

    def _compare(self, sums: Tensor, all_sums: Tensor) -> None:
        """Count neurons that reach the threshold by what was computed, and by what all channels would have given."""
        assert self.selection is not None
        wanted = abs(self._hidden(all_sums)) * self._norms >= self.layer.neurons_from
        taken = abs(self._hidden(sums)) * self._norms >= self.layer.neurons_from
        self.selection.wanted += int(wanted.sum())
        self.selection.taken += int(taken.sum())
        self.selection.both += int((wanted & taken).sum())

    def _hidden(self, sums: Tensor) -> Tensor:
        """Activations float32 [B, neurons]."""
        ffn = self.ffn
        act, values = function(ffn.activation), sums * self._scale
        if ffn.gated:
            half = values.shape[1] // 2
            return act(values[:, : ffn.neurons]) * values[:, half : half + ffn.neurons]
        return act(values[:, : ffn.neurons] + (0 if self.bias is None else self.bias))


class ChannelKind(SparseKind):
    """The blocks of a pack calibrated by channel."""

    blocks: dict[int, ChannelBlock]

    @classmethod
    def computes(cls, work: Workspace, i: int) -> bool:
        return f"{i}.channels" in work.layout.tensors

    def __init__(self, work: Workspace, layers: Sequence[int]) -> None:
        sparsity = work.weights.pack.manifest.sparsity
        assert sparsity is not None
        self.blocks = {i: ChannelBlock(work, i, sparsity.channels[i]) for i in layers}


def _stretches(flags: np.ndarray) -> Iterator[tuple[slice, bool]]:
    """Neighbours of like flags, bool [T]."""
    edges = [0, *(np.flatnonzero(flags[1:] != flags[:-1]) + 1).tolist(), len(flags)]
    for begin, end in itertools.pairwise(edges):
        yield slice(begin, end), bool(flags[begin])


def _order(weights: Weights, i: int) -> np.ndarray:
    """The channel at each place as int32, in the memory that held it as float32."""
    values = weights.vector(f"{i}.channels.order")
    order = values.view(np.int32)
    order[:] = values.astype(np.int32)
    return order
