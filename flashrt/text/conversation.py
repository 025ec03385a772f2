"""A conversation as tokens: what a template writes is recognised, what a message says stays text.

A message may hold the spelling of a special token, such as '<|im_end|>'. Read as that token it would end the message,
and what follows could pose as somebody else's. So before a template sees a text, each such spelling is replaced by two
characters that stand for nothing, and put back when the rendered text is cut into pieces.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flashrt.errors import UsageError
from flashrt.text.template import ChatTemplate
from flashrt.text.tokenizer import Tokenizer

_MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # noncharacters, which no text is meant to hold
_FIRST = 0xF0000  # a plane of private use: the character for the first special token


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a rendered conversation. `literal`: special tokens that it spells out stay text."""

    text: str
    literal: bool = False


def render_pieces(
    tokenizer: Tokenizer, template: ChatTemplate, messages: Sequence[Mapping[str, Any]], **variables: Any
) -> list[Piece]:
    """The prompt of a conversation, in pieces; `variables` (tools, say) are a client's as much as the messages.

    Raises what `ChatTemplate.render` raises, and UsageError for texts that cannot be kept apart from the template's.
    """
    names = tokenizer.special_texts
    mark, found = _Marks(names), [False]

    def marked(value: Any) -> Any:
        if isinstance(value, str):
            text = mark.hide(value)
            found[0] |= text != value
            return text
        if isinstance(value, Mapping):
            return {marked(key): marked(entry) for key, entry in value.items()}
        return [marked(entry) for entry in value] if isinstance(value, list | tuple) else value

    conversation, beside = marked(list(messages)), marked(variables)
    text = template.render(conversation, **beside)
    return list(mark.pieces(text)) if found[0] else [Piece(text)]


def encode_pieces(tokenizer: Tokenizer, pieces: Sequence[Piece]) -> list[int]:
    """Token ids. Raises UsageError for text that is not Unicode."""
    ids: list[int] = []
    for piece in pieces:
        ids += tokenizer.encode_literal(piece.text, not ids) if piece.literal else tokenizer.encode(piece.text, False)
    return ids


def encode_conversation(
    tokenizer: Tokenizer, template: ChatTemplate, messages: Sequence[Mapping[str, Any]], **variables: Any
) -> list[int]:
    """Token ids of the prompt of a conversation; see `render_pieces`."""
    return encode_pieces(tokenizer, render_pieces(tokenizer, template, messages, **variables))


class _Marks:
    """Hides spellings of special tokens, and brings them back."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = sorted(names, key=len, reverse=True)
        self._spelled = re.compile("|".join(map(re.escape, self._names)) or r"(?!)")
        self._mark = _MARKS[0]
        self._hidden = re.compile(f"{self._mark}(.)", re.DOTALL)

    def hide(self, text: str) -> str:
        """Raises UsageError for a text that holds the mark itself."""
        if self._mark in text:
            raise UsageError(f"a text holds U+{ord(self._mark):04X}, which stands for no character: leave it out")
        return self._spelled.sub(lambda found: self._mark + chr(_FIRST + self._names.index(found[0])), text)

    def pieces(self, text: str) -> Iterator[Piece]:
        """Runs between special tokens of the template are literal where something was hidden in them."""
        plain, begin = "", 0
        for end, after in [*(found.span() for found in self._spelled.finditer(text)), (len(text), len(text))]:
            run = text[begin:end]
            if self._mark in run:
                if plain:
                    yield Piece(plain)
                yield Piece(self._hidden.sub(self._shown, run), literal=True)
                plain = text[end:after]
            else:
                plain += text[begin:after]
            begin = after
        if plain:
            yield Piece(plain)

    def _shown(self, found: re.Match[str]) -> str:
        index = ord(found[1]) - _FIRST
        if not 0 <= index < len(self._names):
            raise UsageError("the chat template takes texts apart that spell out special tokens: leave these out")
        return self._names[index]
