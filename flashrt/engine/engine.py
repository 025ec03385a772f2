"""The engine: a loaded model that generates and scores text under a plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import numpy as np

from flashrt.budget.planner import Plan
from flashrt.config import Sampling
from flashrt.engine.generation import Generation
from flashrt.engine.runtime import Runtime
from flashrt.errors import UsageError
from flashrt.model.decoder import NARROW, Decoder
from flashrt.spec import ModelSpec
from flashrt.storage.reader import Reader
from flashrt.text.tokenizer import Tokenizer

Array = np.ndarray


class Engine:
    """A model ready to run; made by `flashrt.load`. Use it as a context manager, or call `close`.

    Requests run one at a time; what is resident stays so from one to the next.
    """

    def __init__(
        self,
        decoder: Decoder,
        reader: Reader,
        plan: Plan,
        tokenizer: Tokenizer,
        runtime: Runtime,
    ) -> None:
        self.decoder, self.reader, self.plan, self.tokenizer = decoder, reader, plan, tokenizer
        self.runtime, self.weights = runtime, decoder.weights
        self.disk_rate: float | None = None  # bytes per second that the disk gives; for reports
        self.load_s = 0.0
        self._cached: list[int] = []  # tokens whose keys and values are in the cache

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def spec(self) -> ModelSpec:
        return self.decoder.spec

    def close(self) -> None:
        """Stop reading and free the memory."""
        self.weights.abandon_pass()
        self.reader.close()

    def generate(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int | None = 128,
        sampling: Sampling | None = None,
        *,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        reuse: bool = False,
    ) -> Generation:
        """Continue `prompt`: text, or token ids taken as they are.

        max_new_tokens None goes on to the end of the context. `reuse` keeps the keys and values of the beginning that
        the prompt shares with the sequence before it (a conversation). Raises UsageError for an empty prompt, for
        unknown ids and for a prompt that does not fit in the context.
        """
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else [int(i) for i in prompt]
        limit = self._limit(ids, max_new_tokens)
        if not reuse:
            self._forget(0)
        stop_ids = set() if ignore_eos else set(self.spec.eos)
        return Generation(self, ids, limit, sampling or Sampling(), stop, stop_ids)

    def score(
        self, ids: Sequence[int], window: int, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> tuple[float, int]:
        """Perplexity of `ids` in consecutive windows of `window` tokens, and how many tokens were predicted.

        Every window starts afresh (with the model's BOS where it has one, which counts as one of its tokens); its
        first token is not predicted. Needs a plan made for scoring.
        """
        if window < 2 or window > self.plan.context:
            raise UsageError(f"the window is {window} tokens, expected 2 to the context of {self.plan.context}")
        prefix = self.tokenizer.encode("")
        step = window - len(prefix)
        windows = [prefix + list(ids[i : i + step]) for i in range(0, len(ids), step)]
        total, count = 0.0, 0
        for done, part in enumerate(windows):
            if len(part) > 1:
                total += self._score_window(part)
                count += len(part) - 1
            progress(done + 1, len(windows))
        if count == 0:
            raise UsageError("the text has fewer than two tokens: there is nothing to predict")
        return math.exp(-total / count), count

    def prefill(self, ids: Sequence[int]) -> Array:
        """Make the cache hold exactly `ids`; logits after the last one, float32 [vocab] on the host.

        Whether the kernels for few or for many tokens run depends on how many tokens are new, never on the budget.
        """
        self._forget(min(_shared_length(self._cached, ids), len(ids) - 1))
        new = ids[self.decoder.kv.length :]
        wide, chunk = len(new) > NARROW, self.plan.chunk
        for begin in range(0, len(new), chunk):
            last = begin + chunk >= len(new)
            self.weights.begin_pass(head=last, next_head=last or begin + 2 * chunk >= len(new))
            states = self._pass(new[begin : begin + chunk], wide)
        return self._logits(states)[0]

    def step(self, token: int) -> Array:
        """Append one token; logits after it, float32 [vocab] on the host."""
        return self.step_batch([token])[0]

    def step_batch(self, tokens: Sequence[int]) -> Array:
        """Append 1 to 16 tokens in one pass; logits after each, float32 [B, vocab] on the host.

        The plan's `logit_rows` bounds B. `rewind` takes tokens back.
        """
        if not 1 <= len(tokens) <= min(NARROW, self.plan.logit_rows):
            raise UsageError(f"a pass of {len(tokens)} tokens, expected 1 to {min(NARROW, self.plan.logit_rows)}")
        self.weights.begin_pass(head=True, next_head=True)
        return self._logits(self._pass(tokens, wide=False))

    def rewind(self, length: int) -> None:
        """Cut the sequence back to its first `length` tokens."""
        self._forget(length)

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return self.decoder.kv.length

    def _pass(self, tokens: Sequence[int], wide: bool) -> Any:
        states = self.decoder.hidden(tokens, wide)
        self._cached.extend(tokens)
        return states

    def _logits(self, states: Any) -> Array:
        rows = states[-self.plan.logit_rows :]
        return self.decoder.device.get(self.decoder.logits(rows[-1:] if len(states) > NARROW else rows))

    def _forget(self, length: int) -> None:
        self.decoder.kv.truncate(length)
        del self._cached[length:]

    def _limit(self, ids: Sequence[int], max_new_tokens: int | None) -> int:
        context = self.plan.context
        if not ids:
            raise UsageError("the prompt is empty: give at least one token")
        if min(ids) < 0 or max(ids) >= self.spec.vocab:
            raise UsageError(f"the prompt has token ids outside 0 to {self.spec.vocab - 1}")
        if len(ids) >= context:
            raise UsageError(
                f"the prompt has {len(ids)} tokens, the context is {context}: "
                "use a shorter prompt or a larger --context"
            )
        if max_new_tokens is None:
            return context - len(ids)
        if max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {max_new_tokens}, expected 1 or more")
        if len(ids) + max_new_tokens > context:
            raise UsageError(
                f"{len(ids)} prompt tokens and {max_new_tokens} new ones do not fit in the context of {context}: "
                "ask for fewer, or for a larger --context"
            )
        return max_new_tokens

    def _score_window(self, ids: Sequence[int]) -> float:
        """Sum of the log-probabilities of all tokens of a window but the first."""
        self._forget(0)
        wide, chunk, total = len(ids) > NARROW, self.plan.chunk, 0.0
        for begin in range(0, len(ids) - 1, chunk):
            tokens = ids[begin : min(begin + chunk, len(ids) - 1)]
            self.weights.begin_pass(head=True, next_head=True)
            states = self._pass(tokens, wide)
            targets = np.asarray(ids[begin + 1 : begin + 1 + len(tokens)], np.int64)
            total += float(self.decoder.scores(states, targets, wide).sum())
        return total


def _shared_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading tokens two sequences share."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
