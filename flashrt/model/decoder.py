"""One decoder for every family: what a ModelSpec says, computed by `ops` on buffers that were allocated beforehand.

Two kinds of pass: a *narrow* one, of 1 to 16 tokens, whose kernels read each weight once and give a token the same
bits whoever shares its pass; and a *wide* one, for prefill, whose kernels decode weights into panels and multiply them
by many tokens, and give a token the same bits however the prompt is cut into passes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from flashrt.budget.working_set import SCORE_ROWS, ropes
from flashrt.cache.kv import KVCache
from flashrt.cache.weights import Weights
from flashrt.model.channels import ChannelFfn
from flashrt.model.heads import Chosen, computed_rows
from flashrt.model.router import route
from flashrt.model.rows import RowFfn
from flashrt.spec import Attention, Ffn, ModelSpec
from flashrt.storage.layout import PackLayout
from flashrt_kernels.channels import channel_groups
from flashrt_kernels.ffn import FfnWeights, RoutedTokens
from flashrt_kernels.rows import MATRIX_ROWS, Codec, row_bytes

DRAFTED = 0.5  # of a block's neurons that a draft computes with, if so many are resident
WIDE_NEURONS = 512  # neurons of one wide call; a multiple of 128 (see `flashrt_kernels.cpu`)

Tensor = Any  # an array of the backend: numpy for 'cpu', torch for 'torch'


class Decoder:
    """Runs passes over `weights`, appending to `kv`. `buffers` are flat, sized by `budget.working_set`."""

    def __init__(self, weights: Weights, kv: KVCache, buffers: Mapping[str, Tensor], scratch: Tensor) -> None:
        self.spec, self.layout = weights.spec, weights.layout
        self.device, self.ops = weights.device, weights.device.ops
        self.weights, self.kv, self.buffers, self.scratch = weights, kv, buffers, scratch
        # Is shown, of every block, what ('attention' and 'ffn' are their inputs, 'heads' what heads give), the layer,
        # the residual stream before the block, and the values.
        self.observe: Callable[[str, int, Tensor, Tensor], None] | None = None
        pairs = ropes(self.spec)
        self._rope_index = {pair: i for i, pair in enumerate(pairs)}
        sparsity = weights.pack.manifest.sparsity
        self.channels = ChannelFfn(weights, self.ops) if sparsity and sparsity.channels else None
        self.rows = RowFfn(weights, self.ops, sparsity.rows) if sparsity and sparsity.rows else None
        self._frequencies = [np.asarray(rope.inverse_frequencies(dim), np.float64) for rope, dim in pairs]

    @property
    def sparse(self) -> ChannelFfn | RowFfn | None:
        """The feed-forward blocks of a calibrated pack."""
        return self.channels or self.rows

    @property
    def wait_s(self) -> float:
        """Seconds that compute has waited for reads."""
        return self.weights.wait_s + (0.0 if self.rows is None else self.rows.wait_s)

    def abandon_pass(self) -> None:
        """Forget what was being read, after a pass that was left half-way."""
        if self.rows is not None:
            self.rows.abandon()
        self.weights.abandon_pass()

    def drafted(self, token: int, depth: int) -> Tensor:
        """Logits float32 [1, vocab] after `token`, by the resident neurons of most use alone.

        It follows `depth` other drafted tokens behind the sequence, which stays as it is. Nothing is read but a row of
        the embeddings; for plans with `following`.
        """
        return self.logits(self._run([token], self.kv.length + depth, wide=False, parents=None, draft=True))

    def hidden(self, ids: Sequence[int], wide: bool, parents: Sequence[int] | None = None) -> Tensor:
        """Run `ids` through all layers at the end of the sequence. Returns the normed states, float32 [T, hidden].

        The result is a view of a buffer that the next pass overwrites. `weights.begin_pass` comes first. `parents`
        makes the tokens of a narrow pass a tree (see `KVCache.tree`): each follows its parent, and is no part of the
        sequence until `kv.keep` says so.
        """
        states = self._run(ids, self.kv.length, wide, parents, draft=False)
        if parents is None:
            self.kv.append(len(ids))
        else:
            self.kv.tree = tuple(parents)
        return states

    def _run(self, ids: Sequence[int], start: int, wide: bool, parents: Sequence[int] | None, draft: bool) -> Tensor:
        """Normed states of `ids` from position `start` on, whose keys and values are written there."""
        count = len(ids)
        if start + count > self.kv.capacity:
            raise ValueError(f"{start} + {count} tokens do not fit in a KV cache of {self.kv.capacity}")
        self.kv.tree = ()  # its tokens are about to be overwritten
        positions = start + (np.arange(count) if parents is None else depths(parents))
        tree = None if parents is None else self.device.make(np.asarray(parents, np.int32))
        x = self._view("x", count, self.spec.hidden)
        self._embed(ids, positions, x)
        self._rotations(positions)
        for i in range(len(self.spec.layers)):
            if self.rows is not None and not wide:
                self._look_ahead_rows(i, x, self.rows)
            self._attention(i, x, start, wide, tree)
            self._ffn(i, x, start, wide, draft)
        normed = self._view("normed", count, self.spec.hidden)
        self._norm("norm.final", x, normed)
        return normed

    def logits(self, states: Tensor, wide: bool = False) -> Tensor:
        """Logits of normed states (float32 [B, hidden]): float32 [B, vocab], a view of a buffer."""
        out = self._view("logits", len(states), self.spec.vocab)
        self._linear(self.spec.head, states, out, wide)
        return out

    def scores(self, states: Tensor, targets: np.ndarray, wide: bool) -> np.ndarray:
        """Log-probability of `targets` (int64 [T]) after `states` (float32 [T, hidden]): float64 [T].

        The head's output is reduced strip by strip, so that [T, vocab] never exists.
        """
        count = len(states)
        top = np.full(count, -np.inf)
        total = np.zeros(count)
        chosen = np.zeros(count)
        codec = self.layout.tensors[self.spec.head].codec
        step = SCORE_ROWS // MATRIX_ROWS
        for first, bundles in self.weights.runs(self.spec.head):
            for begin in range(0, len(bundles), step):
                part = bundles[begin : begin + step]
                row0 = (first + begin) * MATRIX_ROWS
                rows = min(len(part) * MATRIX_ROWS, self.spec.vocab - row0)
                strip = self._view("strip", count, rows)
                self._multiply(states, part, codec, strip, 0, rows, None, wide)
                values = self.device.get(strip)
                inside = np.flatnonzero((targets >= row0) & (targets < row0 + rows))
                chosen[inside] = values[inside, targets[inside] - row0]
                peak = np.maximum(top, values.max(axis=1))
                values -= peak[:, None].astype(np.float32)  # in place: the strip is planned, a copy is not
                np.exp(values, out=values)
                total = total * np.exp(top - peak) + values.sum(axis=1, dtype=np.float64)
                top = peak
        return chosen - top - np.log(total)

    def _view(self, name: str, rows: int, width: int) -> Tensor:
        """The leading part of a flat buffer as a contiguous [rows, width] matrix."""
        return self.buffers[name][: rows * width].reshape(rows, width)

    def _embed(self, ids: Sequence[int], positions: np.ndarray, x: Tensor) -> None:
        self._lookup("embed", ids, x)
        if self.spec.embed_scale != 1.0:
            x *= self.spec.embed_scale
        if self.spec.positions:
            y = self._view("y", len(ids), self.spec.hidden)
            self._lookup("positions", (positions + self.spec.position_offset).tolist(), y)
            x += y

    def _lookup(self, name: str, ids: Sequence[int], out: Tensor) -> None:
        tensor = self.layout.tensors[name]
        encoded = self._view("encoded", len(ids), row_bytes(tensor.codec, tensor.columns))
        self.weights.rows(name, ids, encoded)
        self.ops.dequantize(encoded, tensor.codec, tensor.columns, out)

    def _rotations(self, positions: np.ndarray) -> None:
        """Cosines and sines of the pass's positions, for every distinct rope."""
        count = len(positions)
        for (rope, dim), i in self._rope_index.items():
            angles = positions[:, None].astype(np.float64) * self._frequencies[i]
            for name, values in ((f"cos{i}", np.cos(angles)), (f"sin{i}", np.sin(angles))):
                self.device.put((values * rope.attention_factor).astype(np.float32), self._view(name, count, dim // 2))

    def _attention(self, i: int, x: Tensor, start: int, wide: bool, tree: Tensor | None) -> None:
        attention, count, hidden = self.spec.layers[i].attention, len(x), self.spec.hidden
        normed, y = self._view("normed", count, hidden), self._view("y", count, hidden)
        self._norm(f"{i}.norm.attention", x, normed)
        chosen = None if self.rows is None or wide else self.rows.choose_heads(i, normed, start)
        qkv = self._view("qkv", count, attention.qkv_rows)
        rows = None if chosen is None else computed_rows(chosen.spans, attention)
        self._linear(f"{i}.qkv", normed, qkv, wide, f"{i}.qkv.bias" if attention.qkv_bias else None, rows)
        attended = self._view("attended", count, attention.heads * attention.head_dim)
        self._attend(i, attention, qkv, start, attended, chosen, tree)
        if self.observe is not None:
            self.observe("attention", i, x, normed)
            self.observe("heads", i, x, attended)
        self._linear(f"{i}.out", attended, y, wide, f"{i}.out.bias" if attention.out_bias else None)
        if self.spec.post_norms:
            self._norm(f"{i}.norm.attention_post", y, y)
        x += y

    def _attend(
        self,
        i: int,
        attention: Attention,
        qkv: Tensor,
        start: int,
        out: Tensor,
        chosen: Chosen | None,
        tree: Tensor | None,
    ) -> None:
        """Attention of the chosen heads (None: all) into `out`, float32 [T, heads * head_dim].

        The others give zeros, whatever their queries hold.
        """
        ops, count, dim, kv = self.ops, len(qkv), attention.head_dim, self.kv.layers[i]
        heads = qkv.reshape(count, -1, dim)
        query = heads[:, : attention.heads]
        key = heads[:, attention.heads : attention.heads + attention.kv_heads]
        value = heads[:, attention.heads + attention.kv_heads :]
        if attention.qk_norm:
            self._norm_heads(query, self.weights.vector(f"{i}.q_norm"))
            self._norm_heads(key, self.weights.vector(f"{i}.k_norm"))
        if attention.rope is not None:
            index = self._rope_index[attention.rope, dim]
            cos, sin = (self._view(f"{name}{index}", count, dim // 2) for name in ("cos", "sin"))
            ops.rope(heads[:, : attention.heads + attention.kv_heads], cos, sin)
        ops.kv_append(key, value, kv, start)
        options = (start, attention.window, attention.scale, None)
        if chosen is None:
            ops.attention(query, kv, *options, out, self.scratch, tree)
            return
        for first, end in chosen.spans:
            part, own = out[:, first * dim : end * dim], kv[first:end]
            ops.attention(query[:, first:end], own, *options, part, self.scratch, tree)
        out.reshape(count, -1, dim)[~chosen.each] = 0

    def _ffn(self, i: int, x: Tensor, start: int, wide: bool, draft: bool) -> None:
        ffn, count, hidden = self.spec.layers[i].ffn, len(x), self.spec.hidden
        normed, y = self._view("normed", count, hidden), self._view("y", count, hidden)
        self._norm(f"{i}.norm.ffn", x, normed)
        if self.observe is not None:
            self.observe("ffn", i, x, normed)
        y[:] = 0
        if self.channels is not None:
            self._sparse(i, self.channels, normed, start, y, wide)
        elif self.rows is not None and not wide:
            self.rows.add(i, normed, y)
        elif f"{i}.ffn" in self.weights.resident:
            self._followed(i, ffn, normed, y, wide, draft)
        elif ffn.experts:
            self._experts(i, ffn, x, normed, y, wide)
        else:
            self._glu(i, ffn, 0, normed, y, wide)
        if ffn.bias:
            y += self.weights.vector(f"{i}.down.bias")
        if self.spec.post_norms:
            self._norm(f"{i}.norm.ffn_post", y, y)
        x += y

    def _look_ahead_rows(self, i: int, x: Tensor, rows: RowFfn) -> None:
        """Read ahead the rows that block `i` would need if attention moved x as it did of late."""
        if rows.looks_ahead(i, len(x)):
            normed = self._view("normed", len(x), self.spec.hidden)
            self._norm(f"{i}.norm.ffn", x, normed)
            rows.look_ahead(i, normed)

    def _sparse(self, i: int, channels: ChannelFfn, x: Tensor, start: int, y: Tensor, wide: bool) -> None:
        sums = self._view("sums", len(x), self.layout.tensors[f"{i}.channels"].columns)
        if wide:
            channels.add_wide(i, x, sums, y, self.scratch)
        else:
            channels.add(i, x, start, sums, y)

    def _followed(self, i: int, ffn: Ffn, x: Tensor, y: Tensor, wide: bool, draft: bool) -> None:
        """A block whose resident neurons are those that the text uses: all of it, or for a draft only the best."""
        name = f"{i}.ffn"
        rows, codec = self.weights.resident[name], self.layout.tensors[name].codec
        bias = self.weights.vector(f"{i}.up.bias") if ffn.bias else None
        if draft:
            slots = rows.drafted(DRAFTED)
            own = None if bias is None else bias[rows.neurons_in(slots)]
            self.ops.glu(x, FfnWeights(rows.memory, codec, ffn.activation, ffn.gated, own), y, slots=slots)
        elif wide:
            for first, bundles, usage in self.weights.blocks(name, len(x)):
                for begin in range(0, len(bundles), WIDE_NEURONS):
                    part, use = bundles[begin : begin + WIDE_NEURONS], usage[begin : begin + WIDE_NEURONS]
                    own = None if bias is None else bias[first + begin : first + begin + len(part)]
                    neurons = FfnWeights(part, codec, ffn.activation, ffn.gated, own)
                    self.ops.gemm_glu(x, neurons, y, scratch=self.scratch, usage=use)
        else:
            for span, usage in self.weights.spans(name, len(x)):
                own = None if bias is None else bias[span.first : span.first + len(usage)]
                neurons = FfnWeights(rows.memory, codec, ffn.activation, ffn.gated, own)
                self.ops.glu(x, neurons, y, slots=span.slots, streamed_bundles=span.beside, usage=usage)

    def _experts(self, i: int, ffn: Ffn, x: Tensor, normed: Tensor, y: Tensor, wide: bool) -> None:
        """A mixture of experts: each expert that any token chose runs once, over the tokens that chose it."""
        chosen, weights = self._route(i, ffn, normed, wide)
        self.weights.expect_experts(i, chosen)
        if self.weights.experts:
            self._look_ahead(i, x, wide)
        for expert in np.unique(chosen).tolist():
            tokens, rank = np.nonzero(chosen == expert)
            make = self.device.make
            routed = RoutedTokens(make(tokens.astype(np.int32)), make(weights[tokens, rank]))
            self._glu(i, ffn, expert, normed, y, wide, routed)

    def _route(self, i: int, ffn: Ffn, normed: Tensor, wide: bool) -> tuple[np.ndarray, np.ndarray]:
        logits = self._view("router", len(normed), ffn.experts)
        self._linear(f"{i}.router", normed, logits, wide)
        return route(self.device.get(logits), ffn)

    def _look_ahead(self, i: int, x: Tensor, wide: bool) -> None:
        """Read ahead what the next router would choose now: from one layer to the next x changes little."""
        mixtures = (j for j in range(i + 1, len(self.spec.layers)) if self.spec.layers[j].ffn.experts)
        if (following := next(mixtures, None)) is not None:
            normed = self._view("ahead", len(x), self.spec.hidden)
            self._norm(f"{following}.norm.ffn", x, normed)
            chosen, _ = self._route(following, self.spec.layers[following].ffn, normed, wide)
            self.weights.prefetch_experts(following, chosen)

    def _glu(
        self,
        i: int,
        ffn: Ffn,
        run: int,
        x: Tensor,
        y: Tensor,
        wide: bool,
        routed: RoutedTokens[Tensor] | None = None,
    ) -> None:
        """Add one run of neurons, of all tokens or of those `routed` to it, to y."""
        name, ops = f"{i}.ffn", self.ops
        codec = self.layout.tensors[name].codec
        bias = self.weights.vector(f"{i}.up.bias") if ffn.bias else None
        for first, bundles in self.weights.runs(name, run):
            # A wide call keeps the activations of all its neurons: long runs are cut to bound that.
            for begin in range(0, len(bundles), WIDE_NEURONS if wide else len(bundles)):
                part = bundles[begin : begin + WIDE_NEURONS] if wide else bundles
                share = None if bias is None else bias[first + begin : first + begin + len(part)]
                neurons = FfnWeights(part, codec, ffn.activation, ffn.gated, share)
                if wide:
                    ops.gemm_glu(x, neurons, y, routed, self.scratch)
                else:
                    ops.glu(x, neurons, y, routed)

    def _linear(
        self,
        name: str,
        x: Tensor,
        out: Tensor,
        wide: bool,
        bias: str | None = None,
        rows: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        """out = x W^T + bias; only the rows between the pairs `rows`, which are whole bundles, where they are given."""
        codec, total = self.layout.tensors[name].codec, out.shape[1]
        vector = None if bias is None else self.weights.vector(bias)
        for first, bundles in self.weights.runs(name):
            row0 = first * MATRIX_ROWS
            for begin, end in rows or [(0, total)]:
                begin, end = max(begin, row0), min(end, row0 + len(bundles) * MATRIX_ROWS)
                if begin < end:
                    share = None if vector is None else vector[begin:end]
                    part = bundles[(begin - row0) // MATRIX_ROWS :]
                    self._multiply(x, part, codec, out, begin, end - begin, share, wide)

    def _multiply(
        self, x: Tensor, bundles: Tensor, codec: Codec, out: Tensor, row0: int, rows: int, bias: Tensor, wide: bool
    ) -> None:
        if wide:
            self.ops.gemm_linear(x, bundles, codec, out, row0, rows, bias, self.scratch)
        else:
            self.ops.linear(x, bundles, codec, out, row0, rows, bias)

    def _norm_heads(self, heads: Tensor, weight: Tensor) -> None:
        """Normalise [T, heads, head_dim] in place, in as few calls as its strides allow."""
        tokens, count = heads.shape[:2]
        for matrix in (heads[t] for t in range(tokens)) if tokens <= count else (heads[:, h] for h in range(count)):
            self.ops.rms_norm(matrix, weight, self.spec.norm_eps, matrix)

    def _norm(self, name: str, x: Tensor, out: Tensor) -> None:
        weight = self.weights.vector(name)
        if self.spec.norm == "rms":
            self.ops.rms_norm(x, weight, self.spec.norm_eps, out)
        else:
            self.ops.layer_norm(x, weight, self.weights.vector(f"{name}.bias"), self.spec.norm_eps, out)


def depths(parents: Sequence[int]) -> np.ndarray:
    """How many tokens of its tree each token follows, int64 [T]; parents as in `KVCache.tree`."""
    result = np.zeros(len(parents), np.int64)
    for i, parent in enumerate(parents):
        if parent >= 0:
            result[i] = result[parent] + 1
    return result


def scratch_bytes(spec: ModelSpec, layout: PackLayout, ops: Any, tokens: int) -> int:
    """Bytes of the kernels' scratch in a pass of at most `tokens` tokens."""
    sizes = [ops.gemm_scratch_bytes(tokens, spec.hidden)]
    if layout.channel_columns:
        sizes.append(ops.gate_up_scratch_bytes(tokens, channel_groups(spec.hidden)))
    for layer in set(spec.layers):
        attention, neurons = layer.attention, min(layer.ffn.neurons, WIDE_NEURONS)
        width = attention.heads * attention.head_dim
        sizes += [
            ops.gemm_scratch_bytes(tokens, width),
            ops.gemm_scratch_bytes(tokens, spec.hidden, neurons),
            # A few tokens may take more than many, which are cut into tiles.
            *(
                ops.attention_scratch_bytes(count, attention.heads, attention.kv_heads, attention.head_dim)
                for count in range(1, tokens + 1)
            ),
        ]
    return int(max(sizes))


def reserve(spec: ModelSpec, ops: Any) -> None:
    """Make the kernels take what they keep between calls, before the process is measured."""
    widest = max(max(layer.attention.heads * layer.attention.head_dim for layer in spec.layers), spec.hidden)
    ops.reserve(widest)
