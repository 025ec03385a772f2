"""The beginning of a text, as tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flashrt.text.tokenizer import Tokenizer

TOKEN_CHARACTERS = 8  # more than tokens of ordinary text have on average
CUT_TOKENS = 64  # the last tokens before a cut may differ from those of the whole text


def first_ids(tokenizer: Tokenizer, text: str, count: int | None) -> list[int]:
    """The ids of the first `count` tokens (None: all). No more of the text is encoded than that takes.

    Encoding holds about a hundred bytes for each character.
    """
    if count is None:
        return tokenizer.encode(text, special=False)
    end, ids = TOKEN_CHARACTERS * (count + CUT_TOKENS), list[int]()
    while len(ids) < count + CUT_TOKENS:
        ids = tokenizer.encode(text[:end], special=False)
        if end >= len(text):
            break
        end *= 2
    return ids[:count]
