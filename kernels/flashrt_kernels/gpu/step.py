"""One decode step of a sparse FFN, from scores to y, without a word from the host."""

from __future__ import annotations

import torch
from torch import Tensor

from flashrt_kernels.activations import parse
from flashrt_kernels.ffn import FfnWeights
from flashrt_kernels.gpu.arguments import check
from flashrt_kernels.gpu.gather import gather_rows
from flashrt_kernels.gpu.glu import glu_rows, workspace
from flashrt_kernels.gpu.layer_rows import LayerRows
from flashrt_kernels.gpu.row_list import RowList
from flashrt_kernels.gpu.select import select_rows
from flashrt_kernels.limits import NARROW_TOKENS, NEURON_STEP
from flashrt_kernels.rows import Codec, bundle_stride


class SparseStep:
    """Computes the sparse FFN of layers that have the same shape, in tensors that it allocates once.

    Each token's rows are chosen by its own scores, looked up in the layer's slots, fetched from the host where they are
    missing, and multiplied in ascending order: one token after the other, since a row that only another token needs
    would change a result. What one has fetched, the next one finds. When more rows are chosen than there are slots,
    they are taken in passes over as many as fit. Every pass that could be needed is launched; those that are not end at
    once. The result depends neither on the number of slots nor on what they held, nor on who shares the batch.
    """

    def __init__(
        self,
        neurons: int,
        slots: int,
        k: int,
        codec: Codec,
        activation: str,
        gated: bool,
        device: torch.device | str,
    ) -> None:
        """For layers of `neurons` rows of `k` weights with `slots` slots each.

        slots: `neurons`, or at least 128 (the passes are cut at multiples of 128). activation: a name of
        `flashrt_kernels.activations`. Raises ValueError otherwise.
        """
        parse(activation)
        if slots > neurons or slots < min(NEURON_STEP, neurons):
            raise ValueError(f"slots: expected {min(NEURON_STEP, neurons)} to {neurons}, found {slots}")
        self.neurons, self.slots, self.k = neurons, slots, k
        self.codec, self.activation, self.gated = codec, activation, gated
        size = neurons if slots == neurons else slots // NEURON_STEP * NEURON_STEP
        self._chosen = RowList.empty(neurons, device)
        self._hits, self._misses = RowList.empty(size, device), RowList.empty(size, device)
        self._places = torch.empty(size, dtype=torch.int32, device=device)
        self._found = torch.empty(size, dtype=torch.int32, device=device)
        self._scratch = workspace(size, 1, k, device)
        self._firsts = torch.arange(0, neurons, size, dtype=torch.int32, device=device)
        self._counts = torch.empty_like(self._firsts)
        self._size = size
        self._passes = [
            RowList(self._chosen.items[first : first + size], self._counts[i : i + 1], self._chosen.blocks)
            for i, first in enumerate(range(0, neurons, size))
        ]

    def __call__(self, layer: LayerRows, x: Tensor, scores: Tensor, threshold: float, y: Tensor) -> None:
        """y[b] += the FFN of x[b] over the rows that token b scores above the threshold.

        x, y float32 [B, k], B up to 16, scores float32 [B, neurons]. Raises ValueError when shapes, types or places
        differ from what the step was made for.
        """
        self._check(layer, x, scores, y)
        for token in range(len(x)):
            own = slice(token, token + 1)
            self._add(layer, x[own], scores[token], threshold, y[own])

    def _add(self, layer: LayerRows, x: Tensor, scores: Tensor, threshold: float, y: Tensor) -> None:
        """`__call__` for one token: x, y [1, k], scores [neurons]."""
        select_rows(scores, threshold, self._chosen)
        torch.sub(self._chosen.count, self._firsts, out=self._counts).clamp_(0, self._size)
        weights = FfnWeights(layer.slots, self.codec, self.activation, self.gated, layer.slot_bias)
        for rows in self._passes:
            self._bring(layer, rows)
            glu_rows(x, weights, y, self._found[: len(rows.items)], rows.count, scratch=self._scratch)

    def _bring(self, layer: LayerRows, rows: RowList) -> None:
        """Sees to it that all of `rows` lie in slots; `_found` names these."""
        layer.slot_map.split(rows, self._hits, self._misses)
        layer.slot_map.place(self._misses, self._places)
        gather_rows(layer.host, self._misses.items, layer.slots, self._places, self._misses.count)
        layer.refresh_bias()
        layer.slot_map.find(rows, self._found)

    def _check(self, layer: LayerRows, x: Tensor, scores: Tensor, y: Tensor) -> None:
        """What the operations cannot know; they check the rest."""
        shape = len(layer.host), len(layer.slots), layer.host.shape[1]
        expected = self.neurons, self.slots, bundle_stride(self.codec, self.k, 3 if self.gated else 2)
        if shape != expected:
            raise ValueError(f"layer: expected (neurons, slots, bytes of a bundle) {expected}, found {shape}")
        if not 1 <= len(x) <= NARROW_TOKENS:
            raise ValueError(f"x: expected 1 to {NARROW_TOKENS} tokens, found {len(x)}")
        for name, rows in (("x", x), ("y", y)):
            check(name, rows, torch.float32, (len(x), self.k), layer.slots.device)
        check("scores", scores, torch.float32, (len(x), self.neurons), layer.slots.device)
