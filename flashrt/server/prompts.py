"""From what a request holds to tokens, in bounded memory. For one thread at a time."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flashrt.engine.request import checked_ids
from flashrt.errors import CheckpointError, UsageError
from flashrt.server.errors import ApiError, invalid, too_long
from flashrt.text.conversation import Piece, encode_pieces, render_pieces
from flashrt.text.template import ChatTemplate
from flashrt.text.tokenizer import Tokenizer

WINDOW = 4096  # characters that are counted at a time, of a text that may be far too long
SPARE = 16  # tokens that cutting a text there adds, at most
SHORT = 2  # bytes a token of context: a text of no more is encoded as it is


class Prompts:
    """Of a model that is planned for `context` tokens. `template`: None for a base model."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None, vocab: int, context: int) -> None:
        self.tokenizer, self.template, self.vocab, self.context = tokenizer, template, vocab, context

    def text(self, prompt: str) -> array[int]:
        """Tokens of a text to go on with, and those that begin a text. Raises ApiError."""
        self._check_length([Piece(prompt)])
        return array("i", _named("prompt", lambda: self.tokenizer.encode(prompt)))

    def ids(self, prompt: Sequence[Any]) -> array[int]:
        """Tokens as they are. Raises ApiError."""
        return array("i", _named("prompt", lambda: checked_ids(prompt, self.vocab)))

    def conversation(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> array[int]:
        """Tokens of the prompt of a conversation. Raises ApiError."""
        template = self.template
        if template is None:
            raise ApiError(
                400, "the model has no chat template (it is a base model): use /v1/completions", param="model"
            )
        try:
            pieces = _named("messages", lambda: render_pieces(self.tokenizer, template, messages, **variables))
        except CheckpointError as error:
            raise ApiError(400, f"these messages: {error}", param="messages") from None
        self._check_length(pieces)
        return array("i", _named("messages", lambda: encode_pieces(self.tokenizer, pieces)))

    def limit(self, prompt: Sequence[int], asked: int | None, name: str) -> int:
        """How many tokens may follow `prompt`; `name` is the parameter that says so. Raises ApiError."""
        count, context = len(prompt), self.context
        if not count:
            raise invalid("prompt", "the prompt is empty: give at least one token")
        if asked is not None and asked < 0:
            raise invalid(name, f"{name} is {asked}, expected 0 or more")
        if count >= context and asked != 0:
            raise too_long(f"the prompt has {count} tokens, the context is {context}: shorten it")
        new = context - count if asked is None else asked
        if count + new > context:
            raise too_long(
                f"{count} prompt tokens and {new} new ones do not fit in the context of {context}: "
                f"ask for {name} of {max(context - count, 0)} or less"
            )
        return new

    def _check_length(self, pieces: Sequence[Piece]) -> None:
        """Refuse what is far too long before it is encoded as a whole, which takes memory."""
        if sum(len(piece.text.encode("utf-8", "replace")) for piece in pieces) <= SHORT * self.context:
            return
        found = 0
        for count, window in enumerate(_windows(pieces), 1):
            found += len(_named("prompt", lambda text=window: self.tokenizer.encode(text, special=False)))
            if found > self.context + SPARE * count:
                raise too_long(f"the prompt has more than {self.context} tokens, which is the context: shorten it")


def _windows(pieces: Sequence[Piece]) -> Iterator[str]:
    for piece in pieces:
        for begin in range(0, len(piece.text), WINDOW):
            yield piece.text[begin : begin + WINDOW]


def _named(param: str, make: Any) -> Any:
    """What `make` returns; what is wrong with the request names a parameter."""
    try:
        return make()
    except UsageError as error:
        raise invalid(param, str(error)) from None
    except RecursionError:
        raise invalid(param, "the request is nested too deeply") from None
