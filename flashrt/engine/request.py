"""What a user asks of a loaded model, checked before anything runs."""

from __future__ import annotations

import numbers
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flashrt.config import Sampling, whole
from flashrt.engine.grammar import Grammar
from flashrt.engine.logprobs import MOST_LIKELIEST
from flashrt.errors import UsageError


@dataclass(frozen=True, slots=True)
class Request:
    """A text to go on with. `stop_ids` end it, and so do the strings `stop`; `reuse` keeps what the last one shares.

    top_logprobs: how many tokens to name beside each; None: log-probabilities are not asked for
    cancelled: asked before each pass; once true, no other begins
    grammar: what the answer has to follow
    """

    prompt: list[int]
    limit: int  # new tokens, at most
    sampling: Sampling
    stop: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    reuse: bool = False
    top_logprobs: int | None = None
    cancelled: Callable[[], bool] = lambda: False
    grammar: Grammar | None = None


def checked_ids(ids: Any, vocab: int) -> list[int]:
    """Token ids as a list of int, from a sequence of integers, numpy's included.

    Raises UsageError for text, bytes and other types, and for ids outside 0 to `vocab` - 1.
    """
    if isinstance(ids, str | bytes | bytearray) or not isinstance(ids, Sequence | np.ndarray):
        raise UsageError(f"token ids are {reprlib.repr(ids)}, expected a list of whole numbers")
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, numbers.Integral):
            raise UsageError(f"a token id is {reprlib.repr(token)}, expected a whole number")
    result = [int(token) for token in ids]
    if result and not (min(result) >= 0 and max(result) < vocab):
        raise UsageError(f"the text has token ids outside 0 to {vocab - 1}, which the model does not know")
    return result


def checked_limit(max_new_tokens: int | None, prompt: int, context: int) -> int:
    """How many tokens may follow `prompt` tokens in a context. Raises UsageError when they do not fit."""
    if prompt == 0:
        raise UsageError("the prompt is empty: give at least one token")
    if prompt >= context:
        raise UsageError(
            f"the prompt has {prompt} tokens, the context is {context}: use a shorter prompt or a larger --context"
        )
    if max_new_tokens is None:
        return context - prompt
    limit = whole("max_new_tokens", max_new_tokens, 1)
    if prompt + limit > context:
        raise UsageError(
            f"{prompt} prompt tokens and {limit} new ones do not fit in the context of {context}: "
            "ask for fewer, or for a larger --context"
        )
    return limit


def checked_fit(count: int, context: int) -> None:
    """Raises UsageError for a text of more tokens than a context holds."""
    if count > context:
        raise UsageError(f"the text has {count} tokens, the context is {context}: use a shorter one")


def checked_sampling(sampling: Sampling | None, vocab: int) -> Sampling:
    """Greedy for None. Raises UsageError for anything but a Sampling, and for a bias of a token that there is not."""
    if sampling is None:
        return Sampling()
    if not isinstance(sampling, Sampling):
        raise UsageError(
            f"sampling is {reprlib.repr(sampling)}, expected a flashrt.config.Sampling, or None for greedy"
        )
    for token, _ in sampling.logit_bias:
        whole("a token of logit_bias", token, 0, vocab - 1)
    return sampling


def checked_top(top_logprobs: int | None) -> int | None:
    """How many tokens to name beside each. Raises UsageError."""
    return None if top_logprobs is None else whole("top_logprobs", top_logprobs, 0, MOST_LIKELIEST)


def checked_stops(stop: str | Sequence[str]) -> tuple[str, ...]:
    """The texts before which to stop. Raises UsageError for anything but texts, and for an empty one."""
    stops: Any = [stop] if isinstance(stop, str) else stop
    if isinstance(stops, bytes | bytearray) or not isinstance(stops, Sequence):
        raise UsageError(f"stop is {reprlib.repr(stop)}, expected a text or a list of texts")
    for text in stops:
        if not isinstance(text, str) or not text:
            raise UsageError(f"a stop text is {reprlib.repr(text)}, expected one character or more")
    return tuple(stops)


def checked_flag(name: str, value: Any) -> bool:
    """Raises UsageError for anything but True or False."""
    if not isinstance(value, bool):
        raise UsageError(f"{name} is {reprlib.repr(value)}, expected True or False")
    return value
