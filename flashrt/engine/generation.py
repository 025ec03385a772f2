"""One generation: an iterator of tokens, and the report at its end."""

from __future__ import annotations

import contextlib
import inspect
import time
from collections import Counter, deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from flashrt.budget.plan import Plan
from flashrt.engine.ahead import AheadModel
from flashrt.engine.decode_loop import DecodeLoop
from flashrt.engine.drafters import drafters_of
from flashrt.engine.logprobs import Logprobs
from flashrt.engine.report import Report
from flashrt.engine.request import Request
from flashrt.engine.runner import Runner
from flashrt.engine.runtime import Runtime
from flashrt.engine.sequence import Sequence
from flashrt.engine.stops import StopStrings
from flashrt.engine.turns import Turns
from flashrt.errors import UsageError
from flashrt.kv.figures import kv_figures, kv_remarks
from flashrt.machine.disk import DiskRoof
from flashrt.machine.process import peak_resident_bytes
from flashrt.sparsity import Sparsity
from flashrt.text.tokenizer import Tokenizer


class Host(Protocol):
    """What a generation needs of its engine: who computes, on what sequence, and figures; see `Engine`."""

    plan: Plan
    tokenizer: Tokenizer
    runtime: Runtime
    turns: Turns
    sequence: Sequence
    roof: DiskRoof | None
    load_s: float
    ahead: AheadModel | None

    @property
    def runner(self) -> Runner: ...
    @property
    def drafting(self) -> Host | None: ...
    @property
    def sparsity(self) -> Sparsity | None: ...
    @property
    def bytes_read(self) -> int: ...
    @property
    def wait_s(self) -> float: ...
    def kv_counts(self) -> Counter[str]: ...
    def ffn_counts(self) -> Counter[str]: ...
    def ffn_figures(self, counts: Counter[str]) -> tuple[dict[str, Any], list[str]]: ...
    def begin(self, request: Request) -> Sequence: ...
    def finish(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Token:
    """A generated token. `text` is what it makes readable: it may be empty, or hold earlier tokens' characters.

    logprobs: where these were asked for; what was held back of a text comes last, with the last token and without them
    """

    id: int
    text: str
    logprobs: Logprobs | None = None


@dataclass(slots=True)
class _Phase:
    """What a part of a generation took: time inside flashrt (not the caller's), bytes read, time waiting for reads.

    `ffn` holds what the feed-forward blocks counted meanwhile, `kv` what keys and values on disk did.
    """

    seconds: float = 0.0
    bytes_read: int = 0
    wait_s: float = 0.0
    ffn: Counter[str] = field(default_factory=Counter)
    kv: Counter[str] = field(default_factory=Counter)


class Generation:
    """Yields tokens as they come. After the last one, or after `close`, `report` holds the figures.

    Nothing runs before the first token is asked for. An engine serves one generation at a time: going on with one after
    another has begun raises UsageError; asking for a token waits while another thread's generation goes on. A read that
    fails raises DiskError, a damaged pack PackError: the generation is then over, and its report is there.
    """

    def __init__(self, engine: Host, request: Request) -> None:
        self._engine, self._request = engine, request
        self._stops = StopStrings(request.stop)
        self._ids: list[int] = []
        self._text: list[str] = []
        self._prefill, self._decode = _Phase(), _Phase()
        self._passes: DecodeLoop | None = None
        self._finish = "interrupted"
        self._resumed = 0
        self._report: Report | None = None
        self._tokens = self._run()

    def __iter__(self) -> Iterator[Token]:
        return self

    def __next__(self) -> Token:
        with self._engine.turns.using(self):
            return next(self._tokens)

    def close(self) -> None:
        """Stop early; after the token that another thread may be computing."""
        with self._engine.turns.stop():
            # A signal handler, say, may strike in the middle.
            if inspect.getgeneratorstate(self._tokens) == inspect.GEN_RUNNING:
                raise UsageError("a token is being computed: close the generation, or the engine, once it is there")
            self._tokens.close()
            self._end()

    @property
    def report(self) -> Report:
        """The figures. Raises RuntimeError while the generation is going on."""
        if self._report is None:
            raise RuntimeError("the generation is not over: exhaust or close it before reading its report")
        return self._report

    def _run(self) -> Generator[Token, None, None]:
        engine, request = self._engine, self._request
        stream = engine.tokenizer.stream()
        try:
            with self._measured(self._prefill):
                engine.turns.begin(self)
                sequence = engine.begin(request)
                self._resumed = sequence.length
                logits = engine.runner.prefill(sequence, request.prompt, self._check)
                token = sequence.sampler.choose(logits)
            ahead: deque[int] = deque()  # tokens that the last pass gave, and that are not handed out yet
            while True:
                self._ids.append(token)
                logprobs = sequence.sampler.logprobs.popleft() if request.top_logprobs is not None else None
                if token in request.stop_ids:
                    self._finish = "eos"
                    break
                piece = self._stops.push(stream.push(token))
                self._text.append(piece)
                yield Token(token, piece, logprobs)
                if self._stops.found:
                    self._finish = "stop"
                    break
                if len(self._ids) == request.limit:
                    self._finish = "length"
                    break
                engine.turns.check(self)
                self._check()
                if not ahead:
                    with self._measured(self._decode):
                        ahead.extend(self._next(sequence, token))
                token = ahead.popleft()
            rest = self._stops.flush(stream.flush())
            if rest:
                self._text.append(rest)
                yield Token(self._ids[-1], rest)
        except _Cancelled:
            pass
        finally:
            self._end()

    def _check(self) -> None:
        if self._request.cancelled():
            raise _Cancelled

    def _next(self, sequence: Sequence, token: int) -> list[int]:
        """What comes after `token`, the last so far."""
        engine, request = self._engine, self._request
        if self._passes is None:
            smaller = engine.drafting
            drafting = None if smaller is None else (smaller.runner, smaller.sequence)
            drafters = drafters_of(engine.runner, sequence, drafting, engine.ahead)
            self._passes = DecodeLoop(engine.runner, sequence, drafters, [*request.prompt, token])
        return self._passes.next(request.limit - len(self._ids), request.stop_ids)

    @contextlib.contextmanager
    def _measured(self, phase: _Phase) -> Iterator[None]:
        engine = self._engine
        began, read, wait_s = time.perf_counter(), engine.bytes_read, engine.wait_s
        counts, kv = engine.ffn_counts(), engine.kv_counts()
        try:
            yield
        finally:
            phase.seconds += time.perf_counter() - began
            phase.bytes_read += engine.bytes_read - read
            phase.wait_s += engine.wait_s - wait_s
            phase.ffn += engine.ffn_counts() - counts
            phase.kv += engine.kv_counts() - kv

    def _end(self) -> None:
        last = self._engine.turns.current is self  # none has begun since
        self._engine.turns.end(self)
        if self._report is None:
            self._report = self._make_report()
        self._passes = None  # it holds the runner, and so the weights
        if last:
            self._engine.finish()

    def _make_report(self) -> Report:
        engine, prefill, decode = self._engine, self._prefill, self._decode
        passes = self._passes if self._passes and self._passes.count else None
        decoded = max(len(self._ids) - 1, 0)
        wait_s = prefill.wait_s + decode.wait_s
        count = passes.count if passes else 0
        streams = count > 0 and decode.bytes_read >= count * max(engine.plan.slot_bytes, 1)
        rate = decode.bytes_read / decode.seconds if streams else None
        ffn, remarks = engine.ffn_figures(decode.ffn)
        return Report(
            text="".join(self._text),
            token_ids=self._ids,
            finish_reason=self._finish,
            prompt_tokens=len(self._request.prompt),
            resumed_tokens=self._resumed,
            new_tokens=len(self._ids),
            load_s=engine.load_s,
            ttft_s=prefill.seconds,
            decode_s=decode.seconds,
            decode_tok_per_s=decoded / decode.seconds if decoded else None,
            peak_rss_bytes=peak_resident_bytes(),
            device_peak_bytes=engine.runtime.peak_bytes(),
            budget_bytes=engine.plan.budget_bytes,
            bytes_read_total=prefill.bytes_read + decode.bytes_read,
            bytes_read_per_token=decode.bytes_read / decoded if decoded else 0.0,
            io_wait_s=wait_s,
            compute_s=prefill.seconds + decode.seconds - wait_s,
            disk_bytes_per_s=rate,
            disk_roofline_share=engine.roof.share(rate) if rate and engine.roof else None,
            mode="exact" if engine.sparsity is None else "sparse",
            loss=engine.sparsity.max_loss if engine.sparsity else None,
            kv_keep=engine.plan.kv.keep if engine.plan.kv else None,
            kv_loss=engine.plan.kv.loss if engine.plan.kv else None,
            tokens_per_pass=passes.tokens / passes.count if passes else None,
            positions_per_pass=passes.positions / passes.count if passes else None,
            acceptance=passes.acceptance() if passes and engine.plan.max_draft_tokens > 1 else None,
            draft_s=passes.draft_s if passes else 0.0,
            verify_s=passes.verify_s if passes else 0.0,
            plan=engine.plan.to_json(),
            kv=kv_figures(decode.kv),
            ffn=ffn,
            remarks=[*remarks, *kv_remarks(engine.plan.kv, decode.kv)],
        )


class _Cancelled(Exception):
    """Whoever asked for a generation wants no more of it."""
