"""Text that follows a grammar: which tokens may come next, by llguidance.

A grammar is kept by the sequence's sampler, so it composes with drafts as every other parameter does: a token of a
draft stands where the sampler, whose grammar allows it, chooses it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from flashrt.errors import UsageError
from flashrt.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

Array = np.ndarray

LONGEST_SCHEMA = 1 << 18  # characters of JSON
# Between what JSON says. Without a bound a model may never come to an end of these; this is a deeply indented line's.
_SPACES = r"[ \t\n\r]{0,20}"


class Grammars:
    """Makes grammars of a model's tokens, of which `vocab` have logits and `ends` end a text.

    Takes 130 bytes a token of memory. Raises UsageError where llguidance is not installed, or nothing ends a text.
    """

    def __init__(self, tokenizer: Tokenizer, vocab: int, ends: Iterable[int]) -> None:
        try:
            from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
        except ImportError:
            raise UsageError("answers of a given form need llguidance: install flashrt[serve]") from None
        self._ends = sorted(ends)
        if not self._ends:
            raise UsageError("the model has no token that ends a text: an answer of a given form could not end")
        words = _Words(tokenizer, vocab, self._ends[0])
        wrapper = TokenizerWrapper(words)
        # Slices would make masks a little faster, and take three times the memory.
        self._tokens = LLTokenizer(wrapper, n_vocab=vocab, eos_token=self._ends, slices=[])
        wrapper.tokens = words.tokens = []  # they were copied
        self._matcher = LLMatcher

    def json_schema(self, schema: Mapping[str, Any]) -> Grammar:
        """JSON that a schema allows. Raises UsageError for one that is malformed, too large or not supported."""
        text = json.dumps(schema)
        if len(text) > LONGEST_SCHEMA:
            raise UsageError(f"the JSON schema has {len(text)} characters, expected at most {LONGEST_SCHEMA}")
        try:
            grammar = self._matcher.grammar_from_json_schema(text, overrides={"whitespace_pattern": _SPACES})
            return Grammar(self._matcher(self._tokens, grammar))
        except ValueError as error:
            raise UsageError(f"the JSON schema cannot be followed: {error}") from None

    def lark(self, text: str) -> Grammar:
        """A grammar in llguidance's form of Lark, in which `json_rule` makes rules. Raises UsageError."""
        if len(text) > LONGEST_SCHEMA:
            raise UsageError(f"the JSON schemas have {len(text)} characters, expected at most {LONGEST_SCHEMA}")
        try:
            return Grammar(self._matcher(self._tokens, self._matcher.grammar_from_lark(text)))
        except ValueError as error:
            raise UsageError(f"the JSON schemas cannot be followed: {error}") from None

    def json_object(self) -> Grammar:
        """Any JSON object."""
        return self.json_schema({"type": "object"})


def json_rule(name: str, schema: Mapping[str, Any]) -> str:
    """A rule of a Lark grammar: JSON that a schema allows."""
    return f"{name}: %json {json.dumps({**schema, 'x-guidance': {'whitespace_pattern': _SPACES}})}\n"


class Grammar:
    """Where a text stands in a grammar. Raises UsageError for a grammar that cannot be followed."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher
        if matcher.is_error():
            raise UsageError(f"the grammar cannot be followed: {_line(matcher.get_error())}")

    def copy(self) -> Grammar:
        return Grammar(self._matcher.deep_copy())

    def mask(self, logits: Array) -> None:
        """Rule out, in float32 [vocab], what may not come next."""
        allowed = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little")
        logits[allowed[: len(logits)] == 0] = -np.inf

    def accept(self, token: int) -> None:
        """`token` came. Raises UsageError where the grammar does not allow it, or takes too much to be followed."""
        over = self._matcher.is_stopped()  # all that may come is there: only what ends the text follows
        if not over and not self._matcher.consume_token(token):
            raise UsageError(f"the grammar cannot be followed any further: {_line(self._matcher.get_error())}")


class _Words:
    """A tokenizer as llguidance asks for it."""

    def __init__(self, tokenizer: Tokenizer, vocab: int, end: int) -> None:
        special = {tokenizer.token_id(text) for text in tokenizer.special_texts}
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = end, tokenizer.bos
        self.special_token_ids = sorted(token for token in special if token is not None and token < vocab)
        self.tokens = [tokenizer.token_bytes(token) for token in range(vocab)]

    def __call__(self, text: str | bytes) -> list[int]:
        if isinstance(text, bytes):  # llguidance asks which of both it may give
            raise TypeError
        return self._tokenizer.encode(text, special=False)


def _line(text: str) -> str:
    return " ".join(text.split())[:300]
