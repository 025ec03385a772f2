"""One decoder for every family: what a ModelSpec says, computed by `ops` on buffers that were allocated beforehand.

Two kinds of pass: a *narrow* one, of 1 to 16 tokens, whose kernels read each weight once and give a token the same
bits whoever shares its pass; and a *wide* one, for prefill, whose kernels decode weights into panels and multiply them
by many tokens, and give a token the same bits however the prompt is cut into passes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from flashrt.budget.working_set import SCORE_ROWS
from flashrt.cache.pages import RingPages
from flashrt.model.batch import Batch
from flashrt.model.ffn.base import Tokens
from flashrt.model.ffn.choose import Ffns
from flashrt.model.ffn.sparse import SparseKind
from flashrt.model.layer_inputs import LayerInputs
from flashrt.model.mixers import Mixers
from flashrt.model.schedule import PassKind, Schedule
from flashrt.model.scores import Likeliest, Scores
from flashrt.model.workspace import Tensor, Wide, Workspace
from flashrt_kernels.rows import MATRIX_ROWS

# Is shown a kind ('attention' and 'ffn' are inputs of these blocks, 'heads' what the heads give), the layer, the
# residual stream before the block, and the values.
Observer = Callable[[str, int, Tensor, Tensor], None]
Embed = Callable[[Batch, Tensor], None]  # writes what the first layer is given, float32 [T, hidden]


class Decoder:
    """Runs passes in the buffers of `work` over its weights, `ffns`, and `pages` of keys and values."""

    def __init__(self, work: Workspace, ffns: Ffns, pages: RingPages | None = None) -> None:
        self.work, self.ffns = work, ffns
        self.spec, self.layout = work.spec, work.layout
        self.weights, self.device = work.weights, work.device
        self.mixers = Mixers(work)
        self.inputs = LayerInputs(work) if work.spec.layer_inputs else None
        self.pages = pages
        self._schedule = Schedule(work.weights, ffns, pages)
        self._observe: Observer | None = None

    @property
    def sparse(self) -> SparseKind | None:
        """The feed-forward blocks of a calibrated pack."""
        return self.ffns.sparse

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
        return self.weights.wait_s + self.ffns.wait_s + (0.0 if self.pages is None else self.pages.wait_s)

    def begin_pass(self, kind: PassKind, next_pass: PassKind) -> None:
        """Have read what a pass takes, and what `next_pass` does, which guesses the one after it."""
        self._schedule.begin(kind, next_pass)

    def abandon_pass(self) -> None:
        """Forget what was being read, after a pass that was left half-way."""
        self._schedule.abandon()

    def forward(self, batch: Batch, embed: Embed | None = None) -> Tensor:
        """Run a pass through all layers. Returns the normed states of its rows, float32 [T, hidden].

        embed: gives what the first layer is given; None: the embeddings of the tokens

        The result is a view of a buffer that the next pass overwrites. `begin_pass` comes first, but for a draft, which
        reads nothing but rows of the embeddings. Keys and values are written behind the sequences, which stay as they
        are: what becomes part of them is for their owner to say.
        """
        x = self.work.view("x", len(batch), self.spec.hidden)
        (embed or self.embed)(batch, x)
        self.mixers.begin(batch)
        tokens = Tokens(batch.positions, x)
        for i in range(len(self.spec.layers)):
            self._mix(i, tokens, batch.wide)
            self._ffn(i, tokens, batch)
            if self.inputs is not None:
                self.inputs.add(i, x, batch.wide)
            if self.spec.layer_scales:
                x *= self.weights.vector(f"{i}.scale")
        normed = self.work.view("normed", len(batch), self.spec.hidden)
        self.work.norm("norm.final", x, normed)
        return normed

    def logits(self, states: Tensor, wide: Wide = False) -> Tensor:
        """Logits of normed states (float32 [B, hidden]): float32 [B, vocab], a view of a buffer."""
        out = self.work.view("logits", len(states), self.spec.vocab)
        self.work.linear(self.spec.head, states, out, wide)
        self._bound(out)
        return out

    def scores(self, states: Tensor, targets: np.ndarray, wide: Wide, top: int = 0) -> Scores:
        """How likely `targets` (int64 [T]) are after `states` (float32 [T, hidden]), and which `top` tokens are most.

        The head's output is reduced strip by strip, so that [T, vocab] never exists.
        """
        count = len(states)
        peaks = np.full(count, -np.inf)
        total = np.zeros(count)
        chosen = np.zeros(count)
        best = Likeliest(count, top)
        codec = self.layout.tensors[self.spec.head].codec
        step = SCORE_ROWS // MATRIX_ROWS
        for first, bundles in self.weights.runs(self.spec.head):
            for begin in range(0, len(bundles), step):
                part = bundles[begin : begin + step]
                row0 = (first + begin) * MATRIX_ROWS
                rows = min(len(part) * MATRIX_ROWS, self.spec.vocab - row0)
                strip = self.work.view("strip", count, rows)
                self.work.multiply(states, part, codec, strip, 0, rows, None, wide)
                self._bound(strip)
                values = self.device.get(strip)
                inside = np.flatnonzero((targets >= row0) & (targets < row0 + rows))
                chosen[inside] = values[inside, targets[inside] - row0]
                best.take(values, row0)
                peak = np.maximum(peaks, values.max(axis=1))
                values -= peak[:, None].astype(np.float32)  # in place: the strip is planned, a copy is not
                np.exp(values, out=values)
                total = total * np.exp(peaks - peak) + values.sum(axis=1, dtype=np.float64)
                peaks = peak
        total = peaks + np.log(total)
        return Scores(chosen - total, best.tokens, best.logits - total[:, None])

    def _bound(self, logits: Tensor) -> None:
        """Scale and bound the head's output in place."""
        if self.spec.logit_scale != 1.0:
            logits *= self.spec.logit_scale
        if self.spec.logit_softcap:
            self.work.ops.softcap(logits, self.spec.logit_softcap)

    def embed(self, batch: Batch, x: Tensor) -> None:
        """Write the embeddings of a pass's tokens into x, float32 [T, hidden]."""
        self.look_up(batch.tokens, x)
        if self.spec.positions:
            y = self.work.view("y", len(batch), self.spec.hidden)
            self.work.lookup("positions", (batch.positions + self.spec.position_offset).tolist(), y)
            x += y
        if self.inputs is not None:
            self.inputs.begin(batch.tokens, x, batch.wide)

    def look_up(self, tokens: Sequence[int], out: Tensor) -> None:
        """Rows of the embeddings, scaled, float32 [T, hidden]."""
        self.work.lookup("embed", tokens, out)
        if self.spec.embed_scale != 1.0:
            out *= self.spec.embed_scale

    def _mix(self, i: int, tokens: Tokens, wide: Wide) -> None:
        work, blocks, x = self.work, self.mixers.blocks, tokens.residual
        before = None if wide else self.ffns.blocks[i].before_attention
        if before is not None:
            before.look_ahead(x)
        normed = work.block_input(i, "attention", x, work.view("normed", len(x), self.spec.hidden))
        chosen = None if before is None else before.choose_heads(normed, tokens.positions)
        mixed = blocks[i].mix(i, normed, wide, chosen)
        if self._observe is not None:
            self._observe("attention", i, x, normed)
            self._observe("heads", i, x, mixed)
        x += blocks[i].output(i, mixed, wide)
        if i + 1 < len(blocks):
            blocks[i + 1].look_ahead(i + 1, x)

    def _ffn(self, i: int, tokens: Tokens, batch: Batch) -> None:
        block, x = self.ffns.blocks[i], tokens.residual
        count, hidden = len(x), self.spec.hidden
        normed, y = self.work.view("normed", count, hidden), self.work.view("y", count, hidden)
        if not self.spec.parallel:  # then it is what the attention block was given
            normed = self.work.block_input(i, "ffn", x, normed)
        if self._observe is not None:
            self._observe("ffn", i, x, normed)
        y[:] = 0
        if batch.draft:
            block.draft(normed, y)
        elif batch.mixed:
            block.mix(normed, y, batch.wide_rows)
        elif batch.wide:
            block.prefill(normed, y, tokens)
        else:
            block.decode(normed, y, tokens)
        if block.output_bias is not None:
            y += block.output_bias
        self.work.block_output(i, "ffn", y)
        x += y
