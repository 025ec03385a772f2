"""What answers have in common: usage, why they ended, and log-probabilities in OpenAI's forms."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from flashrt.engine.generation import Token
from flashrt.engine.logprobs import Logprobs
from flashrt.engine.report import Outcome
from flashrt.text.tokenizer import Tokenizer

COMPLETION_LISTS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
FINISH = {"eos": "stop", "stop": "stop", "length": "length"}


@dataclass
class Usage:
    """Tokens of a request: each prompt once, however many answers it gets."""

    prompt: int
    completion: int = 0
    cached: int = 0
    _counted: bool = field(default=False, repr=False)

    def add(self, report: Outcome | None, scored: bool = False) -> None:
        """`scored`: the prompt was computed before, for its log-probabilities."""
        if report is None:
            return
        self.completion += report.new_tokens
        if not self._counted:
            self.cached, self._counted = 0 if scored else report.resumed_tokens, True

    def to_json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


def finish_of(report: Outcome | None) -> str:
    return "length" if report is None else FINISH[report.finish_reason]


def spelled(tokenizer: Tokenizer, token: int) -> str:
    """A token as text; one that is no whole characters by its bytes, as OpenAI writes them."""
    data = tokenizer.token_bytes(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def characters(tokenizer: Tokenizer, token: int) -> int:
    """How many characters of the text begin in a token: one that is in two tokens begins in the first."""
    return sum(byte & 0xC0 != 0x80 for byte in tokenizer.token_bytes(token))


def chat_logprob(tokenizer: Tokenizer, token: Token) -> dict[str, Any]:
    """An entry of `logprobs.content`."""
    assert token.logprobs is not None
    entry = _entry(tokenizer, token.id, token.logprobs.logprob)
    return entry | {"top_logprobs": [_entry(tokenizer, other, value) for other, value in token.logprobs.top]}


def _entry(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    return {"token": spelled(tokenizer, token), "logprob": logprob, "bytes": list(tokenizer.token_bytes(token))}


class CompletionLogprobs:
    """The four lists of /v1/completions, of tokens that come one by one from `offset` characters on."""

    def __init__(self, tokenizer: Tokenizer, offset: int = 0) -> None:
        self._tokenizer, self._offset = tokenizer, offset
        self.clear()

    def clear(self) -> None:
        self._lists: dict[str, list[Any]] = {name: [] for name in COMPLETION_LISTS}

    def add(self, token: int, logprobs: Logprobs | None) -> None:
        """`logprobs`: None for the first token of a prompt."""
        text, lists = spelled(self._tokenizer, token), self._lists
        lists["tokens"].append(text)
        lists["text_offset"].append(max(self._offset, 0))
        lists["token_logprobs"].append(logprobs and logprobs.logprob)
        self._offset += characters(self._tokenizer, token)
        top = None
        if logprobs is not None:
            top = {spelled(self._tokenizer, other): value for other, value in reversed(logprobs.top)}
            top = {text: logprobs.logprob} | top if text not in top else top
        lists["top_logprobs"].append(top)

    def to_json(self) -> dict[str, Any]:
        """What was added since the last `clear`."""
        return dict(self._lists)
