"""A request that is computed beside others: what of its prompt is still to come, its tokens, and its text."""

from __future__ import annotations

from dataclasses import dataclass

from flashrt.engine.generation import Token
from flashrt.engine.request import Request
from flashrt.engine.sampling import Sampler
from flashrt.engine.sequence import Sequence
from flashrt.engine.stops import StopStrings
from flashrt.text.tokenizer import Tokenizer
from flashrt_kernels.limits import NARROW_TOKENS


@dataclass(frozen=True, slots=True)
class Finished:
    """See `flashrt.engine.report.Outcome`."""

    finish_reason: str  # 'eos', 'stop', 'length' or 'interrupted'
    new_tokens: int
    resumed_tokens: int  # of the prompt, that another request had computed


class Answering:
    """`request` in the memory of `sequence`, whose beginning may hold some of its prompt already."""

    def __init__(self, request: Request, sequence: Sequence, tokenizer: Tokenizer) -> None:
        self.request, self.sequence = request, sequence
        self.resumed = sequence.length
        self.finish: str | None = None
        self._stream, self._stops = tokenizer.stream(), StopStrings(request.stop)
        self._ids: list[int] = []

    @property
    def wide(self) -> bool:
        """Whether the kernels for many tokens compute its prompt: as if it were alone, by its length."""
        return is_wide(self.request.prompt)

    @property
    def left(self) -> list[int]:
        """What is to be computed before its next token: of its prompt, or the last token."""
        return self.request.prompt[self.sequence.length :] if not self._ids else self._ids[-1:]

    @property
    def decodes(self) -> bool:
        """Whether its prompt is done."""
        return bool(self._ids)

    @property
    def sampler(self) -> Sampler:
        return self.sequence.sampler

    def finished(self) -> Finished:
        assert self.finish is not None
        return Finished(self.finish, len(self._ids), self.resumed)

    def take(self, token: int) -> list[Token]:
        """What the next token makes readable; sets `finish` where it is the last."""
        request = self.request
        self._ids.append(token)
        noted = self.sampler.logprobs.popleft() if request.top_logprobs is not None else None
        if token in request.stop_ids:
            self.finish = "eos"
            return self._rest()
        piece = self._stops.push(self._stream.push(token))
        if self._stops.found:
            self.finish = "stop"
        elif len(self._ids) == request.limit:
            self.finish = "length"
        came = [Token(token, piece, noted)]
        return came if self.finish is None else came + self._rest()

    def _rest(self) -> list[Token]:
        """What was held back of the text."""
        rest = self._stops.flush(self._stream.flush())
        return [Token(self._ids[-1], rest)] if rest else []


def is_wide(prompt: list[int]) -> bool:
    """Whether the kernels for many tokens compute a prompt."""
    return len(prompt) > NARROW_TOKENS
