"""The engine: a loaded model that generates and scores text under a plan."""

from __future__ import annotations

import contextlib
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from flashrt.budget.plan import Plan
from flashrt.config import Sampling, whole
from flashrt.engine.ahead import AheadModel
from flashrt.engine.async_generation import AsyncGeneration, Options
from flashrt.engine.generation import Generation
from flashrt.engine.grammar import Grammar
from flashrt.engine.logprobs import Logprobs
from flashrt.engine.options import checked_path
from flashrt.engine.prefixes import Prefixes
from flashrt.engine.recommended import recommended
from flashrt.engine.request import (
    Request,
    checked_fit,
    checked_flag,
    checked_ids,
    checked_limit,
    checked_sampling,
    checked_stops,
    checked_top,
)
from flashrt.engine.runner import Runner
from flashrt.engine.runtime import Runtime
from flashrt.engine.sampling import Sampler
from flashrt.engine.sequence import Sequence
from flashrt.engine.sessions import Sessions, resumable
from flashrt.engine.turns import Turns
from flashrt.errors import SessionError, UsageError
from flashrt.kv.cache import KvCache
from flashrt.machine.disk import DiskRoof
from flashrt.model.decoder import Decoder
from flashrt.sparsity import Sparsity
from flashrt.spec import ModelSpec
from flashrt.storage.reader import Reader
from flashrt.storage.session_file import KvForm, Messages
from flashrt.text.tokenizer import Tokenizer
from flashrt_kernels.limits import NARROW_TOKENS

if TYPE_CHECKING:
    from typing_extensions import Unpack

Array = np.ndarray


class Engine:
    """A model ready to run; made by `flashrt.load`. Use it as a context manager, or call `close`.

    Requests run one at a time; what is resident stays so from one to the next. Threads may share an engine: while a
    request of one goes on, those of others wait (see `Turns`). Wherever weights are read, a failing disk raises
    DiskError, and a block that does not match its checksum PackError.
    """

    def __init__(
        self,
        decoder: Decoder,
        kv: KvCache,
        reader: Reader,
        plan: Plan,
        tokenizer: Tokenizer,
        runtime: Runtime,
        *,
        roof: DiskRoof | None = None,
        load_s: float = 0.0,
        drafting: Engine | None = None,
        others: Items[KvCache] = (),
    ) -> None:
        """For reports, `roof` is what the disk gives and `load_s` what loading took; `drafting` is closed with this.

        others: of sequences beside the engine's own; see `Batcher`
        """
        self.plan, self.tokenizer, self.runtime = plan, tokenizer, runtime
        self.reader = reader
        self.roof, self.load_s, self.drafting = roof, load_s, drafting
        self.ahead: AheadModel | None = None  # drafts, and is closed with this
        self.sequence, self.others = Sequence(kv), others
        self.turns = Turns()
        self._runner: Runner | None = Runner(decoder, plan)
        self._spec = decoder.spec
        self._sparsity = decoder.weights.pack.manifest.sparsity
        self._prefixes: Prefixes | None = None
        self._wait_s = 0.0
        self._ffn_counts: Counter[str] = Counter()  # once closed
        self._kv_counts: Counter[str] = Counter()  # once closed

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
    def runner(self) -> Runner:
        """What computes passes. Raises UsageError once the engine is closed."""
        if self._runner is None:
            raise UsageError("the engine is closed: load the model again")
        return self._runner

    @property
    def bytes_read(self) -> int:
        """Bytes read from disk so far, loading included."""
        return self.reader.bytes_read

    @property
    def wait_s(self) -> float:
        """Seconds that compute has waited for reads so far."""
        return self._wait_s if self._runner is None else self._runner.decoder.wait_s

    @property
    def sparsity(self) -> Sparsity | None:
        """What the calibrated pack leaves out, and at what loss; None in exact mode."""
        return self._sparsity

    def ffn_counts(self) -> Counter[str]:
        """What the feed-forward blocks have counted so far, by name; see `FfnKind.counts`."""
        return self._ffn_counts if self._runner is None else self._runner.decoder.ffns.counts()

    def kv_counts(self) -> Counter[str]:
        """What the cells of keys and values on disk have counted so far; see `RingPages.counts`."""
        pages = None if self._runner is None else self._runner.decoder.pages
        return self._kv_counts if pages is None else pages.counts()

    def ffn_figures(self, counts: Counter[str]) -> tuple[dict[str, Any], list[str]]:
        """Figures and remarks for a report; see `Ffns.figures`. Empty once closed."""
        if self._runner is None:
            return {}, []
        ffns = self._runner.decoder.ffns
        return (found := ffns.figures(counts)), ffns.remarks(found)

    def close(self) -> None:
        """Stop reading and free the memory, after the token that another thread may be computing.

        A generation that is going on ends here, and its report is there. What computes afterwards raises UsageError.
        Closing again does nothing.
        """
        with self.turns.stop():
            if self._runner is None:
                return
            if isinstance(self.turns.current, Generation):
                self.turns.current.close()
            self._runner.decoder.weights.stop_loading()
            self._runner.decoder.abandon_pass()
            for beside in (self.drafting, self.ahead):
                if beside is not None:
                    beside.close()
            self.reader.close()
            self.sequence.kv.close()
            decoder = self._runner.decoder
            self._wait_s, self._ffn_counts = decoder.wait_s, decoder.ffns.counts()
            self._kv_counts = self.kv_counts()
            self._runner = None
            self.sequence, self.others = Sequence(KvCache((), 0)), ()
            self.__dict__.pop("_sessions", None)

    def generate(
        self,
        prompt: str | Items[int],
        max_new_tokens: int | None = 128,
        sampling: Sampling | None = None,
        *,
        stop: str | Items[str] = (),
        ignore_eos: bool = False,
        reuse: bool = False,
        top_logprobs: int | None = None,
        cancelled: Callable[[], bool] = lambda: False,
        grammar: Grammar | None = None,
    ) -> Generation:
        """Continue a prompt. Returns at once: a `Generation` computes each token when it is asked for.

        prompt: text, to which the tokenizer adds the tokens that begin a text; or token ids, taken as they are
        max_new_tokens: tokens of the answer, at most; None goes on to the end of the context
        sampling: how tokens are chosen; None is greedy
        stop: texts before which to end
        ignore_eos: go on after a token that ends a text
        reuse: keep the keys and values of the beginning that the prompt shares with the sequence before it (a
            conversation), but for its last 17 tokens; where that one's prompt had them the text is the same, where its
            answer had them the same up to rounding
        top_logprobs: note the log-probability of each token, and of the 0 to 20 likeliest ones in its place
        cancelled: asked before each pass, of prompt or answer; once it is true the generation ends, 'interrupted'
        grammar: what the answer has to follow, up to a token that ends it; see `Grammars`

        Raises UsageError for an argument of a wrong type or out of range, for an empty prompt, for unknown ids, and
        where prompt and answer do not fit in the context. Asking for a token raises it once the engine is closed.
        """
        if isinstance(prompt, str) and not prompt:
            raise UsageError("the prompt is empty: give at least one character")
        ids = checked_ids(self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt, self.spec.vocab)
        limit = checked_limit(max_new_tokens, len(ids), self.plan.context)
        stop_ids: frozenset[int] = frozenset(() if checked_flag("ignore_eos", ignore_eos) else self.spec.eos)
        stops, reuse = checked_stops(stop), checked_flag("reuse", reuse)
        choice, top = checked_sampling(sampling, self.spec.vocab), checked_top(top_logprobs)
        if grammar is not None and ignore_eos:
            raise UsageError("ignore_eos goes on behind the end of a text, where a grammar allows nothing")
        return Generation(self, Request(ids, limit, choice, stops, stop_ids, reuse, top, cancelled, grammar))

    def chat(
        self,
        messages: Messages,
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
        **options: Unpack[Options],
    ) -> Generation:
        """Answer a conversation, written as the model's chat template writes it. Returns as `generate` does.

        messages: each a `role` ('system', 'user', 'assistant') and a `content`; what they spell of special tokens
            stays text
        sampling: None is what the model's authors recommend
        options: as `generate` takes them, but that `reuse` is on: what conversations share is not computed again

        Raises UsageError for a base model, which has no template, for messages that the template rejects, and as
        `generate` does; CheckpointError for a template that fails; PackError for a recommendation that makes no sense.
        """
        from flashrt.text.conversation import encode_conversation

        if sampling is None:
            sampling = Sampling(**recommended(self.tokenizer.text.generation, {}))  # type: ignore[arg-type]
        ids = encode_conversation(self.tokenizer, self.tokenizer.chat_template, messages)
        kept: Options = {"reuse": True}
        kept.update(options)
        return self.generate(ids, max_new_tokens, sampling, **kept)

    def agenerate(
        self,
        prompt: str | Items[int],
        max_new_tokens: int | None = 128,
        sampling: Sampling | None = None,
        **options: Unpack[Options],
    ) -> AsyncGeneration:
        """`generate` for `async for`: tokens are computed in a thread of their own, and the event loop goes on."""
        return AsyncGeneration(lambda **more: self.generate(prompt, max_new_tokens, sampling, **more), options)

    def achat(
        self,
        messages: Messages,
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
        **options: Unpack[Options],
    ) -> AsyncGeneration:
        """`chat` for `async for`; see `agenerate`."""
        return AsyncGeneration(lambda **more: self.chat(messages, max_new_tokens, sampling, **more), options)

    def begin(self, request: Request) -> Sequence:
        """The sequence of a request that begins: without `reuse`, with what a directory of sessions has of it."""
        sparse = self.runner.decoder.sparse
        if not request.reuse:
            self.sequence.rewind(0)
        if sparse is not None:
            sparse.restart()
        sampler = Sampler(request.sampling, request.prompt, request.top_logprobs, request.grammar)
        self.sequence = self.sequence.successor(sampler)
        self.sequence.keep_shared(request.prompt[:-NARROW_TOKENS])  # the rest makes a wide pass
        if self._prefixes is not None:
            self._prefixes.resume(self.sequence, request.prompt)
        return self.sequence

    def finish(self) -> None:
        """The current request is over."""
        if self._prefixes is not None:
            self.sequence.settle()
            if self.sequence.length:
                self._prefixes.save(self.sequence)

    def keep_sessions(self, folder: Path, limit: int) -> None:
        """From now on keep what requests compute in `folder`, `limit` bytes of it, and begin from what is there.

        Raises UsageError where nothing can be kept there, and on a GPU.
        """
        self._prefixes = Prefixes(folder, limit, self._sessions)

    def save(self, path: str | Path, messages: Messages | None = None) -> None:
        """Save the sequence, its keys and values to a file, in place of one that is there, from which `resume` goes on.

        messages: of a conversation, each a `role` and a `content`; `resume` gives them back

        Raises DiskError, with what was there untouched; UsageError where nothing was computed yet, on a GPU, and once
        the engine is closed.
        """
        with self.turns.using(None):
            sessions = self._sessions
            self.sequence.settle()
            if self.sequence.length == 0:
                raise UsageError("there is nothing to save: generate something first")
            sessions.save(self.sequence, checked_path("the session", path), messages=messages)

    def resume(self, path: str | Path, prompt: Items[int] | None = None) -> Messages | None:
        """Go on from a session that `save` wrote: its sequence takes the place of the engine's. Returns its messages.

        A request with `reuse` then computes only what the session does not begin with. Given the token ids of its
        `prompt`, no more is read than it shares with the session, its last 17 tokens left out, and no more has to fit
        in the context: where the session has these of a prompt too, the text is the one that there is without it.

        Raises SessionError for a file that is missing, damaged, or of another pack, version or form of keys and values,
        and DiskError when reading it fails: the engine can be used then, with the sequence that it had or an empty one.
        Raises UsageError as `save` does, and where the session does not fit in the context.
        """
        with self.turns.using(None):
            sessions = self._sessions
            self.turns.begin(None)
            with sessions.open(checked_path("the session", path)) as file:
                if file.session.extent.begin:
                    raise SessionError(f"{path} is a part of a session, kept by --session-dir: name that directory")
                tokens, extent = resumable(self.sequence, file.session, prompt), file.session.extent
                marks = [mark for mark in extent.marks if mark <= len(tokens)]
                sessions.restore(self.sequence, [file], tokens, extent.top, marks)
                return file.session.messages

    @functools.cached_property
    def _sessions(self) -> Sessions:
        if not self.runtime.bounds_process:
            raise UsageError("sessions are saved from the CPU only: use --device cpu")
        pack, plan = self.runner.decoder.weights.pack, self.plan
        choice = None if plan.kv is None else plan.kv.digest()
        form = KvForm(pack.manifest.hash, self.spec, plan.kv_codec, plan.context, choice, pack.fewer_experts)
        return Sessions(form, self.reader)

    def prefill(self, ids: Items[int]) -> Array:
        """Logits of what follows `ids`, float32 [vocab], for those who choose tokens in their own way.

        Keys and values of the beginning that `ids` share with the sequence before are used again. The array is valid
        until the next call. Raises UsageError for no ids, unknown ones, and as many as the context has or more.
        """
        ids = checked_ids(ids, self.spec.vocab)
        checked_limit(None, len(ids), self.plan.context)
        with self.turns.using(None):
            self.turns.begin(None)
            return self.runner.prefill(self.sequence, ids)

    def logits(self, ids: Items[int]) -> Iterator[Array]:
        """Logits after each of `ids` in order, float32 [n, vocab], a few at a time; each is valid until the next.

        Raises UsageError for no ids, unknown ones, and more than the context holds.
        """
        ids = checked_ids(ids, self.spec.vocab)
        if not ids:
            raise UsageError("the text is empty: give at least one token")
        checked_fit(len(ids), self.plan.context)
        with self.turns.using(None):
            self.turns.begin(None)
            yield from self.runner.logits(self.sequence, ids, self._scores_wide(len(ids)))

    def prompt_logprobs(
        self, ids: Items[int], top: int = 0, cancelled: Callable[[], bool] = lambda: False
    ) -> list[Logprobs]:
        """Log-probabilities of `ids`, the first left out, which nothing comes before; `top` tokens beside each.

        They are those of the kernels that prefill. A request with `reuse` goes on from what is computed here. Once
        `cancelled` is true, no other pass begins, and those are returned that are there.

        Needs a plan made for scoring (`Workload.scoring`). Raises UsageError without one, for unknown ids, for more
        than the context holds, and once the engine is closed.
        """
        runner = self._scorer
        ids, top = checked_ids(ids, self.spec.vocab), checked_top(top) or 0
        checked_fit(len(ids), self.plan.context)
        found: list[Logprobs] = []
        with self.turns.using(None):
            self.turns.begin(None)
            with contextlib.closing(runner.scores(self.sequence, ids, self._scores_wide(len(ids)), top=top)) as passes:
                while not cancelled() and (scores := next(passes, None)) is not None:
                    for value, tokens, tops in zip(*scores, strict=True):
                        found.append(Logprobs(float(value), tuple(zip(tokens.tolist(), tops.tolist(), strict=True))))
        return found

    @property
    def _scorer(self) -> Runner:
        """Raises UsageError where the plan has no buffers for scores."""
        if not self.plan.scoring:
            raise UsageError("this engine was planned for generating: make a plan with Workload(scoring=True)")
        return self.runner

    def _scores_wide(self, count: int) -> bool:
        """Whether a text of `count` tokens is computed by the kernels for many: sparse attention is in the others."""
        return count > NARROW_TOKENS and self.plan.kv is None

    def score(
        self,
        ids: Items[int],
        window: int,
        progress: Callable[[int, int], None] = lambda done, total: None,
        as_decoded: bool = False,
    ) -> tuple[float, int]:
        """Perplexity of `ids` in consecutive windows of `window` tokens, and how many tokens were predicted.

        Every window starts afresh (with the model's BOS where it has one, which counts as one of its tokens); its
        first token is not predicted. `progress` is called after each window with the tokens done, and all. `as_decoded`
        computes with the kernels that decoding uses, which are slower on many tokens and round otherwise; with sparse
        attention, which only decoding uses, that is done in any case.

        Needs a plan made for scoring (`Workload.scoring`). Raises UsageError without one, for unknown ids, for fewer
        than two tokens, for a window that the plan does not hold, and once the engine is closed.
        """
        runner = self._scorer
        window = whole("the window", window, 2, self.plan.context)
        ids = checked_ids(ids, self.spec.vocab)
        prefix = self.tokenizer.encode("")
        step = window - len(prefix)
        if step < 1:
            raise UsageError(f"a window of {window} tokens has no room beside the {len(prefix)} that begin a text")
        total, count = 0.0, 0
        with self.turns.using(None):
            self.turns.begin(None)
            for begin in range(0, len(ids), step):
                part = [*prefix, *ids[begin : begin + step]]
                if len(part) > 1:
                    total += runner.score(self.sequence, part, self._scores_wide(len(part)) and not as_decoded)
                    count += len(part) - 1
                progress(min(begin + step, len(ids)), len(ids))
        if count == 0:
            raise UsageError("the text has fewer than two tokens: there is nothing to predict")
        return math.exp(-total / count), count
