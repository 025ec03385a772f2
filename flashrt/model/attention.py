"""The attention block of every layer: projections, rotation, and attention over the keys and values of a sequence."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from flashrt.budget.working_set import ropes
from flashrt.model.batch import Batch
from flashrt.model.heads import Chosen, computed_rows
from flashrt.model.mixer import MixedRows, MixerBlocks
from flashrt.model.workspace import Tensor, Wide, Workspace
from flashrt.spec import Attention
from flashrt_kernels.limits import NARROW_TOKENS
from flashrt_kernels.rows import MATRIX_ROWS, align

# Is shown the layer, and queries [T, heads, head_dim] and keys [T, kv_heads, head_dim] before their rotation.
HeadObserver = Callable[[int, Tensor, Tensor], None]


class AttentionBlocks(MixerBlocks):
    """Computes the block of a layer for the rows of a pass, whose keys and values go to their sequences."""

    mixer = Attention

    def __init__(self, work: Workspace) -> None:
        super().__init__(work)
        pairs = ropes(work.spec)
        self._rope_index = {pair: i for i, pair in enumerate(pairs)}
        planned = work.weights.plan.context
        self._frequencies = [np.asarray(rope.inverse_frequencies(dim, planned), np.float64) for rope, dim in pairs]
        attentions = work.spec.attentions.values()
        self._temperatures = {_temperature(a) for a in attentions if a.temperature}
        unit = {a.head_dim for a in attentions if a.qk_unit or a.value_norm}
        self._units = {dim: work.device.make(np.ones(dim, np.float32)) for dim in unit}
        self._scales: dict[tuple[float, int, int], Tensor] = {}  # of the queries of a pass, where they are not all one
        self._observe: HeadObserver | None = None

    @contextlib.contextmanager
    def observing(self, observe: HeadObserver) -> Iterator[None]:
        """Meanwhile, show `observe` the queries and keys of every layer."""
        self._observe = observe
        try:
            yield
        finally:
            self._observe = None

    def begin(self, batch: Batch, parts: Sequence[MixedRows]) -> None:
        """Prepare what all layers need of a pass: cosines and sines of its positions for every rope."""
        super().begin(batch, parts)
        count, make = len(batch), self.work.device.make
        for (rope, dim), i in self._rope_index.items():
            angles = batch.positions[:, None].astype(np.float64) * self._frequencies[i]
            for name, values in ((f"cos{i}", np.cos(angles)), (f"sin{i}", np.sin(angles))):
                out = self.work.view(name, count, rope.width(dim) // 2)
                self.work.device.put((values * rope.attention_factor).astype(np.float32), out)
        self._scales = {}
        for by, span, first in self._temperatures:
            if (steps := (batch.positions + first) // span).any():
                self._scales[by, span, first] = make((1 + by * np.log1p(steps)).astype(np.float32)[:, None, None])

    def mix(self, i: int, normed: Tensor, wide: Wide, chosen: Chosen | None) -> Tensor:
        qkv, attention = self.project(i, normed, wide, chosen), self.work.spec.layers[i].attention
        if not attention.output_gate:
            return self.attend(i, qkv, chosen)
        gate = self.work.view("gate", len(normed), attention.width)
        self.work.linear(f"{i}.gate", normed, gate, wide)
        out = self.attend(i, qkv, chosen)
        self.ops.sigmoid_gate(out, gate)
        return out

    def project(self, i: int, normed: Tensor, wide: Wide, chosen: Chosen | None) -> Tensor:
        """Queries, keys and values of layer `i`, float32 [T, row_width]; queries of the chosen heads only."""
        attention = self.work.spec.layers[i].attention
        qkv = self.work.view("qkv", len(normed), attention.row_width)
        rows = None if chosen is None else computed_rows(chosen.spans, attention)
        self.work.linear(f"{i}.qkv", normed, qkv, wide, f"{i}.qkv.bias" if attention.qkv_bias else None, rows)
        return qkv

    def attend(self, i: int, qkv: Tensor, chosen: Chosen | None) -> Tensor:
        """What the chosen heads (None: all) give, float32 [T, heads * head_dim].

        The others give zeros, whatever their queries hold.
        """
        attention, count = self.work.spec.layers[i].attention, len(qkv)
        heads, dim = attention.heads, attention.head_dim
        out = self.work.view("attended", count, heads * dim)
        query, key, value = self._prepare(i, qkv)
        group, source = heads // attention.kv_heads, self.work.spec.kv_layer(i)
        sinks = self.work.weights.vector(f"{i}.sinks") if attention.sinks else None
        for own, kv, rows in self.parts:
            store = kv.keys_of(source)
            if source == i:
                store.append(key[own], value[own], rows.start)
            for first, end in [(0, heads)] if chosen is None or store.whole else chosen.spans:
                part = out[own, first * dim : end * dim]
                beside = None if sinks is None else sinks[first:end]
                store.attend(query[own, first:end], rows, slice(first // group, end // group), part, beside)
        if chosen is not None:
            out.reshape(count, -1, dim)[~chosen.each] = 0
        return out

    def _prepare(self, i: int, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, heads, head_dim], keys and values as they are kept, normed and rotated in place."""
        attention = self.work.spec.layers[i].attention
        heads, kept, dim = attention.heads, attention.kept_heads, attention.head_dim
        split = qkv.reshape(len(qkv), -1, dim)
        query, key, value = split[:, :heads], split[:, heads : heads + kept], split[:, heads + kept :]
        if attention.keys_as_values:
            value[:] = key
        if attention.value_norm:
            self._norm_heads(value, self._units[dim])
        self._norm_part(attention, qkv[:, : heads * dim], f"{i}.q_norm")
        if kept:
            self._norm_part(attention, qkv[:, heads * dim : (heads + kept) * dim], f"{i}.k_norm")
        if self._observe is not None:
            self._observe(i, query, key)
        self._rotate(attention, split[:, : heads + kept])
        self._scale(attention, query)
        return query, key, value

    def look_ahead(self, i: int, residual: Tensor) -> None:
        """Start to bring what narrow rows will probably attend to in layer `i`, by the stream before the layer ahead.

        residual: float32 [T, hidden]; it lacks what one feed-forward block adds. A guess costs the projection of
        queries again, so none is made where that would wait for weights.
        """
        work, spec, began = self.work, self.work.spec, time.perf_counter()
        source = spec.kv_layer(i)
        parts = [
            (own, kv.keys_of(source), rows)
            for own, kv, rows in self.parts
            if len(residual[own]) <= NARROW_TOKENS and not (rows.wide or rows.draft) and kv.keys_of(source).looks_ahead
        ]
        if not parts or not work.weights.resident(f"{i}.qkv"):
            return
        attention, count = spec.layers[i].attention, len(residual)
        normed = work.block_input(i, "attention", residual, work.view("y", count, spec.hidden))
        qkv = work.view("qkv", count, attention.row_width)
        width = attention.heads * attention.head_dim
        end = min(align(width, MATRIX_ROWS), attention.qkv_rows)
        work.linear(f"{i}.qkv", normed, qkv, False, f"{i}.qkv.bias" if attention.qkv_bias else None, [(0, end)])
        query = qkv[:, :width].reshape(count, attention.heads, attention.head_dim)
        self._norm_part(attention, qkv[:, :width], f"{i}.q_norm")
        self._rotate(attention, query)
        self._scale(attention, query)
        for own, store, rows in parts:
            store.look_ahead(query[own], rows, time.perf_counter() - began)

    def _rotate(self, attention: Attention, heads: Tensor) -> None:
        """Rotate [T, heads, head_dim] in place, by the positions of the pass."""
        if attention.rope is None:
            return
        width, index = attention.rope.width(attention.head_dim), self._rope_index[attention.rope, attention.head_dim]
        cos, sin = (self.work.view(f"{name}{index}", len(heads), width // 2) for name in ("cos", "sin"))
        self.ops.rope(heads[:, :, :width], cos, sin)
        if attention.qk_unit:
            self._norm_heads(heads, self._units[attention.head_dim])

    def _scale(self, attention: Attention, query: Tensor) -> None:
        """Scale queries [T, heads, head_dim] in place by the temperature of their positions, where there is one."""
        if (scales := self._scales.get(_temperature(attention))) is not None:
            query *= scales

    def _norm_part(self, attention: Attention, part: Tensor, name: str) -> None:
        """Normalise queries or keys [T, n] in place: all heads together, each by itself, or not at all."""
        if attention.qk_norm_whole:
            self._norm(part, self.work.weights.vector(name))
        elif attention.qk_norm:
            self._norm_heads(part.reshape(len(part), -1, attention.head_dim), self.work.weights.vector(name))

    def _norm(self, rows: Tensor, weight: Tensor) -> None:
        """Normalise [T, n] in place."""
        self.ops.rms_norm(rows, weight, self.work.spec.norm_eps, rows)

    def _norm_heads(self, heads: Tensor, weight: Tensor) -> None:
        """Normalise [T, heads, head_dim] in place, in as few calls as its strides allow."""
        tokens, count = heads.shape[:2]
        for matrix in (heads[t] for t in range(tokens)) if tokens <= count else (heads[:, h] for h in range(count)):
            self._norm(matrix, weight)


def _temperature(attention: Attention) -> tuple[float, int, int]:
    """What the temperature of a position follows from."""
    return attention.temperature, attention.temperature_span, attention.temperature_first
