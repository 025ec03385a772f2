"""Computes passes for sequences, and keeps what was learned of passes from one request to the next."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator
from collections.abc import Sequence as Items

import numpy as np

from flashrt.budget.plan import Plan
from flashrt.engine.sequence import Sequence
from flashrt.errors import UsageError
from flashrt.kv.marks import prompt_mark
from flashrt.model.batch import Batch, Rows
from flashrt.model.decoder import Decoder, Tensor
from flashrt.model.schedule import PassKind
from flashrt.model.scores import Scores
from flashrt.sparsity import SINKS
from flashrt.speculate.speculator import Experience
from flashrt_kernels.limits import NARROW_TOKENS

Array = np.ndarray

# Is shown the rows of a pass, behind the sequence, and their normed states, float32 [T, hidden].
Watch = Callable[[Sequence, Rows, Tensor], None]


class Runner:
    """Runs a decoder under a plan, for sequences whose KV caches the plan holds.

    Token ids are taken as checked. A pass raises DiskError when a read fails and PackError for a damaged pack; one that
    fails or is interrupted leaves nothing of it behind.
    """

    def __init__(self, decoder: Decoder, plan: Plan) -> None:
        self.decoder, self.plan = decoder, plan
        self.experience = Experience()
        self.watch: Watch | None = None

    def prefill(self, sequence: Sequence, ids: Items[int], before: Callable[[], None] = lambda: None) -> Array:
        """Make `sequence` hold exactly `ids`, one at least; logits after the last one, float32 [vocab] on the host.

        before: called before each pass; what it raises ends this, with what was computed so far kept
        Whether the kernels for few or for many tokens run depends on how many tokens are new, never on the budget.
        """
        new, chunk = ids[sequence.keep_shared(ids) :], self.plan.prefill_chunk
        wide = len(new) > NARROW_TOKENS
        sequence.kv.mark(prompt_mark(len(ids)))
        with self._pass_or_nothing():
            for begin in range(0, len(new), chunk):
                before()
                last = begin + chunk >= len(new)
                next_is_last = last or begin + 2 * chunk >= len(new)
                tokens, following = new[begin : begin + chunk], new[begin + chunk : begin + 2 * chunk]
                start, end = sequence.length, sequence.length + len(tokens)
                self.decoder.begin_pass(
                    PassKind(last, wide, sequence.kv.far(start, len(tokens))),
                    PassKind(next_is_last, wide and not last, sequence.kv.far(end, len(following))),
                )
                states = self._states(sequence, Rows(sequence.kv, tokens), wide)
                sequence.extend(tokens)
            return self._on_host(self.decoder.logits(states[-1:]))[0]

    def step(self, sequence: Sequence, token: int) -> Array:
        """Append one token; logits after it, float32 [vocab] on the host."""
        return self.step_batch(sequence, [token])[0]

    def step_batch(self, sequence: Sequence, tokens: Items[int]) -> Array:
        """Append 1 to 16 tokens in one pass; logits after each, float32 [B, vocab] on the host.

        The plan's `logit_rows` bounds B; raises UsageError above it. `Sequence.rewind` takes tokens back.
        """
        logits = self._narrow(sequence, Rows(sequence.kv, tokens))
        sequence.extend(tokens)
        return logits

    def step_tree(self, sequence: Sequence, tokens: Items[int], parents: Items[int]) -> Array:
        """Compute 1 to 16 tokens in one pass, each after its own past; logits after each, float32 [B, vocab].

        Token i follows token parents[i] < i, or the sequence where that is -1; its logits are those that `step` would
        give there, bit for bit on the CPU. The sequence stays as it is until `Sequence.commit` takes some of the tokens
        into it; the next pass forgets the others. The plan's `logit_rows` bounds B. Raises UsageError above it, for
        what is no tree, and in sparse mode for a sequence of fewer than four tokens.
        """
        if len(parents) != len(tokens) or any(not -1 <= parent < i for i, parent in enumerate(parents)):
            raise UsageError(f"parents are {list(parents)}, expected -1 or an earlier token for each of {len(tokens)}")
        if self.decoder.sparse is not None and sequence.length < SINKS:
            raise UsageError(
                f"the sequence has {sequence.length} tokens, a tree in sparse mode needs {SINKS} before it"
            )
        logits = self._narrow(sequence, Rows(sequence.kv, tokens, parents))
        sequence.hold(tokens, parents)
        return logits

    def draft(self, sequence: Sequence, token: int, depth: int) -> Array:
        """Logits after `token`, which follows `depth` drafted ones, by resident neurons alone: float32 [vocab].

        For plans with `drafts`. Neither the sequence nor what streams is touched.
        """
        with self._pass_or_nothing():
            batch = Batch([Rows(sequence.kv, [token], ahead=depth)], draft=True)
            return self._on_host(self.decoder.logits(self._forward(sequence, batch)))[0]

    def score(self, sequence: Sequence, ids: Items[int], wide: bool, held: int = 0) -> float:
        """Make `sequence` hold all but the last of `ids`; the sum of the log-probabilities (nats) of all but the first.

        wide: whether by the kernels for many tokens; held: how many of `ids` the sequence begins with already, which
        are not computed again, and of which none is scored but the one after them. Needs a plan with `scoring`.
        """
        return sum(float(scores.values.sum()) for scores in self.scores(sequence, ids, wide, held))

    def scores(
        self, sequence: Sequence, ids: Items[int], wide: bool, held: int = 0, top: int = 0
    ) -> Generator[Scores, None, None]:
        """As `score`, pass by pass, with the `top` likeliest tokens in the place of each; to be taken to its end."""
        begin = sequence.rewind(held)
        if begin < held:
            raise ValueError(f"the sequence holds {begin} of the {held} tokens to go on from")
        chunk = self.plan.prefill_chunk
        with self._pass_or_nothing():
            for begin in range(held, len(ids) - 1, chunk):
                tokens = ids[begin : min(begin + chunk, len(ids) - 1)]
                start, end = sequence.length, sequence.length + len(tokens)
                kind, following = (PassKind(True, wide, sequence.kv.far(at, len(tokens))) for at in (start, end))
                self.decoder.begin_pass(kind, following)
                states = self._forward(sequence, Batch([Rows(sequence.kv, tokens)], wide))
                sequence.extend(tokens)
                targets = np.asarray(ids[begin + 1 : begin + 1 + len(tokens)], np.int64)
                yield self.decoder.scores(states, targets, wide, top)

    def logits(self, sequence: Sequence, ids: Items[int], wide: bool) -> Generator[Array, None, None]:
        """Make `sequence` hold exactly `ids`, from nothing; logits after each, float32 [n, vocab], n at most the plan's
        `logit_rows`. Each array is valid until the next one; to be taken to its end.
        """
        sequence.rewind(0)
        chunk = self.plan.prefill_chunk
        with self._pass_or_nothing():
            for begin in range(0, len(ids), chunk):
                tokens = ids[begin : begin + chunk]
                start, end = sequence.length, sequence.length + len(tokens)
                kind, following = (PassKind(True, wide, sequence.kv.far(at, len(tokens))) for at in (start, end))
                self.decoder.begin_pass(kind, following)
                states = self._forward(sequence, Batch([Rows(sequence.kv, tokens)], wide))
                sequence.extend(tokens)
                for row in range(0, len(tokens), self.plan.logit_rows):
                    yield self._on_host(self.decoder.logits(states[row : row + self.plan.logit_rows]))

    def most_positions(self, sequence: Sequence) -> int:
        """Tokens that `step_tree` takes now, at most."""
        if self.decoder.sparse is not None and sequence.length < SINKS:
            return 1
        return min(self.plan.max_draft_tokens, self.plan.context - sequence.length)

    def _narrow(self, sequence: Sequence, rows: Rows) -> Array:
        """Logits after each row of a narrow pass."""
        most = min(NARROW_TOKENS, self.plan.logit_rows)
        if not 1 <= len(rows.tokens) <= most:
            raise UsageError(f"a pass of {len(rows.tokens)} tokens, expected 1 to {most}")
        with self._pass_or_nothing():
            count = len(rows.tokens)
            kind, following = (PassKind(True, False, sequence.kv.far(at, count)) for at in (rows.start, rows.start + 1))
            self.decoder.begin_pass(kind, following)
            return self._on_host(self.decoder.logits(self._states(sequence, rows)))

    def _states(self, sequence: Sequence, rows: Rows, wide: bool = False) -> Tensor:
        """Run a pass that brings tokens, and show it."""
        states = self._forward(sequence, Batch([rows], wide))
        if self.watch is not None:
            self.watch(sequence, rows, states)
        return states

    def _forward(self, sequence: Sequence, batch: Batch) -> Tensor:
        sequence.forget_tree()
        return self.decoder.forward(batch)

    def _on_host(self, values: Tensor) -> Array:
        return self.decoder.device.get(values)

    @contextlib.contextmanager
    def _pass_or_nothing(self) -> Iterator[None]:
        """For passes after whose failure or interruption nothing read ahead is kept."""
        try:
            yield
        except BaseException:
            self.decoder.abandon_pass()
            raise
