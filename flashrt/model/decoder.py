"""One decoder for every family: what a ModelSpec says, computed by `ops` on buffers that were allocated beforehand.

Two kinds of pass: a *narrow* one, of 1 to 16 tokens, whose kernels read each weight once and give a token the same
bits whoever shares its pass; and a *wide* one, for prefill, whose kernels decode weights into panels and multiply them
by many tokens, and give a token the same bits however the prompt is cut into passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from flashrt.budget.working_set import SCORE_ROWS
from flashrt.kv.contiguous import KVCache
from flashrt.model.attention import AttentionBlocks
from flashrt.model.ffn.base import Tokens
from flashrt.model.ffn.choose import Ffns
from flashrt.model.ffn.sparse import SparseKind
from flashrt.model.schedule import PassKind, Schedule
from flashrt.model.workspace import Tensor, Workspace
from flashrt_kernels.rows import MATRIX_ROWS


class Decoder:
    """Runs passes in the buffers of `work` over its weights and `ffns`, appending to `kv`."""

    def __init__(self, work: Workspace, kv: KVCache, ffns: Ffns) -> None:
        self.work, self.kv, self.ffns = work, kv, ffns
        self.spec, self.layout = work.spec, work.layout
        self.weights, self.device = work.weights, work.device
        self.attention = AttentionBlocks(work, kv)
        self._schedule = Schedule(work.weights, ffns)
        # Is shown, of every block, what ('attention' and 'ffn' are their inputs, 'heads' what heads give), the layer,
        # the residual stream before the block, and the values.
        self.observe: Callable[[str, int, Tensor, Tensor], None] | None = None

    @property
    def sparse(self) -> SparseKind | None:
        """The feed-forward blocks of a calibrated pack."""
        return self.ffns.sparse

    @property
    def wait_s(self) -> float:
        """Seconds that compute has waited for reads."""
        return self.weights.wait_s + self.ffns.wait_s

    def begin_pass(self, kind: PassKind, following: PassKind) -> None:
        """Have read what a pass takes, and what `following` does, which guesses the one after it."""
        self._schedule.begin(kind, following)

    def abandon_pass(self) -> None:
        """Forget what was being read, after a pass that was left half-way."""
        self._schedule.abandon()

    def drafted(self, token: int, depth: int) -> Tensor:
        """Logits float32 [1, vocab] after `token`, by the resident neurons of most use alone.

        It follows `depth` other drafted tokens behind the sequence, which stays as it is. Nothing is read but a row of
        the embeddings; for plans with `drafts`.
        """
        return self.logits(self._run([token], self.kv.length + depth, wide=False, parents=None, draft=True))

    def hidden(self, ids: Sequence[int], wide: bool, parents: Sequence[int] | None = None) -> Tensor:
        """Run `ids` through all layers at the end of the sequence. Returns the normed states, float32 [T, hidden].

        The result is a view of a buffer that the next pass overwrites. `begin_pass` comes first. `parents`
        makes the tokens of a narrow pass a tree (see `KVCache.tree`): each follows its parent, and is no part of the
        sequence until `kv.commit` says so.
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
        x = self.work.view("x", count, self.spec.hidden)
        self._embed(ids, positions, x)
        self.attention.rotate_to(positions)
        tokens = Tokens(positions, x)
        for i in range(len(self.spec.layers)):
            self._attention(i, tokens, start, wide, tree)
            self._ffn(i, tokens, wide, draft)
        normed = self.work.view("normed", count, self.spec.hidden)
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

    def _embed(self, ids: Sequence[int], positions: np.ndarray, x: Tensor) -> None:
        self.work.lookup("embed", ids, x)
        if self.spec.embed_scale != 1.0:
            x *= self.spec.embed_scale
        if self.spec.positions:
            y = self.work.view("y", len(ids), self.spec.hidden)
            self.work.lookup("positions", (positions + self.spec.position_offset).tolist(), y)
            x += y

    def _attention(self, i: int, tokens: Tokens, start: int, wide: bool, tree: Tensor | None) -> None:
        work, attention, x = self.work, self.attention, tokens.residual
        before = None if wide else self.ffns.blocks[i].before_attention
        if before is not None:
            before.look_ahead(x)
        normed = work.view("normed", len(x), self.spec.hidden)
        work.norm(f"{i}.norm.attention", x, normed)
        chosen = None if before is None else before.choose_heads(normed, tokens.positions)
        attended = attention.attend(i, attention.project(i, normed, wide, chosen), start, chosen, tree)
        if self.observe is not None:
            self.observe("attention", i, x, normed)
            self.observe("heads", i, x, attended)
        x += attention.output(i, attended, wide)

    def _ffn(self, i: int, tokens: Tokens, wide: bool, draft: bool) -> None:
        block, x = self.ffns.blocks[i], tokens.residual
        normed, y = (self.work.view(name, len(x), self.spec.hidden) for name in ("normed", "y"))
        self.work.norm(f"{i}.norm.ffn", x, normed)
        if self.observe is not None:
            self.observe("ffn", i, x, normed)
        y[:] = 0
        if draft:
            block.draft(normed, y)
        elif wide:
            block.prefill(normed, y, tokens)
        else:
            block.decode(normed, y, tokens)
        if block.ffn.bias:
            y += self.weights.vector(f"{i}.down.bias")
        if self.spec.post_norms:
            self.work.norm(f"{i}.norm.ffn_post", y, y)
        x += y


def depths(parents: Sequence[int]) -> np.ndarray:
    """How many tokens of its tree each token follows, int64 [T]; parents as in `KVCache.tree`."""
    result = np.zeros(len(parents), np.int64)
    for i, parent in enumerate(parents):
        if parent >= 0:
            result[i] = result[parent] + 1
    return result
