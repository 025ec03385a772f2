"""The engine: a loaded model that generates and scores text under a plan."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any

import numpy as np

from flashrt.budget.planner import Plan
from flashrt.budget.profile import DiskRoof
from flashrt.config import Sampling
from flashrt.engine.generation import Generation
from flashrt.engine.runtime import Runtime
from flashrt.errors import UsageError
from flashrt.model.decoder import Decoder
from flashrt.model.schedule import PassKind
from flashrt.sparsity import SINKS, Sparsity
from flashrt.spec import ModelSpec
from flashrt.storage.reader import Reader
from flashrt.text.tokenizer import Tokenizer
from flashrt_kernels.limits import NARROW_TOKENS

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
        self.plan, self.tokenizer, self.runtime = plan, tokenizer, runtime
        self.reader = reader
        self.roof: DiskRoof | None = None  # what the disk gives; for reports
        self.load_s = 0.0
        self.drafting: Engine | None = None  # of a smaller model, closed with this one
        self._decoder: Decoder | None = decoder
        self._spec = decoder.spec
        self._sparsity = decoder.weights.pack.manifest.sparsity
        self._wait_s = 0.0
        self._ffn_counts: Counter[str] = Counter()  # once closed
        self._cached: list[int] = []  # tokens whose keys and values are in the cache
        self._tree: list[int] = []  # tokens of the tree behind them
        self._current: Generation | None = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def spec(self) -> ModelSpec:
        return self._spec

    @property
    def decoder(self) -> Decoder:
        """Raises UsageError once the engine is closed."""
        if self._decoder is None:
            raise UsageError("the engine is closed: load the model again")
        return self._decoder

    @property
    def bytes_read(self) -> int:
        """Bytes read from disk so far, loading included."""
        return self.reader.bytes_read

    @property
    def wait_s(self) -> float:
        """Seconds that compute has waited for reads so far."""
        return self._wait_s if self._decoder is None else self._decoder.wait_s

    @property
    def sparsity(self) -> Sparsity | None:
        """How the model is thinned out; None in exact mode."""
        return self._sparsity

    def ffn_counts(self) -> Counter[str]:
        """What the feed-forward blocks have counted so far, by name; see `FfnKind.counts`."""
        return self._ffn_counts if self._decoder is None else self._decoder.ffns.counts()

    def ffn_figures(self, counts: Counter[str]) -> tuple[dict[str, Any], list[str]]:
        """Figures and remarks for a report; see `Ffns.figures`. Empty once closed."""
        if self._decoder is None:
            return {}, []
        ffns = self._decoder.ffns
        return (found := ffns.figures(counts)), ffns.remarks(found)

    def close(self) -> None:
        """Stop reading and free the memory. A generation that is going on ends here."""
        if self._decoder is None:
            return
        if self._current is not None:
            self._current.close()
        self._decoder.abandon_pass()
        if self.drafting is not None:
            self.drafting.close()
        self.reader.close()
        self._wait_s, self._ffn_counts = self._decoder.wait_s, self._decoder.ffns.counts()
        self._decoder = None

    def generate(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int | None = 128,
        sampling: Sampling | None = None,
        *,
        stop: str | Sequence[str] = (),
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
        stop_ids = set() if ignore_eos else set(self.spec.eos)
        stops = [stop] if isinstance(stop, str) else stop
        return Generation(self, ids, limit, sampling or Sampling(), stops, stop_ids, reuse)

    def begin(self, generation: Generation, reuse: bool) -> None:
        """Make `generation` the one that runs; without `reuse` it starts from an empty cache."""
        if not reuse:
            self.rewind(0)
        if self.decoder.sparse is not None:
            self.decoder.sparse.restart()
        self._current = generation

    def check_current(self, generation: Generation) -> None:
        """Raises UsageError when another generation has begun since: the cache is no longer this one's."""
        if self._current is not generation:
            raise UsageError("another generation has begun on this engine: finish one before starting the next")

    def score(
        self,
        ids: Sequence[int],
        window: int,
        progress: Callable[[int, int], None] = lambda done, total: None,
        as_decoded: bool = False,
    ) -> tuple[float, int]:
        """Perplexity of `ids` in consecutive windows of `window` tokens, and how many tokens were predicted.

        Every window starts afresh (with the model's BOS where it has one, which counts as one of its tokens); its
        first token is not predicted. `as_decoded` computes with the kernels that decoding uses, which are slower on
        many tokens and round otherwise. Needs a plan made for scoring.
        """
        if window < 2 or window > self.plan.context:
            raise UsageError(f"the window is {window} tokens, expected 2 to the context of {self.plan.context}")
        if not self.plan.scoring:
            raise UsageError("this engine was planned for generating: make a plan with Workload(scoring=True)")
        self._check_ids(ids)
        prefix = self.tokenizer.encode("")
        step = window - len(prefix)
        if step < 1:
            raise UsageError(f"a window of {window} tokens has no room beside the {len(prefix)} that begin a text")
        self._current = None
        total, count = 0.0, 0
        for begin in range(0, len(ids), step):
            part = [*prefix, *ids[begin : begin + step]]
            if len(part) > 1:
                total += self._score_window(part, wide=len(part) > NARROW_TOKENS and not as_decoded)
                count += len(part) - 1
            progress(min(begin + step, len(ids)), len(ids))
        if count == 0:
            raise UsageError("the text has fewer than two tokens: there is nothing to predict")
        return math.exp(-total / count), count

    def prefill(self, ids: Sequence[int]) -> Array:
        """Make the cache hold exactly `ids`; logits after the last one, float32 [vocab] on the host.

        Whether the kernels for few or for many tokens run depends on how many tokens are new, never on the budget.
        """
        self.rewind(min(_shared_length(self._cached, ids), len(ids) - 1))
        new = ids[self.decoder.kv.length :]
        wide, chunk = len(new) > NARROW_TOKENS, self.plan.prefill_chunk
        with self._pass_or_nothing() as decoder:
            for begin in range(0, len(new), chunk):
                last = begin + chunk >= len(new)
                decoder.begin_pass(
                    PassKind(last, wide), PassKind(last or begin + 2 * chunk >= len(new), wide and not last)
                )
                states = self._hidden(decoder, new[begin : begin + chunk], wide)
            return decoder.device.get(decoder.logits(states[-1:]))[0]

    def step(self, token: int) -> Array:
        """Append one token; logits after it, float32 [vocab] on the host."""
        return self.step_batch([token])[0]

    def step_batch(self, tokens: Sequence[int]) -> Array:
        """Append 1 to 16 tokens in one pass; logits after each, float32 [B, vocab] on the host.

        The plan's `logit_rows` bounds B. `rewind` takes tokens back.
        """
        return self._narrow(tokens)

    def step_tree(self, tokens: Sequence[int], parents: Sequence[int]) -> Array:
        """Compute 1 to 16 tokens in one pass, each after its own past; logits after each, float32 [B, vocab].

        Token i follows token parents[i] < i, or the sequence where that is -1; its logits are those that `step` would
        give there, bit for bit on the CPU. The sequence stays as it is until `commit` takes some of the tokens into it;
        the next pass forgets the others. The plan's `logit_rows` bounds B. Raises UsageError for what is no tree.
        """
        if len(parents) != len(tokens) or any(not -1 <= parent < i for i, parent in enumerate(parents)):
            raise UsageError(f"parents are {list(parents)}, expected -1 or an earlier token for each of {len(tokens)}")
        if self.decoder.sparse is not None and self.length < SINKS:
            raise UsageError(f"the sequence has {self.length} tokens, a tree in sparse mode needs {SINKS} before it")
        return self._narrow(tokens, parents)

    def draft(self, token: int, depth: int) -> Array:
        """Logits after `token`, which follows `depth` drafted ones, by resident neurons alone: float32 [vocab].

        For plans with `drafts`. Neither the sequence nor what streams is touched.
        """
        with self._pass_or_nothing() as decoder:
            return decoder.device.get(decoder.drafted(token, depth))[0]

    def commit(self, path: Sequence[int]) -> None:
        """Append tokens of the last `step_tree`, by their indices: a path from its beginning, possibly an empty one.

        Raises ValueError for what is no such path, and when another pass or `rewind` has come between.
        """
        self.decoder.kv.commit(path)
        self._cached.extend(self._tree[i] for i in path)

    def rewind(self, length: int) -> None:
        """Cut the sequence back to its first `length` tokens."""
        del self._cached[length:]
        self.decoder.kv.truncate(length)

    @property
    def most_positions(self) -> int:
        """Tokens that `step_tree` takes now, at most."""
        if self.decoder.sparse is not None and self.length < SINKS:
            return 1
        return min(self.plan.max_draft_tokens, self.plan.context - self.length)

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return self.decoder.kv.length

    @contextlib.contextmanager
    def _pass_or_nothing(self) -> Iterator[Decoder]:
        """The decoder, for passes after whose failure or interruption nothing read ahead is kept."""
        decoder = self.decoder
        try:
            yield decoder
        except BaseException:
            decoder.abandon_pass()
            raise

    def _narrow(self, tokens: Sequence[int], parents: Sequence[int] | None = None) -> Array:
        """Logits of a narrow pass, after each of its tokens."""
        most = min(NARROW_TOKENS, self.plan.logit_rows)
        if not 1 <= len(tokens) <= most:
            raise UsageError(f"a pass of {len(tokens)} tokens, expected 1 to {most}")
        with self._pass_or_nothing() as decoder:
            decoder.begin_pass(PassKind(head=True, wide=False), PassKind(head=True, wide=False))
            return decoder.device.get(decoder.logits(self._hidden(decoder, tokens, wide=False, parents=parents)))

    def _hidden(self, decoder: Decoder, tokens: Sequence[int], wide: bool, parents: Sequence[int] | None = None) -> Any:
        states = decoder.hidden(tokens, wide, parents)
        if parents is None:
            self._cached.extend(tokens)
        else:
            self._tree = list(tokens)
        return states

    def _check_ids(self, ids: Sequence[int]) -> None:
        if len(ids) and not (min(ids) >= 0 and max(ids) < self.spec.vocab):
            raise UsageError(
                f"the text has token ids outside 0 to {self.spec.vocab - 1}, which the model does not know"
            )

    def _limit(self, ids: Sequence[int], max_new_tokens: int | None) -> int:
        context = self.plan.context
        if not ids:
            raise UsageError("the prompt is empty: give at least one token")
        self._check_ids(ids)
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

    def _score_window(self, ids: Sequence[int], wide: bool) -> float:
        """Sum of the log-probabilities of all tokens of a window but the first."""
        self.rewind(0)
        chunk, total = self.plan.prefill_chunk, 0.0
        with self._pass_or_nothing() as decoder:
            for begin in range(0, len(ids) - 1, chunk):
                tokens = ids[begin : min(begin + chunk, len(ids) - 1)]
                decoder.begin_pass(PassKind(head=True, wide=wide), PassKind(head=True, wide=wide))
                states = self._hidden(decoder, tokens, wide)
                targets = np.asarray(ids[begin + 1 : begin + 1 + len(tokens)], np.int64)
                total += float(decoder.scores(states, targets, wide).sum())
        return total


def _shared_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading tokens two sequences share."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
