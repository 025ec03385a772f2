"""One decoder for every family: what a ModelSpec says, computed by `ops` on buffers that were allocated beforehand.

Two kinds of pass: a *narrow* one, of 1 to 16 tokens, whose kernels read each weight once and give a token the same
bits whoever shares its pass; and a *wide* one, for prefill, whose kernels decode weights into panels and multiply them
by many tokens, and give a token the same bits however the prompt is cut into passes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import numpy as np

from flashrt.budget.working_set import SCORE_ROWS
from flashrt.model.attention import AttentionBlocks
from flashrt.model.batch import Batch
from flashrt.model.ffn.router import route
from flashrt.model.ffn.sparse_channels import ChannelFfn
from flashrt.model.ffn.sparse_rows import RowFfn
from flashrt.model.workspace import WIDE_NEURONS, Tensor, Workspace
from flashrt.spec import Ffn
from flashrt_kernels.ffn import FfnWeights, RoutedTokens
from flashrt_kernels.rows import MATRIX_ROWS

DRAFT_SHARE = 0.5  # of a block's neurons that a draft computes with, if so many are resident


# Is shown a kind ('attention' and 'ffn' are inputs of these blocks, 'heads' what the heads give), the layer, the
# residual stream before the block, and the values.
Observer = Callable[[str, int, Tensor, Tensor], None]


class Decoder:
    """Runs passes in the buffers of `work` over its weights."""

    def __init__(self, work: Workspace) -> None:
        self.work = work
        self.spec, self.layout = work.spec, work.layout
        self.weights, self.device, self.ops = work.weights, work.device, work.ops
        self.attention = AttentionBlocks(work)
        self._observe: Observer | None = None
        sparsity = work.weights.pack.manifest.sparsity
        self.channels = ChannelFfn(work.weights, self.ops) if sparsity and sparsity.channels else None
        self.rows = RowFfn(work.weights, self.ops, sparsity.rows) if sparsity and sparsity.rows else None

    @property
    def sparse(self) -> ChannelFfn | RowFfn | None:
        """The feed-forward blocks of a calibrated pack."""
        return self.channels or self.rows

    @contextlib.contextmanager
    def observing(self, observe: Observer) -> Iterator[None]:
        """Meanwhile, show `observe` what every block is given, and what its heads give."""
        self._observe = observe
        try:
            yield
        finally:
            self._observe = None

    @property
    def wait_s(self) -> float:
        """Seconds that compute has waited for reads."""
        return self.weights.wait_s + (0.0 if self.rows is None else self.rows.wait_s)

    def abandon_pass(self) -> None:
        """Forget what was being read, after a pass that was left half-way."""
        if self.rows is not None:
            self.rows.abandon()
        self.weights.abandon_pass()

    def forward(self, batch: Batch) -> Tensor:
        """Run a pass through all layers. Returns the normed states of its rows, float32 [T, hidden].

        The result is a view of a buffer that the next pass overwrites. `weights.begin_pass` comes first, but for a
        draft. Keys and values are written behind the sequences, which stay as they are: what becomes part of them is
        for their owner to say.
        """
        x = self.work.view("x", len(batch), self.spec.hidden)
        self._embed(batch, x)
        self.attention.begin(batch)
        for i in range(len(self.spec.layers)):
            if self.rows is not None and not batch.wide:
                self._look_ahead_rows(i, x, self.rows)
            self._attention(i, x, batch)
            self._ffn(i, x, batch)
        normed = self.work.view("normed", len(batch), self.spec.hidden)
        self.work.norm("norm.final", x, normed)
        return normed

    def logits(self, states: Tensor, wide: bool = False) -> Tensor:
        """Logits of normed states (float32 [B, hidden]): float32 [B, vocab], a view of a buffer."""
        out = self.work.view("logits", len(states), self.spec.vocab)
        self.work.linear(self.spec.head, states, out, wide)
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
                strip = self.work.view("strip", count, rows)
                self.work.multiply(states, part, codec, strip, 0, rows, None, wide)
                values = self.device.get(strip)
                inside = np.flatnonzero((targets >= row0) & (targets < row0 + rows))
                chosen[inside] = values[inside, targets[inside] - row0]
                peak = np.maximum(top, values.max(axis=1))
                values -= peak[:, None].astype(np.float32)  # in place: the strip is planned, a copy is not
                np.exp(values, out=values)
                total = total * np.exp(top - peak) + values.sum(axis=1, dtype=np.float64)
                top = peak
        return chosen - top - np.log(total)

    def _embed(self, batch: Batch, x: Tensor) -> None:
        self.work.lookup("embed", batch.tokens, x)
        if self.spec.embed_scale != 1.0:
            x *= self.spec.embed_scale
        if self.spec.positions:
            y = self.work.view("y", len(batch), self.spec.hidden)
            self.work.lookup("positions", (batch.positions + self.spec.position_offset).tolist(), y)
            x += y

    def _attention(self, i: int, x: Tensor, batch: Batch) -> None:
        work, attention, wide = self.work, self.attention, batch.wide
        normed = work.view("normed", len(x), self.spec.hidden)
        work.norm(f"{i}.norm.attention", x, normed)
        chosen = None if self.rows is None or wide else self.rows.choose_heads(i, normed, batch.positions)
        attended = attention.attend(i, attention.project(i, normed, wide, chosen), chosen)
        if self._observe is not None:
            self._observe("attention", i, x, normed)
            self._observe("heads", i, x, attended)
        x += attention.output(i, attended, wide)

    def _ffn(self, i: int, x: Tensor, batch: Batch) -> None:
        wide = batch.wide
        ffn, count, hidden = self.spec.layers[i].ffn, len(x), self.spec.hidden
        normed, y = self.work.view("normed", count, hidden), self.work.view("y", count, hidden)
        self.work.norm(f"{i}.norm.ffn", x, normed)
        if self._observe is not None:
            self._observe("ffn", i, x, normed)
        y[:] = 0
        if self.channels is not None:
            self._sparse(i, self.channels, normed, batch, y)
        elif self.rows is not None and not wide:
            self.rows.add(i, normed, y)
        elif f"{i}.ffn" in self.weights.resident:
            self._followed(i, ffn, normed, y, wide, batch.draft)
        elif ffn.experts:
            self._experts(i, ffn, x, normed, y, wide)
        else:
            self._glu(i, ffn, 0, normed, y, wide)
        if ffn.bias:
            y += self.weights.vector(f"{i}.down.bias")
        if self.spec.post_norms:
            self.work.norm(f"{i}.norm.ffn_post", y, y)
        x += y

    def _look_ahead_rows(self, i: int, x: Tensor, rows: RowFfn) -> None:
        """Read ahead the rows that block `i` would need if attention moved x as it did of late."""
        if rows.looks_ahead(i, len(x)):
            normed = self.work.view("normed", len(x), self.spec.hidden)
            self.work.norm(f"{i}.norm.ffn", x, normed)
            rows.look_ahead(i, normed)

    def _sparse(self, i: int, channels: ChannelFfn, x: Tensor, batch: Batch, y: Tensor) -> None:
        sums = self.work.view("sums", len(x), self.layout.tensors[f"{i}.channels"].columns)
        if batch.wide:
            channels.add_wide(i, x, sums, y, self.work.scratch)
        else:
            channels.add(i, x, batch.positions, sums, y)

    def _followed(self, i: int, ffn: Ffn, x: Tensor, y: Tensor, wide: bool, draft: bool) -> None:
        """A block whose resident neurons are those that the text uses: all of it, or for a draft only the best."""
        name = f"{i}.ffn"
        rows, codec = self.weights.resident[name], self.layout.tensors[name].codec
        bias = self.weights.vector(f"{i}.up.bias") if ffn.bias else None
        if draft:
            slots = rows.drafted(DRAFT_SHARE)
            own = None if bias is None else bias[rows.neurons_in(slots)]
            self.ops.glu(x, FfnWeights(rows.memory, codec, ffn.activation, ffn.gated, own), y, slots=slots)
        elif wide:
            for first, bundles, usage in self.weights.blocks(name, len(x)):
                for begin in range(0, len(bundles), WIDE_NEURONS):
                    part, use = bundles[begin : begin + WIDE_NEURONS], usage[begin : begin + WIDE_NEURONS]
                    own = None if bias is None else bias[first + begin : first + begin + len(part)]
                    neurons = FfnWeights(part, codec, ffn.activation, ffn.gated, own)
                    self.ops.gemm_glu(x, neurons, y, scratch=self.work.scratch, usage=use)
        else:
            for span, usage in self.weights.spans(name, len(x)):
                own = None if bias is None else bias[span.first : span.first + len(usage)]
                neurons = FfnWeights(rows.memory, codec, ffn.activation, ffn.gated, own)
                self.ops.glu(x, neurons, y, slots=span.slots, streamed_bundles=span.streamed_bundles, usage=usage)

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
        logits = self.work.view("router", len(normed), ffn.experts)
        self.work.linear(f"{i}.router", normed, logits, wide)
        return route(self.device.get(logits), ffn)

    def _look_ahead(self, i: int, x: Tensor, wide: bool) -> None:
        """Read ahead what the next router would choose now: from one layer to the next x changes little."""
        mixtures = (j for j in range(i + 1, len(self.spec.layers)) if self.spec.layers[j].ffn.experts)
        if (next_moe := next(mixtures, None)) is not None:
            normed = self.work.view("ahead", len(x), self.spec.hidden)
            self.work.norm(f"{next_moe}.norm.ffn", x, normed)
            chosen, _ = self._route(next_moe, self.spec.layers[next_moe].ffn, normed, wide)
            self.weights.prefetch_experts(next_moe, chosen)

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
                    ops.gemm_glu(x, neurons, y, routed, self.work.scratch)
                else:
                    ops.glu(x, neurons, y, routed)
