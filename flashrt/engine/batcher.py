"""Computes many requests together: each in a place of its own, which the next one takes as soon as it is over.

A pass has one row for each answer that goes on, and fills up with rows of prompts. Which kernels compute a row never
depends on who else is there: rows of a prompt of more than 16 tokens are wide, all others narrow, as if the request
were alone (docs/design/sequences.md).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

import numpy as np

from flashrt.engine.answering import Answering, Finished, is_wide
from flashrt.engine.engine import Engine
from flashrt.engine.generation import Token
from flashrt.engine.request import Request
from flashrt.engine.sampling import Sampler
from flashrt.engine.sequence import Sequence
from flashrt.errors import UsageError
from flashrt.kv.copying import copies, copy_prefix
from flashrt.kv.marks import prompt_mark
from flashrt.model.batch import Batch, Rows
from flashrt.model.schedule import PassKind
from flashrt_kernels.limits import NARROW_TOKENS

Array = np.ndarray


@dataclass(slots=True)
class Place:
    """Memory of a sequence. `prompt`: of what it holds, the tokens that wide rows have computed."""

    sequence: Sequence
    prompt: list[int] = field(default_factory=list)
    answering: Answering | None = None


@dataclass(slots=True)
class Work:
    """What was computed so far."""

    passes: int = 0
    tokens: int = 0  # of answers
    prompt_tokens: int = 0  # that were computed
    copied_tokens: int = 0  # of prompts, that another one had
    rows: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Update:
    """What a pass gave a request; `finished` with its last tokens."""

    request: Request
    tokens: list[Token]
    finished: Finished | None


class Batcher:
    """Runs requests in the places that an engine's plan has (`Workload.sequences`). For one thread.

    What is submitted waits in its order. Reads that fail raise DiskError or PackError: then all is over.
    """

    def __init__(self, engine: Engine) -> None:
        """Raises UsageError for an engine whose rows are not independent, or whose keys and values stream."""
        self._engine, self._decoder, self._plan = engine, engine.runner.decoder, engine.plan
        if self._decoder.sparse is not None or self._plan.kv is not None or not engine.runtime.bounds_process:
            raise UsageError("requests are computed together in exact mode on the CPU only: leave --mode and --kv out")
        if self._plan.far is not None or self._plan.max_draft_tokens > 1:
            raise UsageError("requests that are computed together hold keys and values in memory, and draft nothing")
        self._places = [Place(Sequence(kv)) for kv in (engine.sequence.kv, *engine.others)]
        self._waiting: deque[Request] = deque()
        self._mixes, self._copies = self._decoder.ffns.mixes, copies(engine.sequence.kv)
        self.work = Work()

    @property
    def places(self) -> int:
        """Requests that are computed at a time."""
        return len(self._places)

    @property
    def busy(self) -> bool:
        """Whether anything is left to do."""
        return bool(self._waiting) or any(self._running())

    @property
    def free(self) -> int:
        """Places that nothing waits for."""
        return max(sum(place.answering is None for place in self._places) - len(self._waiting), 0)

    def submit(self, request: Request) -> None:
        self._waiting.append(request)

    def step(self) -> list[Update]:
        """Compute one pass; what each request got that is done with its prompt."""
        began = time.perf_counter()
        engine = self._engine
        with engine.turns.using(self):
            engine.turns.begin(self)
            updates = self._admit()
            if any(self._running()):
                updates += self._compute()
            if not self.busy:  # others may have the engine
                engine.turns.end(self)
        self.work.passes += 1
        self.work.seconds += time.perf_counter() - began
        return updates

    def _running(self) -> list[Answering]:
        return [place.answering for place in self._places if place.answering is not None]

    # Places

    def _admit(self) -> list[Update]:
        """Give free places to those that wait; those that nobody wants any more are over."""
        over = []
        for place in self._places:
            if place.answering is not None and place.answering.request.cancelled():
                over.append(Update(place.answering.request, [], self._leave(place, "interrupted")))
            while place.answering is None and self._waiting:
                request = self._waiting.popleft()
                if request.cancelled():
                    over.append(Update(request, [], Finished("interrupted", 0, 0)))
                else:
                    self._enter(place, request)
        return over

    def _enter(self, place: Place, request: Request) -> None:
        """Begin a request with what a place has of its prompt."""
        prompt = request.prompt
        sampler = Sampler(request.sampling, prompt, request.top_logprobs, request.grammar)
        place.sequence = place.sequence.successor(sampler)
        shareable = prompt[:-NARROW_TOKENS] if is_wide(prompt) else []
        best = max(self._places, key=lambda other: _shared(other.prompt, shareable)) if self._copies else place
        length = _shared(best.prompt, shareable)
        if best is not place and length > _shared(place.prompt, shareable):
            copy_prefix(best.sequence.kv, place.sequence.kv, length)
            place.sequence.restored(prompt[:length], length)
        else:
            place.sequence.rewind(min(_shared(place.prompt, shareable), place.sequence.length))
        place.prompt = prompt[: place.sequence.length]
        place.sequence.kv.mark(prompt_mark(len(prompt)))
        place.answering = Answering(request, place.sequence, self._engine.tokenizer)
        self.work.copied_tokens += place.sequence.length

    def _leave(self, place: Place, why: str | None = None) -> Finished:
        """A request is over; what its place holds stays for others with the same beginning."""
        answering = place.answering
        assert answering is not None
        answering.finish = why or answering.finish
        place.answering = None
        return answering.finished()

    # Passes

    def _compute(self) -> list[Update]:
        rows = self._choose()
        try:
            done, logits = self._forward(rows)
        except BaseException:
            self._decoder.abandon_pass()
            raise
        updates = []
        for place, values in zip(done, logits, strict=True):
            answering = place.answering
            assert answering is not None
            came = answering.take(answering.sampler.choose(values))
            self.work.tokens += 1
            finished = self._leave(place) if answering.finish is not None else None
            updates.append(Update(answering.request, came, finished))
        return updates

    def _choose(self) -> list[tuple[Place, list[int]]]:
        """The tokens that places have in the next pass, wide ones first.

        Every answer has its row; prompts have what is left, in the order of their places. Where a model's feed-forward
        blocks do not mix both kinds of rows, prompts go first.
        """
        wide: list[tuple[Place, list[int]]] = []
        narrow: list[tuple[Place, list[int]]] = []
        running = [place for place in self._places if place.answering is not None]
        decoding = [place for place in running if place.answering and place.answering.decodes]
        prompts = [place for place in running if place not in decoding]
        alone = not self._mixes and any(place.answering and place.answering.wide for place in prompts)
        if not alone:
            narrow = [(place, _left(place)) for place in decoding]
        room = self._plan.prefill_chunk - len(narrow)
        for place in prompts:
            assert place.answering is not None
            left = _left(place)
            if place.answering.wide and room:
                wide.append((place, left[:room]))
                room -= len(wide[-1][1])
            elif not place.answering.wide and len(left) <= room and not alone:
                narrow.append((place, left))
                room -= len(left)
        return wide + narrow

    def _forward(self, rows: list[tuple[Place, list[int]]]) -> tuple[list[Place], Array]:
        """Take in rows: the places that wait for nothing but their next token, and its logits, float32 [n, vocab]."""
        decoder, wide = self._decoder, sum(len(tokens) for place, tokens in rows if _is_wide(place))
        batch = Batch([Rows(place.sequence.kv, tokens) for place, tokens in rows], wide)
        done = [(own, place) for own, (place, tokens) in zip(_ends(rows), rows, strict=True) if tokens == _left(place)]
        soon = bool(done) or any(len(_left(place)) <= self._plan.prefill_chunk for place, _ in rows)
        decoder.begin_pass(PassKind(bool(done), wide > 0), PassKind(soon, True))
        states = decoder.forward(batch)
        for place, tokens in rows:
            self._extend(place, tokens)
        if not done:
            return [], np.empty((0, 0), np.float32)
        last = decoder.work.view("y", len(done), decoder.spec.hidden)
        for row, (end, _) in zip(last, done, strict=True):
            row[:] = states[end]
        return [place for _, place in done], np.asarray(decoder.device.get(decoder.logits(last)))

    def _extend(self, place: Place, tokens: Items[int]) -> None:
        answering = place.answering
        assert answering is not None
        place.sequence.extend(tokens)
        self.work.rows += len(tokens)
        if not answering.decodes:
            self.work.prompt_tokens += len(tokens)
        if _is_wide(place):
            place.prompt = place.prompt + list(tokens)


def _ends(rows: list[tuple[Place, list[int]]]) -> list[int]:
    """The last row of each place in a pass."""
    return [int(end) - 1 for end in np.cumsum([len(tokens) for _, tokens in rows])]


def _left(place: Place) -> list[int]:
    assert place.answering is not None
    return place.answering.left


def _is_wide(place: Place) -> bool:
    """Whether the next rows of a place are computed as many tokens."""
    answering = place.answering
    return answering is not None and answering.wide and not answering.decodes


def _shared(ours: Items[int], theirs: Items[int]) -> int:
    """How many tokens both begin with."""
    count = 0
    for one, other in zip(ours, theirs, strict=False):
        if one != other:
            break
        count += 1
    return count
