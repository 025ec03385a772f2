"""One decode step of a sparse FFN, from scores to y, without a word from the host."""

from __future__ import annotations

import torch
from torch import Tensor

from flashrt_kernels.gpu.arguments import check
from flashrt_kernels.gpu.gather import gather_rows
from flashrt_kernels.gpu.glu import PARTS, SLOTS, Activation, glu_rows, workspace
from flashrt_kernels.gpu.layer_rows import LayerRows
from flashrt_kernels.gpu.row_list import RowList
from flashrt_kernels.gpu.select import select_rows
from flashrt_kernels.rows import Codec, bundle_stride

WHOLE = SLOTS * PARTS  # slots: sums over the same rows, cut at multiples of it, have the same bits


class SparseStep:
    """Computes the sparse FFN of layers that have the same shape, in tensors that it allocates once.

    Rows are chosen by the scores of the tokens at hand (the union over the batch), looked up in the layer's slots,
    fetched from the host where they are missing, and multiplied in ascending order. When more rows are chosen than
    there are slots, they are taken in passes over as many as fit. Every pass that could be needed is launched; those
    that are not end at once. The result depends neither on the number of slots nor on what they held.
    """

    def __init__(
        self,
        neurons: int,
        slots: int,
        tokens: int,
        k: int,
        codec: Codec,
        activation: Activation,
        gated: bool,
        device: torch.device | str,
    ) -> None:
        """For layers of `neurons` rows of `k` weights with `slots` slots each, and up to `tokens` tokens.

        slots: `neurons`, or at least 128 (the passes are cut at multiples of 128). Raises ValueError otherwise.
        """
        if slots > neurons or slots < min(WHOLE, neurons):
            raise ValueError(f"slots: expected {min(WHOLE, neurons)} to {neurons}, found {slots}")
        self.neurons, self.slots, self.tokens, self.k = neurons, slots, tokens, k
        self.codec, self.activation, self.gated = codec, activation, gated
        size = neurons if slots == neurons else slots // WHOLE * WHOLE
        self._chosen = RowList.empty(neurons, device)
        self._hits, self._misses = RowList.empty(size, device), RowList.empty(size, device)
        self._places = torch.empty(size, dtype=torch.int32, device=device)
        self._found = torch.empty(size, dtype=torch.int32, device=device)
        self._scratch = workspace(size, tokens, k, device)
        self._firsts = torch.arange(0, neurons, size, dtype=torch.int32, device=device)
        self._counts = torch.empty_like(self._firsts)
        self._size = size
        self._passes = [
            RowList(self._chosen.items[first : first + size], self._counts[i : i + 1], self._chosen.blocks)
            for i, first in enumerate(range(0, neurons, size))
        ]

    def __call__(self, layer: LayerRows, x: Tensor, scores: Tensor, threshold: float, y: Tensor) -> None:
        """y[b] += the FFN of x[b] over the rows that any token scores above the threshold.

        x, y float32 [B, k], scores float32 [B, neurons]. Raises ValueError when shapes, types or places differ from
        what the step was made for.
        """
        self._check(layer, x, scores)
        select_rows(scores, threshold, self._chosen)
        torch.sub(self._chosen.count, self._firsts, out=self._counts).clamp_(0, self._size)
        for rows in self._passes:
            self._bring(layer, rows)
            glu_rows(
                x,
                layer.slots,
                self.codec,
                self.activation,
                self.gated,
                y,
                self._found[: len(rows.items)],
                rows.count,
                up_bias=layer.slot_bias,
                scratch=self._scratch,
            )

    def _bring(self, layer: LayerRows, rows: RowList) -> None:
        """Sees to it that all of `rows` lie in slots; `_found` names these."""
        layer.slot_map.split(rows, self._hits, self._misses)
        layer.slot_map.place(self._misses, self._places)
        gather_rows(layer.host, self._misses.items, layer.slots, self._places, self._misses.count)
        layer.refresh_bias()
        layer.slot_map.find(rows, self._found)

    def _check(self, layer: LayerRows, x: Tensor, scores: Tensor) -> None:
        """What the operations cannot know; they check the rest."""
        shape = len(layer.host), len(layer.slots), layer.host.shape[1]
        expected = self.neurons, self.slots, bundle_stride(self.codec, self.k, 3 if self.gated else 2)
        if shape != expected:
            raise ValueError(f"layer: expected (neurons, slots, bytes of a bundle) {expected}, found {shape}")
        if not 1 <= len(x) <= self.tokens:
            raise ValueError(f"x: expected 1 to {self.tokens} tokens, found {len(x)}")
        check("x", x, torch.float32, (len(x), self.k), layer.slots.device)
        check("scores", scores, torch.float32, (len(x), self.neurons), layer.slots.device)
